package machine

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollvm/atoll/internal/network"
	"github.com/containerd/errdefs"
)

// Recover takes back what an earlier daemon left: it must be called once, before any command. Machines that run go on running;
// a start or a stop that was cut off is undone or finished; the rest is told as it is.
func (ms *Machines) Recover(ctx context.Context) error {
	ms.mu.Lock()
	entries := make([]*entry, 0, len(ms.byID))
	for _, e := range ms.byID {
		entries = append(entries, e)
	}
	ms.mu.Unlock()

	attached := map[string][]network.Endpoint{}
	for _, e := range entries {
		if ms.recoverOne(ctx, e) {
			m := e.get()
			if m.Spec.Network != NoNetwork {
				ep := m.endpoint()
				ep.Ports = m.Ports
				attached[m.Spec.Network] = append(attached[m.Spec.Network], ep)
			}
		}
	}
	// Everything that is not in this list is detached: what a cut-off start or rm may have left.
	for _, n := range ms.Networks.List() {
		_, d, err := ms.Networks.Get(n.Name)
		if err == nil {
			err = d.Recover(ctx, n, attached[n.Name])
		}
		if err != nil {
			return fmt.Errorf("recovering network %q: %w", n.Name, err)
		}
	}
	return nil
}

// recoverOne says whether the machine runs.
func (ms *Machines) recoverOne(ctx context.Context, e *entry) bool {
	m := e.get()
	switch {
	case !m.State.Alive():
		if m.Spec.Remove && (m.State == Stopped || m.State == Failed) {
			ms.later("removing a machine that was to be thrown away", m.ID, func() error { return ms.remove(ms.life, e, false) })
		}
		return false
	case m.HostBoot != ms.BootID:
		ms.finish(e, ReasonHostReboot, 255, "the host was restarted")
		return false
	}
	d, _, err := ms.driver(ctx, m.VMM.Driver)
	if err != nil {
		ms.Log.Error("recovering a machine", "machine", m.ID, "err", err)
		return false
	}
	s := starting{ms: ms, e: e, m: m}
	inst, err := d.Recover(ctx, s.spec())
	if errors.Is(err, errdefs.ErrNotFound) {
		ms.finish(e, ReasonVMMDied, 255, "the VMM ended while no daemon ran")
		return false
	}
	if err != nil {
		ms.Log.Error("recovering a machine", "machine", m.ID, "err", err)
		return false
	}
	r := newRun(inst, e)
	if m.State == Starting {
		// Its guest may be half configured: undo.
		err := errors.Join(inst.Kill(ctx), r.close())
		if err != nil {
			ms.Log.Error("undoing a start that was cut off", "machine", m.ID, "err", err)
		}
		if err := ms.commit(e, "die", func(m *Machine) {
			m.State, m.Error, m.FailedStep = Failed, "the daemon ended while the machine was starting", "start"
			m.VMM.PID = 0
		}); err != nil {
			ms.Log.Error("recording a failed start", "machine", m.ID, "err", err)
		}
		return false
	}
	e.log.Resume()
	e.mu.Lock()
	e.run = r
	e.mu.Unlock()
	ms.supervise(e, r)
	if m.State == Stopping {
		ms.later("finishing a stop that was cut off", m.ID, func() error {
			_, err := ms.Stop(ms.life, string(m.ID), nil)
			return err
		})
	}
	return true
}
