package machine

import (
	"context"
	"errors"
	"time"

	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
)

// Recover takes back what an earlier daemon left: it must be called once, before any command. Machines that run go on running;
// a start or a stop that was cut off is undone or finished; the rest is told as it is.
func (ms *Machines) Recover(ctx context.Context) {
	ms.mu.Lock()
	entries := make([]*entry, 0, len(ms.byID))
	for _, e := range ms.byID {
		entries = append(entries, e)
	}
	ms.mu.Unlock()

	attached := map[string][]Machine{}
	for _, e := range entries {
		if ms.recoverOne(ctx, e) {
			m := e.get()
			attached[m.Spec.Network] = append(attached[m.Spec.Network], m)
		}
	}
	// Everything that is not in this list is detached: what a cut-off start or rm may have left.
	for _, n := range ms.Networks.List() {
		_, d, err := ms.Networks.Get(n.Name)
		if err == nil {
			err = d.Recover(ctx, n, ms.endpoints(n, attached[n.Name]))
		}
		if err != nil {
			// A port that cannot be bound again must not keep everything else from being managed.
			ms.Log.Error("recovering a network", "network", n.Name, "err", err)
		}
	}
}

// endpoints are those of running machines, with the ports as bound.
func (ms *Machines) endpoints(n network.Network, machines []Machine) []network.Endpoint {
	var endpoints []network.Endpoint
	for _, m := range machines {
		request, unread := ms.requestFor(&m)
		ep, err := m.endpoint(n, request)
		err = errors.Join(unread, err)
		if err != nil { // it has its network all the same
			ms.Log.Error("recovering a machine's metadata", "machine", m.ID, "err", err)
		}
		ep.Ports = m.Ports
		endpoints = append(endpoints, ep)
	}
	return endpoints
}

// recoverOne says whether the machine runs.
func (ms *Machines) recoverOne(ctx context.Context, e *entry) bool {
	m := e.get()
	switch {
	case !m.State.Alive():
		ms.afterwards(e)
		return false
	case m.HostBoot != ms.BootID:
		ms.finish(e, ReasonHostReboot, 255, "the host was restarted")
		return false
	}
	d := ms.Drivers[m.VMM.Driver]
	if d == nil {
		ms.Log.Error("recovering a machine: its driver is not here", "machine", m.ID, "driver", m.VMM.Driver)
		return false
	}
	s := starting{ms: ms, e: e, m: m}
	inst, err := d.Recover(ctx, s.spec())
	switch {
	case err != nil && !errdefs.IsNotFound(err):
		ms.Log.Error("recovering a machine", "machine", m.ID, "err", err)
		return true // it may run: its network stays
	case m.State == Starting:
		ms.undoStart(ctx, e, inst)
		return false
	case err != nil && m.Last != nil:
		ms.finish(e, m.Last.Reason, m.Last.ExitCode, m.Last.Detail)
		return false
	case err != nil:
		ms.finish(e, ReasonVMMDied, 255, "the VMM ended while no daemon ran")
		return false
	}
	r := newRun(inst, e)
	r.foreign, r.modules = true, ms.modulesOf(m.VMM.Kernel)
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

// undoStart ends a machine whose start was cut off: its guest may be half configured. inst is nil when there was no VMM yet.
func (ms *Machines) undoStart(ctx context.Context, e *entry, inst vmm.Instance) {
	if inst != nil {
		if err := errors.Join(inst.Kill(ctx), inst.Close()); err != nil {
			ms.Log.Error("undoing a start that was cut off", "machine", e.get().ID, "err", err)
		}
	}
	err := ms.commit(e, "die", func(m *Machine) {
		m.State, m.ExitCode, m.Error, m.FailedStep, m.Finished = Failed, exitFailed, "the daemon ended while the machine was starting", "start", time.Now()
		m.VMM.PID = 0
	})
	if err != nil {
		ms.Log.Error("recording a failed start", "machine", e.get().ID, "err", err)
	}
	ms.afterwards(e)
}
