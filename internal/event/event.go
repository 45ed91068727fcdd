// Package event is the bus that every lifecycle step speaks on: typed events, kept for a while, sent to any number of listeners.
// A slow listener never blocks a publisher: it loses events and is told how many. A leaf; safe for concurrent use.
package event

import (
	"sync"
	"time"
)

// Event is one fact. Type and Action use Docker's words where Docker has them.
type Event struct {
	Seq        uint64
	Time       time.Time
	Type       Type
	Action     string
	ID         string
	Attributes map[string]string
}

// Type is the noun an event is about.
type Type string

const (
	Machine Type = "machine"
	Image   Type = "image"
	Kernel  Type = "kernel"
	Network Type = "network"
	Build   Type = "build"
)

const (
	kept      = 1024 // events a late listener can still ask for
	perReader = 256  // events a listener may lag behind
)

// Bus hands events to listeners. The zero value is not ready: use New.
type Bus struct {
	now func() time.Time

	mu      sync.Mutex // guards the rest
	seq     uint64
	ring    []Event
	readers map[*Reader]struct{}
}

// New returns an empty bus.
func New() *Bus {
	return &Bus{now: time.Now, readers: map[*Reader]struct{}{}}
}

// Publish stamps e with a sequence number and the time and hands it to every listener without waiting for any.
func (b *Bus) Publish(e Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seq++
	e.Seq, e.Time = b.seq, b.now()
	b.ring = append(b.ring, e)
	if len(b.ring) > kept {
		b.ring = b.ring[len(b.ring)-kept:]
	}
	for r := range b.readers {
		r.offer(e)
	}
}

// Reader is one listener.
type Reader struct {
	bus  *Bus
	c    chan Event
	lost uint64 // guarded by bus.mu
}

func (r *Reader) offer(e Event) {
	select {
	case r.c <- e:
	default:
		r.lost++
	}
}

// Listen returns a reader of everything from now on and, when since is not zero, of what is still kept from then on.
func (b *Bus) Listen(since time.Time) (*Reader, []Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &Reader{bus: b, c: make(chan Event, perReader)}
	b.readers[r] = struct{}{}
	if since.IsZero() {
		return r, nil
	}
	var past []Event
	for _, e := range b.ring {
		if !e.Time.Before(since) {
			past = append(past, e)
		}
	}
	return r, past
}

// C delivers the events; it is never closed.
func (r *Reader) C() <-chan Event { return r.c }

// Lost says how many events this reader was too slow for.
func (r *Reader) Lost() uint64 {
	r.bus.mu.Lock()
	defer r.bus.mu.Unlock()
	return r.lost
}

// Close ends the reader.
func (r *Reader) Close() {
	r.bus.mu.Lock()
	defer r.bus.mu.Unlock()
	delete(r.bus.readers, r)
}
