package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// port is a byte stream that outlives the host's connections to it, as a virtio-serial port does: what one host left in it the
// guest still reads, and what the guest wrote before the next host reads that one.
type port struct {
	toGuest chan []byte
	rest    []byte

	mu   sync.Mutex // guards what follows
	cond *sync.Cond
	out  []byte
	host net.Conn // of the latest attach
}

func newPort() *port {
	p := &port{toGuest: make(chan []byte, 1024)}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *port) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		d, ok := <-p.toGuest
		if !ok {
			return 0, io.EOF
		}
		p.rest = d
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func (p *port) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.out) > 64<<10 {
		p.cond.Wait()
	}
	p.out = append(p.out, b...)
	p.cond.Broadcast()
	return len(b), nil
}

// attach makes a connection to the port. cut, when positive, is after how many bytes the host dies.
func (p *port) attach(cut int) net.Conn {
	host, vmm := net.Pipe()
	p.mu.Lock()
	p.host = vmm
	p.cond.Broadcast()
	p.mu.Unlock()
	go func() {
		buf := make([]byte, 1000)
		seen := 0
		for {
			n, err := vmm.Read(buf)
			d := bytes.Clone(buf[:n])
			if cut > 0 && seen+n >= cut {
				p.toGuest <- d[:cut-seen]
				vmm.Close()
				return
			}
			seen += n
			p.toGuest <- d
			if err != nil {
				return
			}
		}
	}()
	go func() {
		for {
			p.mu.Lock()
			for len(p.out) == 0 && p.host == vmm {
				p.cond.Wait()
			}
			if p.host != vmm {
				p.mu.Unlock()
				return
			}
			d := p.out[:min(len(p.out), 700)]
			p.out = bytes.Clone(p.out[len(d):])
			p.cond.Broadcast()
			p.mu.Unlock()
			if _, err := vmm.Write(d); err != nil {
				return
			}
		}
	}()
	return host
}

// echoes serves sessions whose streams send back what they get.
func echoes(s *Session) {
	go func() {
		for {
			c, err := s.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
}

func roundTrip(t *testing.T, s *Session, data []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := s.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c.Write(data)
		c.Close()
	}()
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("sent %d bytes, got %d back, same: %v, error: %v", len(data), len(got), bytes.Equal(got, data), err)
	}
}

func connect(t *testing.T, c net.Conn, token Token) *Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	s, err := Connect(ctx, c, token)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHostDiesAnywhere(t *testing.T) {
	p := newPort()
	go Serve(p, echoes)
	token := NewToken()
	data := bytes.Repeat([]byte("0123456789abcdef"), 8<<10)
	// In the hello's magic, token, nonce and sum; between frames; in the middle of data.
	for _, cut := range []int{3, 16, 20, 40, 51, 52, 53, 60, 66, 5000, 70001} {
		host := p.attach(cut)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		s, err := Connect(ctx, host, token)
		if err == nil {
			if c, err := s.Open(ctx); err == nil {
				go c.Write(data)
			}
			select {
			case <-s.Done():
			case <-ctx.Done():
			}
			s.Close()
		}
		cancel()
	}
	s := connect(t, p.attach(0), token)
	defer s.Close()
	roundTrip(t, s, data)
}

func TestOnlyTheTokenReplacesASession(t *testing.T) {
	p := newPort()
	sessions := 0
	go Serve(p, func(s *Session) { sessions++; echoes(s) })
	s := connect(t, p.attach(0), NewToken())
	defer s.Close()
	// A user who sends hellos, with another token, through a stream.
	var nonce [nonceSize]byte
	roundTrip(t, s, bytes.Repeat(hello(NewToken(), nonce), 1000))
	// Ends of what is sent that could be the start of a hello are not held back.
	for n := range magic {
		roundTrip(t, s, magic[:n+1])
	}
	if sessions != 1 {
		t.Fatalf("%d sessions, want 1", sessions)
	}
}

func TestUnixSocket(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go Serve(c, echoes)
		}
	}()
	for range 3 {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s := connect(t, c, NewToken())
		roundTrip(t, s, make([]byte, 10<<20))
		s.Close()
	}
}

func TestHostileGuest(t *testing.T) {
	t.Run("never answers", func(t *testing.T) {
		host, guest := net.Pipe()
		go io.Copy(io.Discard, guest)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := Connect(ctx, host, NewToken()); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("sends without end", func(t *testing.T) {
		host, guest := net.Pipe()
		go io.Copy(io.Discard, guest)
		go func() {
			for junk := bytes.Repeat(echo, 4096); ; {
				if _, err := guest.Write(junk); err != nil {
					return
				}
			}
		}()
		if _, err := Connect(t.Context(), host, NewToken()); err == nil || !strings.Contains(err.Error(), "other data") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("opens a stream", func(t *testing.T) {
		host, guest := net.Pipe()
		h, err := Client(host)
		if err != nil {
			t.Fatal(err)
		}
		g, err := Server(guest)
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		go g.Open(t.Context())
		select {
		case <-h.Done():
		case <-time.After(5 * time.Second):
			t.Fatal("the session goes on")
		}
	})
}

func TestMessageLimit(t *testing.T) {
	err := ReadMsg(bytes.NewReader([]byte{0, 0x10, 0, 1}), &agentv1.Output{})
	if err == nil || !strings.Contains(err.Error(), "longer") {
		t.Fatalf("got %v", err)
	}
	if err := ReadMsg(bytes.NewReader([]byte{0, 0, 0, 9, 1}), &agentv1.Output{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("got %v", err)
	}
	if err := WriteMsg(io.Discard, &agentv1.Output{Data: make([]byte, MaxMessage)}); err == nil {
		t.Fatal("a message over the limit was written")
	}
}

// FuzzScanner cuts a stream of junk, hello, data, hello into arbitrary reads: each hello is found once and the data is whole.
func FuzzScanner(f *testing.F) {
	f.Add([]byte("ATOLL-AG"), []byte("data ATOLL-AGENT-HI.1 more"), uint8(3))
	f.Add([]byte{}, bytes.Repeat(magic, 5), uint8(1))
	f.Fuzz(func(t *testing.T, junk, data []byte, step uint8) {
		token := Token("the token of 16b")
		n1, n2 := [nonceSize]byte{1}, [nonceSize]byte{2}
		if bytes.Contains(junk, magic) || bytes.Contains(data, token) {
			t.Skip()
		}
		stream := append(bytes.Clone(junk), hello(token, n1)...)
		stream = append(append(stream, data...), hello(token, n2)...)
		var sc scanner
		var got []byte
		var nonces []byte
		for len(stream) > 0 {
			n := min(int(step)+1, len(stream))
			err := sc.feed(stream[:n], func(p []byte) {
				if len(nonces) > 0 {
					got = append(got, p...)
				}
			}, func(nonce []byte) error {
				nonces = append(nonces, nonce[0])
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			stream = stream[n:]
		}
		if !bytes.Equal(nonces, []byte{1, 2}) || !bytes.Equal(got, data) {
			t.Fatalf("nonces %v, data %q, want %q", nonces, got, data)
		}
	})
}
