package machine

import (
	"context"
	"errors"
	"time"
)

const (
	clockLook    = 5 * time.Second        // how often the daemon looks at the host's clock and for machines that are due
	clockEvery   = 3 * time.Minute        // how often it asks each machine for its time
	clockJump    = 500 * time.Millisecond // of the host's clock, as after it was set, or after the host has slept
	clockPrecise = 20 * time.Millisecond
	clockTimeout = 10 * time.Second
)

// keepClocks holds the guests' clocks to the host's: soon after a start, every few minutes, and when the host's own has jumped.
func (ms *Machines) keepClocks() {
	tick := time.NewTicker(clockLook)
	defer tick.Stop()
	base := time.Now()
	for {
		select {
		case <-tick.C:
		case <-ms.life.Done():
			return
		}
		now := time.Now()
		// The difference of the readings that were set against that of those that only count.
		jumped := (now.Round(0).Sub(base.Round(0)) - now.Sub(base)).Abs() > clockJump
		if jumped {
			base = now
		}
		ms.mu.Lock()
		entries := make([]*entry, 0, len(ms.byID))
		for _, e := range ms.byID {
			entries = append(entries, e)
		}
		ms.mu.Unlock()
		for _, e := range entries {
			e.mu.Lock()
			r := e.run
			due := r != nil && e.m.State == Running && (jumped || now.Sub(r.synced) > clockEvery)
			if due {
				r.synced = now
			}
			e.mu.Unlock()
			if due {
				ms.workers.Go(func() { ms.syncClock(ms.life, e, r) })
			}
		}
	}
}

// syncClock compares a guest's clock with the host's and has it corrected.
func (ms *Machines) syncClock(life context.Context, e *entry, r *run) {
	ctx, cancel := context.WithTimeout(life, clockTimeout)
	defer cancel()
	agent, err := r.client()
	if err != nil {
		return // it is synchronised when it answers again
	}
	ahead, err := agent.SyncTime(ctx, clockPrecise)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		ms.checkAgent(life, e, r, agent)
	case err != nil:
		ms.Log.Debug("comparing clocks", "machine", e.get().ID, "err", err)
	case ahead.Abs() > clockPrecise:
		ms.Log.Debug("guest's clock corrected", "machine", e.get().ID, "ahead", ahead)
	}
}
