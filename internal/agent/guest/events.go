package guest

import (
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// events is the few things that happen to a machine, kept for whoever watches next. Its zero value is ready.
type events struct {
	mu       sync.Mutex // guards what follows
	all      []*agentv1.Event
	acked    uint64
	watchers int
	notify   chan struct{} // closed at the next change; nil when nobody waits
}

func (e *events) changedLocked() {
	if e.notify != nil {
		close(e.notify)
		e.notify = nil
	}
}

func (e *events) waitLocked() <-chan struct{} {
	if e.notify == nil {
		e.notify = make(chan struct{})
	}
	return e.notify
}

// add records an event and returns its number.
func (e *events) add(ev *agentv1.Event) uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	ev.Seq = uint64(len(e.all) + 1)
	e.all = append(e.all, ev)
	e.changedLocked()
	return ev.Seq
}

func (e *events) last() *agentv1.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.all) == 0 {
		return nil
	}
	return e.all[len(e.all)-1]
}

// after returns the events after a number, and a channel that is closed when there may be more.
func (e *events) after(seq uint64) ([]*agentv1.Event, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.all[min(seq, uint64(len(e.all))):], e.waitLocked()
}

func (e *events) ack(seq uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.acked = max(e.acked, min(seq, uint64(len(e.all))))
	e.changedLocked()
}

func (e *events) watching(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.watchers += n
	e.changedLocked()
}

// waitAck waits until a host has acknowledged the event, however long none watches. patience bounds it while one does watch;
// zero: for ever.
func (e *events) waitAck(seq uint64, patience time.Duration) {
	for {
		e.mu.Lock()
		done, watched, changed := e.acked >= seq, e.watchers > 0, e.waitLocked()
		e.mu.Unlock()
		if done {
			return
		}
		var timeout <-chan time.Time
		if watched && patience > 0 {
			timeout = time.After(patience)
		}
		select {
		case <-changed:
		case <-timeout:
			return
		}
	}
}

func (e *events) watched() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.watchers > 0
}
