package machine

import (
	"context"
	"time"

	"github.com/atollvm/atoll/internal/machine/outlog"
)

// Defaults and bounds of what is kept of the entrypoint's output.
const (
	DefaultLogMaxBytes = 10 << 20
	DefaultLogMaxFiles = 2
	MinLogMaxBytes     = 128 << 10 // more than one record takes
	MaxLogMaxFiles     = 1000
)

// logLimits also serves machines that were created when there was no choice.
func (s Spec) logLimits() outlog.Limits {
	l := outlog.Limits{FileBytes: s.LogMaxBytes, Files: s.LogMaxFiles}
	if l.FileBytes <= 0 {
		l.FileBytes = DefaultLogMaxBytes
	}
	if l.Files <= 0 {
		l.Files = DefaultLogMaxFiles
	}
	return l
}

// Output is what a machine's entrypoint wrote, and goes on writing.
type Output struct {
	*outlog.Reader
	e *entry
}

// Logs returns the output from the oldest record kept; whoever gets it closes it.
func (ms *Machines) Logs(name string) (*Output, error) {
	e, err := ms.find(name)
	if err != nil {
		return nil, err
	}
	r, err := e.log.Read()
	if err != nil {
		return nil, err
	}
	return &Output{r, e}, nil
}

// restartGrace is how soon a machine that was told to stop must run again to count as restarted.
const restartGrace = 2 * time.Second

// Continues waits, at the end of a boot's output, for the machine's next boot, where there is one at once: after a reboot, or when the
// stop was half of a restart.
func (o *Output) Continues(ctx context.Context) bool {
	if o.e.until(ctx, func(e *entry) bool { return e.gone || !e.m.State.Alive() || e.run == nil }) != nil {
		return false
	}
	o.e.mu.Lock()
	m, asked := o.e.m, o.e.stopAsked
	o.e.mu.Unlock()
	if m.State != Stopped || !asked && m.Reason != ReasonReboot {
		return m.State.Alive()
	}
	ctx, cancel := context.WithDeadline(ctx, m.Finished.Add(restartGrace))
	defer cancel()
	err := o.e.until(ctx, func(e *entry) bool { return e.gone || e.m.State.Alive() })
	return err == nil && !o.e.isGone()
}
