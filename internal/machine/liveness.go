package machine

import (
	"context"
	"errors"
	"time"

	"github.com/atollvm/atoll/internal/agent/host"
)

// An agent beside the image's init can be killed, and starts again at once. The VMM tells that its port was closed, but QEMU passes no more
// than one change a second on: closed and opened again within that second looks like nothing at all, and the session would wait for ever for
// a process that is gone. So an agent that keeps one waiting is asked whether it is there, and without an answer the session is opened anew.

// execPatience is how long the start of a process may take before its agent is asked.
const execPatience = 5 * time.Second

// checkAgent ends the session with an agent that does not answer although its machine runs; a new one is opened then.
func (ms *Machines) checkAgent(ctx context.Context, e *entry, r *run, agent *host.Client) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	if _, err := agent.Hello(ctx); err == nil || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return
	}
	e.mu.Lock()
	runs := e.run == r && e.m.State == Running // a paused one cannot answer
	e.mu.Unlock()
	if !runs {
		return
	}
	ms.Log.Warn("a machine's agent does not answer; its channel is opened anew", "machine", e.get().ID)
	agent.Close()
}

// expectAnswer has the agent checked unless answered is called soon.
func (ms *Machines) expectAnswer(e *entry, r *run, agent *host.Client) (answered func()) {
	ctx, cancel := context.WithCancel(ms.life)
	ms.workers.Go(func() {
		select {
		case <-time.After(execPatience):
			ms.checkAgent(ctx, e, r, agent)
		case <-ctx.Done():
		}
	})
	return cancel
}
