package transport

import (
	"encoding/binary"
	"io"
	"sync"
)

// frameHead is the length of a yamux frame's head: version, type, flags (2), stream (4), length (4).
const frameHead = 12

// hasBody tells whether p is the head of a yamux frame whose body comes with the next write. Written apart, the head would cost the
// guest a buffer of the port, an interrupt and a turn of its reader.
func hasBody(p []byte) bool {
	const dataFrame = 0
	return len(p) == frameHead && p[1] == dataFrame && binary.BigEndian.Uint32(p[8:]) > 0
}

// inbox holds what the port has delivered and the session has not read yet. It has one writer and one reader.
type inbox struct {
	mu       sync.Mutex // guards what follows
	changed  *sync.Cond
	buf      []byte
	from, to int // what of buf is held
	closed   bool
}

func newInbox(size int) *inbox {
	b := &inbox{buf: make([]byte, size)}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// put waits until the reader has made room, or has gone: the rest is of no use then.
func (b *inbox) put(p []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.closed && len(p) > 0 {
		if b.to == len(b.buf) {
			b.changed.Wait()
			continue
		}
		n := copy(b.buf[b.to:], p)
		b.to += n
		p = p[n:]
		b.changed.Broadcast()
	}
}

func (b *inbox) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.closed && b.from == b.to {
		b.changed.Wait()
	}
	if b.closed {
		return 0, io.ErrClosedPipe
	}
	n := copy(p, b.buf[b.from:b.to])
	b.from += n
	if b.from == b.to {
		b.from, b.to = 0, 0
		b.changed.Broadcast()
	}
	return n, nil
}

func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.changed.Broadcast()
}
