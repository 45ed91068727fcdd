package transport

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"sync"
	"sync/atomic"
)

// maxChunk is the most that goes to the port between two checks for a newer session, and what its driver takes at once.
const maxChunk = 32 << 10

// Serve answers hellos on a port until reading it fails, and hands each new session to accept, which must not block. The
// session before it has ended by then. A port that reports the end of the file has no host: Serve reads on, so such a port's
// Read must wait for the next host.
func Serve(port io.ReadWriter, accept func(*Session)) error {
	s := &server{port: port, accept: accept}
	buf := make([]byte, 64<<10)
	var sc scanner
	for {
		n, err := port.Read(buf)
		if ferr := sc.feed(buf[:n], s.data, s.reset); ferr != nil {
			return ferr
		}
		if err != nil {
			if s.link != nil {
				s.link.kill()
			}
			return err
		}
	}
}

type server struct {
	port   io.ReadWriter
	accept func(*Session)
	link   *guestLink // of the current session, or nil; used by Serve's goroutine only
	write  sync.Mutex // one writer on the port
}

func (s *server) data(p []byte) {
	if s.link != nil {
		s.link.deliver(p)
	}
}

func (s *server) reset(nonce []byte) error {
	if s.link != nil {
		s.link.kill()
	}
	// A chunk of the old session may be on its way: it ends because the new host discards what it reads.
	s.write.Lock()
	_, err := s.port.Write(append(bytes.Clone(echo), nonce...))
	s.write.Unlock()
	if err != nil {
		return err
	}
	s.link = &guestLink{server: s, in: newInbox(64 << 10)}
	session, err := Server(s.link)
	if err != nil {
		return err
	}
	s.accept(session)
	return nil
}

// guestLink is one session's view of the port.
type guestLink struct {
	server *server
	in     *inbox
	dead   atomic.Bool

	out []byte // the head of a frame that waits for its body; used by the session's one writer

	// deframing, used by Serve's goroutine only
	head []byte
	left int // data and the closing zero
}

func (l *guestLink) Read(p []byte) (int, error) { return l.in.Read(p) }

func (l *guestLink) Write(p []byte) (int, error) {
	if len(l.out) == 0 && hasBody(p) {
		l.out = append(l.out, p...)
		return len(p), nil
	}
	total := 0
	for len(p) > 0 {
		n := min(len(p), maxChunk-len(l.out))
		chunk := p[:n]
		if len(l.out) > 0 {
			chunk = append(l.out, chunk...)
			l.out = chunk[:0]
		}
		if err := l.writeChunk(chunk); err != nil {
			return total, err
		}
		total += n
		p = p[n:]
	}
	return total, nil
}

func (l *guestLink) writeChunk(p []byte) error {
	l.server.write.Lock()
	defer l.server.write.Unlock()
	if l.dead.Load() {
		return io.ErrClosedPipe
	}
	_, err := l.server.port.Write(p)
	return err
}

func (l *guestLink) Close() error {
	l.kill()
	return nil
}

func (l *guestLink) kill() {
	l.dead.Store(true)
	l.in.close()
}

// deliver takes the framing off and passes the data to the session. Bad framing ends the session.
func (l *guestLink) deliver(p []byte) {
	for len(p) > 0 {
		if l.left == 0 {
			n := min(len(p), 2-len(l.head))
			l.head = append(l.head, p[:n]...)
			p = p[n:]
			if len(l.head) == 2 {
				l.left = int(binary.BigEndian.Uint16(l.head)) + 1
				l.head = l.head[:0]
			}
			continue
		}
		if n := min(len(p), l.left-1); n > 0 {
			l.in.put(p[:n])
			l.left -= n
			p = p[n:]
			continue
		}
		if p[0] != 0 {
			l.kill()
		}
		l.left = 0
		p = p[1:]
	}
}

// scanner finds hellos in the host's bytes.
type scanner struct {
	known      []byte     // magic and token, once there was a hello
	held       []byte     // read and not yet passed on
	collecting bool       // held begins with a whole pattern
	skip       *[256]byte // see index; of known, or of the magic
	lost       bool       // the host broke off a hello: it has given up the session, nothing more is data
}

// feed passes on what is not part of a hello, in order, and reports each hello's nonce between. Both callbacks may keep nothing.
func (s *scanner) feed(p []byte, data func([]byte), reset func(nonce []byte) error) error {
	buf := p
	if len(s.held) > 0 {
		buf = append(s.held, p...)
	}
	for {
		pattern := s.pattern()
		if !s.collecting {
			i := s.index(buf, pattern)
			if i < 0 {
				keep := overlap(buf, pattern)
				if !s.lost {
					data(buf[:len(buf)-keep])
				}
				buf = buf[len(buf)-keep:]
				break
			}
			if !s.lost {
				data(buf[:i])
			}
			buf = buf[i:]
			s.collecting = true
		}
		const size = 16 + tokenSize + nonceSize + 4
		if len(buf) < size {
			break
		}
		s.collecting = false
		body := buf[len(magic) : size-4]
		if crc32.ChecksumIEEE(body) != binary.BigEndian.Uint32(buf[size-4:]) {
			// A host that died in the middle of its hello: the next hello may begin anywhere in what was collected.
			s.lost = true
			buf = buf[1:]
			continue
		}
		s.lost = false
		s.known, s.skip = append(bytes.Clone(magic), body[:tokenSize]...), nil
		if err := reset(body[tokenSize:]); err != nil {
			return err
		}
		buf = buf[size:]
	}
	s.held = append(s.held[:0], buf...)
	return nil
}

// index is bytes.Index by Horspool's rule, which looks at one byte in thirty. An emulated CPU has no fast way to look at them all.
func (s *scanner) index(buf, pattern []byte) int {
	last := len(pattern) - 1
	if s.skip == nil {
		s.skip = &[256]byte{}
		for i := range s.skip {
			s.skip[i] = byte(len(pattern))
		}
		for i, c := range pattern[:last] {
			s.skip[c] = byte(last - i)
		}
	}
	for end := last; end < len(buf); {
		c := buf[end]
		if c == pattern[last] && bytes.Equal(buf[end-last:end+1], pattern) {
			return end - last
		}
		end += int(s.skip[c])
	}
	return -1
}

func (s *scanner) pattern() []byte {
	if s.known != nil {
		return s.known
	}
	return magic
}

// overlap is the length of the longest end of p that is a true beginning of pattern.
func overlap(p, pattern []byte) int {
	for n := min(len(p), len(pattern)-1); n > 0; n-- {
		if bytes.HasPrefix(pattern, p[len(p)-n:]) {
			return n
		}
	}
	return 0
}
