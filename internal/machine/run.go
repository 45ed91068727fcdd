package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unicode"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
)

// run is one life of a VMM: its instance and the channel to its agent, which may break and be opened anew.
type run struct {
	inst vmm.Instance
	e    *entry
	line *line

	transcribed chan struct{} // closed when all of the console of a guest without an agent is in the output; nil: there is an agent

	drained chan struct{} // closed when the entrypoint's output is complete
	foreign bool          // an earlier daemon started the VMM: its agent may speak another version
	modules *modulesOf    // what the guest's kernel may ask for; nil: nothing
	serving sync.WaitGroup

	// guarded by e.mu
	refused   error         // the agent speaks a version that cannot be worked with
	agent     *host.Client  // nil while the channel is down
	connected chan struct{} // closed while it is up
	killed    bool          // Atoll ended the VMM
	synced    time.Time     // when its clock was last compared
}

func newRun(inst vmm.Instance, e *entry) *run {
	return &run{inst: inst, e: e, line: newLine(inst), drained: make(chan struct{}), connected: make(chan struct{})}
}

// connect opens the agent's channel, as soon as the guest is there.
func (r *run) connect(ctx context.Context, token transport.Token) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-r.inst.Done():
			cancel(fmt.Errorf("the VMM ended: %s: %w", r.inst.Exit().Detail, errdefs.ErrUnavailable))
		case <-ctx.Done():
		}
	}()
	conn, err := r.inst.DialAgent(ctx)
	if err != nil {
		return fmt.Errorf("waiting for the guest's agent: %w", causeOf(ctx, err))
	}
	session, err := transport.Connect(ctx, conn, token)
	if err != nil {
		return fmt.Errorf("waiting for the guest's agent: %w", causeOf(ctx, err))
	}
	agent := host.New(session)
	if r.foreign {
		if err := r.greet(ctx, agent); err != nil {
			agent.Close()
			return err
		}
	}
	r.e.mu.Lock()
	defer r.e.mu.Unlock()
	r.agent = agent
	close(r.connected)
	if r.modules != nil {
		r.serving.Go(func() { r.modules.serve(agent) })
	}
	return nil
}

// greetTimeout is for an agent that has answered the channel's hello and could answer this one at once.
const greetTimeout = 10 * time.Second

// greet asks an agent that came with another daemon for its version.
func (r *run) greet(ctx context.Context, agent *host.Client) error {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	_, err := agent.Hello(ctx)
	if errdefs.IsFailedPrecondition(err) {
		r.e.mu.Lock()
		r.refused = err
		r.e.mu.Unlock()
	}
	return err
}

func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

func (r *run) configure(ctx context.Context, c *agentv1.Config, contents []host.Content, tell host.Configuring) error {
	agent, err := r.client()
	if err != nil {
		return err
	}
	return agent.ConfigureWith(ctx, c, contents, tell)
}

// client returns the agent, or errdefs.ErrUnavailable while the channel is down.
func (r *run) client() (*host.Client, error) {
	r.e.mu.Lock()
	defer r.e.mu.Unlock()
	switch {
	case r.refused != nil:
		return nil, hint.With(r.refused, "give it this Atoll's agent: atoll restart %s", r.e.m.Spec.Name)
	case r.agent == nil:
		err := fmt.Errorf("the guest's agent does not answer: %w", errdefs.ErrUnavailable)
		return nil, hint.With(err, "the guest may be overloaded, or its root user has ended the agent; look: atoll logs --boot %[1]s; or start it anew: atoll restart %[1]s",
			r.e.m.Spec.Name)
	}
	return r.agent, nil
}

// reconnecting is how long a call waits for a channel that is just being opened anew, as after the daemon's restart.
const reconnecting = 5 * time.Second

// await returns the agent as soon as there is one.
func (r *run) await(ctx context.Context) (*host.Client, error) {
	r.e.mu.Lock()
	if r.e.m.ownSystem() {
		defer r.e.mu.Unlock()
		return nil, noAgent(&r.e.m)
	}
	connected, refused := r.connected, r.refused
	r.e.mu.Unlock()
	if refused != nil {
		return r.client()
	}
	select {
	case <-connected:
	case <-r.inst.Done():
	case <-time.After(reconnecting):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return r.client()
}

// drop ends the session with the agent.
func (r *run) drop() {
	r.e.mu.Lock()
	agent := r.agent
	if agent != nil {
		r.agent, r.connected = nil, make(chan struct{})
	}
	r.e.mu.Unlock()
	if agent != nil {
		agent.Close()
		r.serving.Wait()
	}
}

func (r *run) close() error {
	r.drop()
	return r.inst.Close()
}

// supervise watches a running machine until its VMM ends or the daemon does.
func (ms *Machines) supervise(e *entry, r *run) {
	ms.workers.Go(func() {
		ctx, cancel := context.WithCancel(ms.life)
		defer cancel()
		if m := e.get(); m.ownSystem() {
			r.transcribed = make(chan struct{})
			ms.workers.Go(func() { defer close(r.transcribed); ms.transcribe(ms.life, e, r) })
		} else {
			ms.workers.Go(func() { ms.listen(ctx, e, r) })
			ms.watchHealth(ctx, e, r)
		}
		select {
		case <-r.inst.Done():
			cancel()
			ms.ended(e, r)
		case <-ctx.Done():
			if err := r.close(); err != nil {
				ms.Log.Debug("letting go of a machine", "machine", e.get().ID, "err", err)
			}
		}
	})
}

// steady is how long a channel must have served before its break is met with a quick retry.
const steady = 5 * time.Second

// listen reads the guest's output and events, opening the channel anew when it breaks.
func (ms *Machines) listen(ctx context.Context, e *entry, r *run) {
	pause := 10 * time.Millisecond
	for ctx.Err() == nil {
		agent, err := r.client()
		if err == nil {
			began := time.Now()
			err = ms.listenOnce(ctx, e, r, agent)
			if time.Since(began) > steady {
				pause = 10 * time.Millisecond
			}
			r.drop()
		} else {
			if err = r.connect(ctx, e.get().AgentToken); err == nil {
				ms.workers.Go(func() { ms.syncClock(ctx, e, r) }) // nobody knows what has been meanwhile
			}
		}
		if errdefs.IsFailedPrecondition(err) && ctx.Err() == nil {
			ms.Log.Warn("a machine's agent cannot be worked with until the machine is restarted", "machine", e.get().ID, "err", err)
			return
		}
		if err != nil && ctx.Err() == nil {
			ms.Log.Debug("agent channel broke", "machine", e.get().ID, "err", err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			pause = min(2*pause, 2*time.Second)
		}
	}
}

func (ms *Machines) listenOnce(ctx context.Context, e *entry, r *run, agent *host.Client) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	outputEnded := make(chan struct{})
	go func() {
		defer close(outputEnded)
		err := agent.Output(ctx, e.log.LastSeq(), func(o *agentv1.Output) error { return r.output(o) })
		if err != nil {
			cancel(err)
		}
	}()
	err := agent.Watch(ctx, func(ev *agentv1.Event) bool { return ms.event(ctx, r, ev) })
	cancel(err)
	<-outputEnded
	return causeOf(ctx, err)
}

func (r *run) output(o *agentv1.Output) error {
	if o.GetEof() {
		r.e.mu.Lock()
		defer r.e.mu.Unlock()
		select {
		case <-r.drained:
		default:
			close(r.drained)
		}
		return nil
	}
	stream := outlog.Stdout
	if o.GetStream() == agentv1.Stream_STREAM_STDERR {
		stream = outlog.Stderr
	}
	return r.e.log.Append(outlog.Record{Seq: o.GetSeq(), Time: time.Unix(0, o.GetUnixNanos()), Stream: stream, Data: o.GetData()})
}

// drainTimeout bounds how long a guest that says it exited may keep its last output back.
const drainTimeout = 2 * time.Second

// event takes one event and says whether it may be acknowledged: after that the agent powers off.
func (ms *Machines) event(ctx context.Context, r *run, ev *agentv1.Event) bool {
	if x := ev.GetExited(); x != nil {
		select {
		case <-r.drained:
		case <-time.After(drainTimeout):
		case <-ctx.Done():
			return false
		}
		l := LastWord{Reason: ReasonExited, ExitCode: int(x.GetCode()) & 0xff}
		if x.GetOomKilled() {
			l.Detail = "the entrypoint was killed for want of memory"
		}
		return ms.keepLastWord(r.e, l)
	}
	if g := ev.GetGoingDown(); g != nil {
		l := LastWord{Reason: ReasonPoweroff}
		switch g.GetReason() {
		case agentv1.GoingDown_REASON_REBOOT:
			l.Reason = ReasonReboot
		case agentv1.GoingDown_REASON_VERITY:
			l = LastWord{Reason: ReasonVerity, ExitCode: exitFailed, Detail: string(printable([]byte(g.GetDetail()[:min(len(g.GetDetail()), 200)])))}
		}
		return ms.keepLastWord(r.e, l)
	}
	return true
}

// keepLastWord stores why the guest goes down before the guest may do so: it says it once. The first word counts.
func (ms *Machines) keepLastWord(e *entry, l LastWord) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.m.Last != nil {
		return true
	}
	err := ms.commitLocked(e, "", func(m *Machine) { m.Last = &l })
	if err != nil {
		ms.Log.Error("recording why a guest goes down", "machine", e.m.ID, "err", err)
	}
	return err == nil
}

// ended records the end of a machine whose VMM is gone, and lets go of what only a running machine holds.
func (ms *Machines) ended(e *entry, r *run) {
	exit := r.inst.Exit()
	if r.transcribed != nil {
		<-r.transcribed
	}
	if err := r.close(); err != nil {
		ms.Log.Debug("closing an ended instance", "machine", e.get().ID, "err", err)
	}
	reason, code, detail := r.verdict(exit)
	ms.finish(e, reason, code, detail)
}

func (r *run) verdict(exit vmm.Exit) (Reason, int, string) {
	r.e.mu.Lock()
	defer r.e.mu.Unlock()
	switch {
	case r.killed && r.e.m.Last != nil && r.e.m.Last.ExitCode == 137:
		return ReasonKilled, 137, ""
	case r.e.m.Last != nil: // the agent's own word, which a guest that writes to its console cannot outdo
		return r.e.m.Last.Reason, r.e.m.Last.ExitCode, r.e.m.Last.Detail
	case exit.Reason == vmm.ReasonPanic:
		return ReasonPanic, 255, "the guest's kernel panicked"
	case r.killed:
		return ReasonKilled, 137, ""
	case exit.Reason == vmm.ReasonGuest && (r.e.m.imageInit() || r.e.m.ownSystem()): // its init has the last word
		if exit.Reset {
			return ReasonReboot, 0, ""
		}
		return ReasonPoweroff, 0, ""
	case exit.Reason == vmm.ReasonGuest:
		return ReasonPoweroff, 0, "the guest went down without the agent's word"
	default:
		return ReasonVMMDied, 255, "the VMM ended unexpectedly: " + exit.Detail
	}
}

// finish brings the record of a machine that no longer runs up to date.
func (ms *Machines) finish(e *entry, reason Reason, code int, detail string) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	m := e.get()
	if m.State == Stopping && reason == ReasonReboot {
		reason = ReasonPoweroff // a stop was asked for as well, and is what counts
	}
	e.log.End() // before the record tells that it stopped: a quick restart begins the log anew
	if err := ms.detach(ctx, &m); err != nil {
		ms.Log.Error("detaching a stopped machine", "machine", m.ID, "err", err)
	}
	e.mu.Lock()
	e.run = nil
	err := ms.commitLocked(e, "die", func(m *Machine) {
		m.State, m.Reason, m.ExitCode, m.Error, m.Finished = Stopped, reason, code, detail, time.Now()
		if reason == ReasonVerity {
			m.State = Failed
		}
		m.VMM.PID, m.Ports = 0, nil
		m.Health = m.Health.Stopped()
	})
	e.mu.Unlock()
	if err != nil {
		ms.Log.Error("recording a stopped machine", "machine", m.ID, "err", err)
	}
	ms.afterwards(e)
}

// afterwards does what a stopped machine's record still asks for: to be thrown away, or to start again after a reboot.
func (ms *Machines) afterwards(e *entry) {
	m := e.get()
	switch {
	case m.Spec.Remove && (m.State == Stopped || m.State == Failed):
		ms.later("removing a machine that was to be thrown away", m.ID, func() error { return ms.remove(context.Background(), e, false) })
	case m.State == Stopped && m.Reason == ReasonReboot:
		ms.later("restarting a machine that rebooted", m.ID, func() error {
			_, _, err := ms.Start(ms.life, string(m.ID))
			return err
		})
	}
}

func (ms *Machines) detach(ctx context.Context, m *Machine) error {
	if m.Spec.Network == NoNetwork {
		return nil
	}
	n, d, err := ms.Networks.Get(m.Spec.Network)
	if err != nil {
		return err
	}
	return d.Detach(ctx, n, m.ID.Short())
}

// later does something that must not hold up its caller, which may itself be waited for.
func (ms *Machines) later(what string, id ID, do func() error) {
	if ms.life.Err() != nil {
		return // the next daemon does it
	}
	ms.workers.Go(func() {
		if err := do(); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			ms.Log.Error("work left for later failed", "work", what, "machine", id, "err", err)
		}
	})
}

// exitFailed is Docker's exit code for what is not the command's own fault.
const exitFailed = 125

// exitCodeOf is the exit code of a command that could not be started, as shells and Docker have them.
func exitCodeOf(err error) int {
	var f *host.Failure
	if !errors.As(err, &f) {
		return exitFailed
	}
	switch f.Class {
	case agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND:
		return 127
	case agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE:
		return 126
	}
	return exitFailed
}

// consoleTail returns the last lines of the serial console, with what a terminal could choke on made harmless.
func consoleTail(path string, lines int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 16 << 10
	if st, err := f.Stat(); err == nil && st.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd)
	}
	data, _ := io.ReadAll(io.LimitReader(f, most))
	all := bytes.Split(bytes.TrimSpace(printable(data)), []byte("\n"))
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return string(bytes.Join(all, []byte("\n")))
}

// printable leaves out control characters, also those above ASCII: U+009B begins a terminal's sequences as ESC [ does.
func printable(data []byte) []byte {
	return bytes.Map(func(c rune) rune {
		if c == '\n' || c == '\t' || !unicode.IsControl(c) && c != '�' {
			return c
		}
		return -1
	}, data)
}

// ConsolePath is where the serial console of a machine is logged.
func (ms *Machines) ConsolePath(m Machine) string {
	return filepath.Join(ms.Dir, m.ID.Short(), vmm.ConsoleFile)
}
