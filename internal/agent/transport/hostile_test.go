package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// guestBytes is a session with a guest that answers the host's hello and then writes these bytes as they are, below yamux.
func guestBytes(t *testing.T, ctx context.Context, write func(io.Writer)) (*Session, error) {
	h, g := net.Pipe()
	t.Cleanup(func() { g.Close() })
	go func() {
		hello := make([]byte, 16+tokenSize+nonceSize+4)
		if _, err := io.ReadFull(g, hello); err != nil {
			return
		}
		go io.Copy(io.Discard, g)
		g.Write(append(bytes.Clone(echo), hello[16+tokenSize:16+tokenSize+nonceSize]...))
		write(g)
	}()
	return Connect(ctx, h, NewToken())
}

func mux(kind, flags byte, stream byte, length uint32) []byte {
	return []byte{0, kind, 0, flags, 0, 0, 0, stream, byte(length >> 24), byte(length >> 16), byte(length >> 8), byte(length)}
}

// TestHostileFrames: whatever a guest does below the messages, the host's session ends or stays silent, its memory is bounded and no goroutine
// stays once it is closed.
func TestHostileFrames(t *testing.T) {
	const syn, data, window, ping = 1, 0, 1, 2
	before := runtime.NumGoroutine()
	for name, tc := range map[string]struct {
		write func(io.Writer)
		ends  bool // the session, by itself
	}{
		"silence":           {func(io.Writer) {}, false},
		"garbage":           {func(w io.Writer) { w.Write(bytes.Repeat([]byte{0xff}, 4096)) }, true},
		"opens a stream":    {func(w io.Writer) { w.Write(mux(window, syn, 2, 0)) }, true},
		"opens thousands":   {func(w io.Writer) { w.Write(bytes.Repeat(mux(window, syn, 2, 0), 5000)) }, true},
		"frame of 4 GiB":    {func(w io.Writer) { w.Write(mux(data, 0, 1, 1<<32-1)); w.Write(make([]byte, 1<<20)) }, true},
		"unknown stream":    {func(w io.Writer) { w.Write(mux(data, 0, 9, 10)); w.Write(make([]byte, 10)) }, false},
		"closes in a frame": {func(w io.Writer) { w.Write(mux(data, 0, 1, 100)[:7]); w.(net.Conn).Close() }, true},
		"pings for ever": {func(w io.Writer) {
			for range 20000 {
				if _, err := w.Write(mux(ping, syn, 0, 7)); err != nil {
					return
				}
			}
		}, false},
		"byte by byte": {func(w io.Writer) {
			for _, b := range mux(data, 0, 9, 0) {
				w.Write([]byte{b})
				time.Sleep(time.Millisecond)
			}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := guestBytes(t, t.Context(), tc.write)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if stream, err := s.Open(ctx); err == nil {
				stream.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				if err := ReadMsg(stream, &agentv1.HelloReply{}); err == nil {
					t.Error("a message from nothing")
				}
			}
			if tc.ends {
				select {
				case <-s.Done():
				case <-time.After(5 * time.Second):
					t.Error("the session goes on")
				}
			}
			closed := make(chan error, 1)
			go func() { closed <- s.Close() }()
			select {
			case <-closed:
			case <-time.After(5 * time.Second):
				t.Error("closing hangs")
			}
		})
	}
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before+2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
	}
}

func TestGuestThatNeverAnswersTheHello(t *testing.T) {
	h, g := net.Pipe()
	defer g.Close()
	go io.Copy(io.Discard, g)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Connect(ctx, h, NewToken()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// FuzzMux gives the host's end of a session any bytes: it may end the session, and does nothing else.
func FuzzMux(f *testing.F) {
	f.Add(mux(0, 0, 1, 1<<32-1))
	f.Add(mux(1, 1, 2, 0))
	f.Add(append(mux(0, 0, 1, 6), 0, 0, 0, 2, 8, 2))
	f.Add(mux(2, 1, 0, 3))
	f.Add(mux(3, 0, 0, 2))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, g := net.Pipe()
		defer g.Close()
		s, err := Client(h)
		if err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, g)
		stream, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			g.Write(b)
			g.Close()
		}()
		stream.SetReadDeadline(time.Now().Add(10 * time.Second))
		_ = ReadMsg(stream, &agentv1.HelloReply{})
		select {
		case <-s.Done():
		case <-time.After(10 * time.Second):
			t.Error("the session outlives its connection")
		}
		s.Close()
	})
}
