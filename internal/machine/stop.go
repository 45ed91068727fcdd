package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

const (
	// killAfter is what a guest gets beyond the grace period to say that it goes down.
	killAfter = 3 * time.Second
	// downTimeout is what it gets from then on to write everything to its disk.
	downTimeout = 30 * time.Second
)

// Stop sends the entrypoint its stop signal, waits grace (unset: the machine's own) and ends the machine in any case. A machine
// that does not run is no error.
func (ms *Machines) Stop(ctx context.Context, name string, grace *time.Duration) (Machine, error) {
	e, err := ms.find(name)
	if err != nil {
		return Machine{}, err
	}
	if e.get().State == Starting {
		err = ms.end(ctx, e)
	}
	err = errors.Join(err, e.take(ctx))
	if err != nil {
		return Machine{}, err
	}
	defer e.give()
	return ms.stop(ctx, e, grace)
}

func (ms *Machines) stop(ctx context.Context, e *entry, grace *time.Duration) (Machine, error) {
	e.mu.Lock()
	r, m := e.run, e.m
	if r == nil {
		e.mu.Unlock()
		return m, lost(m)
	}
	e.stopAsked = true
	err := ms.commitLocked(e, "", func(m *Machine) { m.State = Stopping })
	e.mu.Unlock()
	if err != nil { // as on a full disk, where it must be possible to stop
		ms.Log.Error("recording a machine that stops", "machine", m.ID, "err", err)
	}
	wait := m.Spec.StopTimeout
	if grace != nil {
		wait = *grace
	}
	if err := ms.askDown(ctx, e, r, wait); err != nil {
		return m, fmt.Errorf("stopping machine %q: %w", m.Spec.Name, err)
	}
	if err := e.until(ctx, func(e *entry) bool { return !e.m.State.Alive() }); err != nil {
		return m, fmt.Errorf("stopping machine %q: %w", m.Spec.Name, err)
	}
	ms.publish(&m, "stop", nil)
	return e.get(), nil
}

// askDown asks the guest to go down and kills it when it does not. A caller that gives up, or a daemon that ends, kills nothing: the
// guest has its order.
func (ms *Machines) askDown(ctx context.Context, e *entry, r *run, grace time.Duration) error {
	patience := grace + killAfter
	if m := e.get(); m.ownSystem() {
		patience = grace // it says nothing
	}
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	// In a goroutine of its own: a guest that no longer reads its channel holds the call up.
	go func() {
		if m := e.get(); m.ownSystem() {
			ms.press(asking, r)
			return
		}
		if agent, err := r.await(asking); err == nil {
			if err := agent.Shutdown(asking, "", grace); err != nil {
				ms.Log.Debug("asking the guest to shut down", "machine", e.get().ID, "err", err)
			}
		}
	}()
	down, err := ms.wentDown(ctx, r, patience)
	if err == nil && !down && e.get().Last != nil {
		down, err = ms.wentDown(ctx, r, downTimeout)
	}
	if down || err != nil {
		return err
	}
	return ms.killVMM(ctx, e, r)
}

// wentDown waits for the end of the VMM. It is an error when the caller or the daemon goes first.
func (ms *Machines) wentDown(ctx context.Context, r *run, patience time.Duration) (bool, error) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-r.inst.Done():
		return true, nil
	case <-ctx.Done():
		return false, ctx.Err()
	case <-ms.life.Done():
		return false, fmt.Errorf("the daemon ends: %w", errdefs.ErrUnavailable)
	case <-timer.C:
		return false, nil
	}
}

// end stops a start that is under way and kills a VMM that runs.
func (ms *Machines) end(ctx context.Context, e *entry) error {
	e.mu.Lock()
	r, cancel := e.run, e.cancelStart
	e.mu.Unlock()
	if cancel != nil {
		cancel()
		return e.until(ctx, func(e *entry) bool { return e.cancelStart == nil || e.m.State != Starting })
	}
	if r == nil {
		return lost(e.get())
	}
	if err := ms.killVMM(ctx, e, r); err != nil {
		return err
	}
	return e.until(ctx, func(e *entry) bool { return e.run != r })
}

// lost is the error for a machine that should run but could not be taken back; nil for one that does not run.
func lost(m Machine) error {
	if !m.State.Alive() {
		return nil
	}
	err := fmt.Errorf("machine %q may run, but its VMM could not be taken back: %w", m.Spec.Name, errdefs.ErrUnavailable)
	return hint.With(err, "restart the daemon; its log says why, and inspect shows the VMM's process")
}

func (ms *Machines) killVMM(ctx context.Context, e *entry, r *run) error {
	e.mu.Lock()
	r.killed = true
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	return r.inst.Kill(ctx)
}

// savePatience is how long a guest whose processes were killed may take to bring to its disk what they had written.
const savePatience = 3 * time.Second

// killProcesses has the agent kill the guest's processes and take the machine down, as nothing that was written is lost that way. It says
// whether the machine is down.
func (ms *Machines) killProcesses(ctx context.Context, e *entry, r *run) bool {
	e.mu.Lock()
	agent := r.agent
	if e.m.State != Running || agent == nil || e.m.imageInit() || e.m.ownSystem() {
		e.mu.Unlock()
		return false
	}
	r.killed = true
	e.mu.Unlock()
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), savePatience)
	defer cancel()
	go func() {
		if err := agent.Shutdown(asking, "KILL", 0); err != nil {
			ms.Log.Debug("asking the guest to kill its processes", "machine", e.get().ID, "err", err)
		}
	}()
	down, err := ms.wentDown(ctx, r, savePatience)
	return down && err == nil
}

// Kill sends a signal to the entrypoint; KILL ends the machine itself: its processes at once, and the VMM when the guest does not go down
// then. It takes no turn: it must also work while a stop waits.
func (ms *Machines) Kill(ctx context.Context, name, signal string) error {
	e, err := ms.find(name)
	if err != nil {
		return err
	}
	e.mu.Lock()
	r, m := e.run, e.m
	e.mu.Unlock()
	if !m.State.Alive() {
		return notRunning(m)
	}
	signal = canonical(signal)
	switch {
	case signal == "KILL" && r != nil && ms.killProcesses(ctx, e, r):
		err = e.until(ctx, func(e *entry) bool { return e.run != r })
	case signal == "KILL":
		err = ms.end(ctx, e)
	case r == nil:
		return notRunning(m)
	default:
		err = r.signal(ctx, &m, signal)
	}
	if err != nil {
		return fmt.Errorf("killing machine %q: %w", m.Spec.Name, err)
	}
	ms.publish(&m, "kill", map[string]string{"signal": signal})
	return nil
}

func (r *run) signal(ctx context.Context, m *Machine, name string) error {
	if m.ownSystem() && goingDown(name) {
		return r.press(ctx)
	}
	agent, err := r.await(ctx)
	if err != nil {
		return err
	}
	if m.imageInit() && goingDown(name) {
		return agent.Shutdown(ctx, "", m.Spec.StopTimeout)
	}
	return agent.Signal(ctx, name)
}

// Remove deletes a machine with its disk and logs; force stops it first.
func (ms *Machines) Remove(ctx context.Context, name string, force bool) (ID, error) {
	e, err := ms.find(name)
	if err != nil {
		return "", err
	}
	m := e.get()
	if err := ms.remove(ctx, e, force); err != nil {
		return m.ID, fmt.Errorf("removing machine %q: %w", m.Spec.Name, err)
	}
	return m.ID, nil
}

func (ms *Machines) remove(ctx context.Context, e *entry, force bool) error {
	m := e.get()
	if m.State.Alive() && !force {
		err := fmt.Errorf("it is %s: %w", m.State, errdefs.ErrFailedPrecondition)
		return hint.With(err, "stop it first, or: atoll rm -f %s", m.Spec.Name)
	}
	// What runs is ended before the turn is asked for: a command that waits for it may hold the turn.
	if err := ms.end(ctx, e); err != nil {
		return err
	}
	if err := e.take(ctx); err != nil {
		return err
	}
	defer e.give()
	if m := e.get(); m.State.Alive() { // another command started it meanwhile
		if !force {
			return fmt.Errorf("it is %s: %w", m.State, errdefs.ErrFailedPrecondition)
		}
		if err := ms.end(ctx, e); err != nil {
			return err
		}
	}
	if e.isGone() {
		return fmt.Errorf("machine %q: %w", m.Spec.Name, errdefs.ErrNotFound)
	}
	if err := errors.Join(ms.detach(ctx, &m), ms.Networks.Release(m.ID.Short())); err != nil {
		return err
	}
	// The record goes last: until then the machine can be removed again.
	if err := os.RemoveAll(e.dir); err != nil {
		return err
	}
	if err := ms.forget(e); err != nil {
		return err
	}
	ms.publish(&m, "destroy", nil)
	return e.log.Close()
}

// forget deletes the record of a machine. Nothing may write it again.
func (ms *Machines) forget(e *entry) error {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := ms.records.Delete(string(e.m.ID)); err != nil {
		return err
	}
	delete(ms.byID, e.m.ID)
	delete(ms.byName, e.m.Spec.Name)
	e.gone = true
	close(e.changed)
	e.changed = make(chan struct{})
	return nil
}
