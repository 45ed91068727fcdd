package guest

import (
	"bytes"
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// ringSize is how much output is kept for a host that is away, in bytes.
const ringSize = 4 << 20

// ring keeps the entrypoint's output until the host has acknowledged it. While a host reads, a full ring holds up who writes; while
// none does, the oldest is dropped.
type ring struct {
	size int

	mu      sync.Mutex // guards what follows
	changed *sync.Cond
	records []*agentv1.Output
	bytes   int
	seq     uint64
	readers int
}

func newRing(size int) *ring {
	r := &ring{size: size}
	r.changed = sync.NewCond(&r.mu)
	return r
}

// recordCost is what a record takes beside its data.
const recordCost = 128

func cost(o *agentv1.Output) int { return len(o.GetData()) + recordCost }

// add appends a copy of data as a record.
func (r *ring) add(stream agentv1.Stream, data []byte) {
	r.append(&agentv1.Output{Stream: stream, Data: bytes.Clone(data)})
}

// end appends the end of the output.
func (r *ring) end() { r.append(&agentv1.Output{Eof: true}) }

func (r *ring) append(o *agentv1.Output) {
	o.UnixNanos = time.Now().UnixNano()
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.bytes > 0 && r.bytes+cost(o) > r.size {
		if r.readers > 0 {
			r.changed.Wait()
		} else {
			r.dropLocked(1)
		}
	}
	r.seq++
	o.Seq = r.seq
	r.records = append(r.records, o)
	r.bytes += cost(o)
	r.changed.Broadcast()
}

func (r *ring) dropLocked(n int) {
	for i, o := range r.records[:n] {
		r.bytes -= cost(o)
		r.records[i] = nil
	}
	r.records = r.records[n:]
}

// forget drops what the host has, up to and with seq.
func (r *ring) forget(seq uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for n < len(r.records) && r.records[n].GetSeq() <= seq {
		n++
	}
	r.dropLocked(n)
	r.changed.Broadcast()
}

// ringReader is a host that reads.
type ringReader struct {
	ring  *ring
	after uint64 // used by next's one caller
	gone  bool   // guarded by ring.mu
}

func (r *ring) attach(after uint64) *ringReader {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readers++
	return &ringReader{ring: r, after: after}
}

// detach may be called more than once.
func (d *ringReader) detach() {
	d.ring.mu.Lock()
	defer d.ring.mu.Unlock()
	if !d.gone {
		d.gone = true
		d.ring.readers--
		d.ring.changed.Broadcast()
	}
}

// next waits for the next record; nil: detached.
func (d *ringReader) next() *agentv1.Output {
	r := d.ring
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if d.gone {
			return nil
		}
		if n := len(r.records); n > 0 && r.records[n-1].GetSeq() > d.after {
			// Numbers rise by one, so the place of a record follows from the first one's.
			i := 0
			if first := r.records[0].GetSeq(); d.after >= first {
				i = int(d.after - first + 1)
			}
			d.after = r.records[i].GetSeq()
			return r.records[i]
		}
		r.changed.Wait()
	}
}
