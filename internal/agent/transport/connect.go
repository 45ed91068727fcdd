package transport

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"net"
	"sync"
	"time"
)

var (
	magic = []byte("ATOLL-AGENT-HI.1")
	echo  = []byte("ATOLL-AGENT-OK.1")
)

// Connect opens a session with the agent at the other end of a byte stream, replacing any that the agent has. It waits for the
// agent until ctx ends. Whatever it returns, conn belongs to it from now on.
func Connect(ctx context.Context, conn net.Conn, token Token) (*Session, error) {
	if len(token) != tokenSize {
		conn.Close()
		return nil, fmt.Errorf("greeting the guest's agent: a token of %d bytes", len(token))
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	rest, err := greet(conn, token)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("greeting the guest's agent: %w", err)
	}
	return Client(&hostLink{Conn: conn, rest: rest})
}

// greet sends the hello and returns what came after its answer.
func greet(conn net.Conn, token Token) (rest []byte, err error) {
	var nonce [nonceSize]byte
	rand.Read(nonce[:])
	if _, err := conn.Write(hello(token, nonce)); err != nil {
		return nil, err
	}
	want := append(bytes.Clone(echo), nonce[:]...)
	buf := make([]byte, 64<<10)
	kept := 0
	for stale := 0; stale < staleLimit; {
		n, err := conn.Read(buf[kept:])
		seen := buf[:kept+n]
		if i := bytes.Index(seen, want); i >= 0 {
			return bytes.Clone(seen[i+len(want):]), nil
		}
		if err != nil {
			return nil, err
		}
		stale += n
		kept = copy(buf, seen[max(0, len(seen)-len(want)+1):])
	}
	return nil, errors.New("it sends other data instead of an answer")
}

func hello(token Token, nonce [nonceSize]byte) []byte {
	h := append(bytes.Clone(magic), token...)
	h = append(h, nonce[:]...)
	return binary.BigEndian.AppendUint32(h, crc32.ChecksumIEEE(h[len(magic):]))
}

// hostLink frames what the host writes and first reads what greet read too much.
type hostLink struct {
	net.Conn
	rest []byte // read by the session's one reader

	mu   sync.Mutex // guards what follows
	head []byte     // of a yamux frame whose body comes next
	buf  []byte
}

func (l *hostLink) Read(p []byte) (int, error) {
	if len(l.rest) > 0 {
		n := copy(p, l.rest)
		l.rest = l.rest[n:]
		return n, nil
	}
	return l.Conn.Read(p)
}

func (l *hostLink) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.head) == 0 && hasBody(p) {
		l.head = append(l.head, p...)
		return len(p), nil
	}
	for total := 0; ; {
		l.buf = l.buf[:0]
		n := 0
		for n < len(p) && len(l.buf) < maxWrite {
			m := min(len(p)-n, math.MaxUint16-len(l.head))
			l.buf = binary.BigEndian.AppendUint16(l.buf, uint16(len(l.head)+m))
			l.buf = append(append(append(l.buf, l.head...), p[n:n+m]...), 0)
			l.head = l.head[:0]
			n += m
		}
		if _, err := l.Conn.Write(l.buf); err != nil {
			return total, err
		}
		total += n
		if p = p[n:]; len(p) == 0 {
			return total, nil
		}
	}
}

// maxWrite is about how much goes to the VMM at once. A message of 64 KiB takes more than one length can say.
const maxWrite = 64 << 10

var _ io.ReadWriteCloser = (*hostLink)(nil)
