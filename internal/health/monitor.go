package health

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Monitor makes one check again and again.
type Monitor struct {
	Check   Check     // with its defaults
	Started time.Time // when what it looks at began to run
	// Probe runs the check's command, hands its output over, and returns its exit code. Once ctx ends it kills the command and returns.
	Probe func(ctx context.Context, output func([]byte)) (exitCode int, err error)
	// Report takes each new state.
	Report func(State)
}

// Run makes checks until ctx ends. s is what was known before; checks go on from there.
func (m *Monitor) Run(ctx context.Context, s State) {
	last := m.Started
	if n := len(s.Log); n > 0 {
		last = s.Log[n-1].End
	}
	timer := time.NewTimer(m.interval(s) - time.Since(last))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		r := m.once(ctx)
		if ctx.Err() != nil {
			return // what is looked at ends, which is no failure of the check
		}
		s = s.After(r, m.Check, m.Started)
		m.Report(s)
		timer.Reset(m.interval(s))
	}
}

func (m *Monitor) interval(s State) time.Duration {
	if s.Status == Starting && time.Since(m.Started) < m.Check.StartPeriod {
		return m.Check.StartInterval
	}
	return m.Check.Interval
}

func (m *Monitor) once(ctx context.Context) Result {
	ctx, cancel := context.WithTimeout(ctx, m.Check.Timeout)
	defer cancel()
	var out output
	r := Result{Start: time.Now()}
	code, err := m.Probe(ctx, out.add)
	r.End, r.ExitCode, r.Output = time.Now(), code, out.String()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		r.ExitCode, r.Output = -1, fmt.Sprintf("Health check exceeded timeout (%s): %s", m.Check.Timeout, r.Output)
	} else if err != nil {
		r.ExitCode, r.Output = -1, err.Error()
	}
	return r
}

// output keeps the first bytes that a check writes.
type output struct {
	kept []byte
	more bool
}

func (o *output) add(p []byte) {
	n := min(len(p), maxOutput-len(o.kept))
	o.kept = append(o.kept, p[:n]...)
	o.more = o.more || n < len(p)
}

// String is valid UTF-8, whatever the guest wrote.
func (o *output) String() string {
	kept := o.kept
	if o.more {
		for i := 1; i < utf8.UTFMax && i < len(kept); i++ { // no half of a character
			if utf8.RuneStart(kept[len(kept)-i]) {
				if !utf8.FullRune(kept[len(kept)-i:]) {
					kept = kept[:len(kept)-i]
				}
				break
			}
		}
	}
	s := strings.ToValidUTF8(string(kept), "�")
	if o.more {
		s += "..."
	}
	return s
}
