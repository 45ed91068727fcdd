package machine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"github.com/containerd/errdefs"
)

// Process is a command to run beside the entrypoint; empty fields are the machine's own.
type Process struct {
	Argv       []string
	Env        []string
	WorkingDir string
	User       string
	TTY        bool
	Stdin      bool
	Rows, Cols uint32
	Detach     bool
}

// ExitCode tells, of an error of Exec, the exit code of a command that is not there (127) or cannot be executed (126). Other faults
// are not the command's.
func ExitCode(err error) (code int, ok bool) {
	code = exitCodeOf(err)
	return code, code != exitFailed
}

// Exec starts a command in a running machine.
func (ms *Machines) Exec(ctx context.Context, name string, p Process) (*host.Exec, error) {
	e, err := ms.find(name)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	r, m := e.run, e.m
	e.mu.Unlock()
	if r == nil || m.State != Running {
		return nil, notRunning(m)
	}
	if p.WorkingDir != "" && !strings.HasPrefix(p.WorkingDir, "/") {
		err := fmt.Errorf("running a command in machine %q: working directory %q: %w", m.Spec.Name, shorten(p.WorkingDir), errdefs.ErrInvalidArgument)
		return nil, hint.With(err, "give an absolute path")
	}
	agent, err := r.await(ctx)
	if err != nil {
		return nil, fmt.Errorf("running a command in machine %q: %w", m.Spec.Name, err)
	}
	answered := ms.expectAnswer(e, r, agent)
	x, err := agent.Exec(ctx, &agentv1.Exec{Detach: p.Detach, Process: m.process(p)})
	answered()
	if err != nil {
		return nil, fmt.Errorf("running a command in machine %q: %w", m.Spec.Name, err)
	}
	ms.publish(&m, "exec_create", map[string]string{"command": cmp.Or(p.Argv...)})
	return x, nil
}

// process is p with what it leaves open taken from the machine and its image.
func (m *Machine) process(p Process) *agentv1.Process {
	env := environment(p.TTY, m.Spec.Hostname, m.Image.Env, m.Spec.Env, p.Env)
	if m.imageInit() {
		env = initEnvironment(env, p.TTY)
	}
	return &agentv1.Process{
		Argv:       p.Argv,
		Env:        env,
		WorkingDir: cmp.Or(p.WorkingDir, m.Spec.WorkingDir, m.Image.WorkingDir, "/"),
		User:       cmp.Or(p.User, m.Spec.User, m.Image.User),
		Tty:        p.TTY, Stdin: p.Stdin, Rows: p.Rows, Cols: p.Cols,
		Rlimits: rlimits(m.Spec.Ulimits),
	}
}

// Attachment joins a machine's entrypoint from the moment it is made, which may be before the machine starts.
type Attachment struct {
	e      *entry
	reader *outlog.Reader
	next   bool // the machine does not run yet: wait for its next run
}

// Attach joins the entrypoint's streams. Close must follow.
func (ms *Machines) Attach(name string) (*Attachment, error) {
	e, err := ms.find(name)
	if err != nil {
		return nil, err
	}
	r, err := e.log.Tail()
	if err != nil {
		return nil, err
	}
	return &Attachment{e: e, reader: r, next: !e.get().State.Alive()}, nil
}

// Output hands over the output until the run is over, and returns the machine as it then is.
func (a *Attachment) Output(ctx context.Context, do func(outlog.Record) error) (Machine, error) {
	if a.next {
		before := a.e.get()
		// A run that has come and gone meanwhile shows by its times.
		err := a.e.until(ctx, func(e *entry) bool {
			return e.gone || e.m.State.Alive() || !e.m.Finished.Equal(before.Finished) || e.m.State != before.State
		})
		if err != nil {
			return a.e.get(), err
		}
	}
	for {
		rec, err := a.reader.Next(ctx, true)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return a.e.get(), err
		}
		if err := do(rec); err != nil {
			return a.e.get(), err
		}
	}
	err := a.e.until(ctx, func(e *entry) bool { return e.gone || !e.m.State.Alive() })
	m := a.e.get()
	if err == nil && m.Spec.Remove && m.State == Stopped {
		// Whoever waits for such a machine counts on its being gone.
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		defer cancel()
		_ = a.e.until(ctx, func(e *entry) bool { return e.gone })
	}
	return m, err
}

// Stdin opens the entrypoint's input once it runs.
func (a *Attachment) Stdin(ctx context.Context) (*host.Stdin, error) {
	err := a.e.until(ctx, func(e *entry) bool { return e.run != nil || e.gone })
	if err != nil {
		return nil, err
	}
	a.e.mu.Lock()
	r := a.e.run
	a.e.mu.Unlock()
	if r == nil {
		return nil, notRunning(a.e.get())
	}
	agent, err := r.await(ctx)
	if err != nil {
		return nil, err
	}
	return agent.Stdin(ctx)
}

// Signal sends a signal to the entrypoint.
func (a *Attachment) Signal(ctx context.Context, name string) error {
	a.e.mu.Lock()
	r, m := a.e.run, a.e.m
	a.e.mu.Unlock()
	if r == nil {
		return notRunning(m)
	}
	return r.signal(ctx, &m, canonical(name))
}

// Close leaves the machine, which runs on.
func (a *Attachment) Close() error { return a.reader.Close() }
