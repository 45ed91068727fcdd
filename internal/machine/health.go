package machine

import (
	"context"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/health"
	"golang.org/x/sys/unix"
)

// HealthCheck is the check as it is made: the machine's over the image's.
func (m *Machine) HealthCheck() health.Check {
	return m.Spec.Health.Over(m.Image.Health).WithDefaults()
}

// healthArgv is nil where there is nothing to check.
func (m *Machine) healthArgv() []string { return m.HealthCheck().Argv(m.Image.Shell) }

// watchHealth has a running machine checked until ctx ends, where there is a check.
func (ms *Machines) watchHealth(ctx context.Context, e *entry, r *run) {
	m := e.get()
	argv := m.healthArgv()
	if argv == nil {
		return
	}
	state := health.State{Status: health.Starting}
	if m.Health != nil {
		state = *m.Health
	}
	process := m.process(Process{Argv: argv})
	monitor := health.Monitor{
		Check: m.HealthCheck(), Started: m.Started,
		Probe:  func(ctx context.Context, output func([]byte)) (int, error) { return r.probe(ctx, process, output) },
		Report: func(s health.State) { ms.noteHealth(e, r, s) },
	}
	ms.workers.Go(func() { monitor.Run(ctx, state) })
}

// killPatience is how long a guest may take to say that a probe that took too long is dead.
const killPatience = 2 * time.Second

// probe runs a command in the guest, and kills it with all that it has started when ctx ends.
func (r *run) probe(ctx context.Context, p *agentv1.Process, output func([]byte)) (int, error) {
	agent, err := r.await(ctx)
	if err != nil {
		return 0, err
	}
	// The stream outlives ctx, for the kill.
	running, hangUp := context.WithCancel(context.WithoutCancel(ctx))
	defer hangUp()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(killPatience, hangUp) })()
	x, err := agent.Exec(running, &agentv1.Exec{Process: p})
	if err != nil {
		return 0, err
	}
	defer x.Close()
	defer context.AfterFunc(ctx, func() { _ = x.Signal(int32(unix.SIGKILL)) })() // where it is not heard, the hang-up is
	for {
		o, err := x.Recv()
		if err != nil {
			return 0, err
		}
		output(o.GetStdout())
		output(o.GetStderr())
		if exit := o.GetExit(); exit != nil {
			return int(exit.GetCode()), nil
		}
	}
}

// noteHealth keeps a state in memory, and in the record where the status has changed: a check every few seconds must not write to the
// disk as often.
func (ms *Machines) noteHealth(e *entry, r *run, s health.State) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.run != r || e.m.State != Running {
		return // it ended, or is about to, while it was looked at
	}
	if old := e.m.Health; old != nil && old.Status == s.Status {
		e.m.Health, e.unsaved = &s, true
		return
	}
	if err := ms.commitLocked(e, "health_status: "+string(s.Status), func(m *Machine) { m.Health = &s }); err != nil {
		ms.Log.Error("recording a machine's health", "machine", e.m.ID, "err", err)
	}
}
