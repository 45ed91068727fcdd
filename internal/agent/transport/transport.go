// Package transport turns the byte stream between host and guest into a session of multiplexed streams, both ends, and
// frames the agent protocol's messages on them.
//
// A virtio-serial port is one endless byte stream that outlives the host's process: when the daemon dies in mid-frame and
// another one connects, both ends must drop the old session. So the host opens with a hello,
//
//	magic (16) || token (16) || nonce (16) || crc32 of token and nonce (4)
//
// which the agent looks for in everything it reads. It drops the session it has and answers echo (16) || nonce (16); the host
// discards all it reads until that answer. The token is the machine's secret, chosen and kept by the daemon before it first
// connects. The agent takes it from the first hello; from then on only magic and token together are a hello, so nothing that
// a user sends through a stream can be one. The same hello serves first and later connections alike.
//
// From host to guest the session's bytes travel as length (2) || data || 0. No magic or token contains a zero: the agent may
// hold back bytes that could be the start of a hello, and never holds back the end of what was sent.
//
// A leaf, imported by both ends of the agent protocol. Sessions may be used from several goroutines.
package transport

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"
)

// Token authorises a hello to replace a session. The daemon makes one per machine and keeps it before the first Connect.
type Token []byte

const (
	tokenSize = 16
	nonceSize = 16
	// staleLimit bounds what the host discards before the agent's answer: what the guest's kernel, the VMM and sockets can hold.
	staleLimit = 16 << 20
)

// NewToken returns a random token.
func NewToken() Token {
	t := make(Token, tokenSize)
	rand.Read(t)
	for i, b := range t {
		if b == 0 {
			t[i] = 1 // see the package comment
		}
	}
	return t
}

// Session is a set of streams over one connection. The host opens them, the agent accepts them.
type Session struct{ mux *yamux.Session }

// Open opens a stream.
func (s *Session) Open(ctx context.Context) (net.Conn, error) {
	type opened struct {
		stream *yamux.Stream
		err    error
	}
	done := make(chan opened, 1)
	go func() {
		stream, err := s.mux.OpenStream()
		done <- opened{stream, err}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, o.err
		}
		return o.stream, nil
	case <-ctx.Done():
		go func() {
			if o := <-done; o.err == nil {
				o.stream.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// Accept waits for the next stream.
func (s *Session) Accept() (net.Conn, error) {
	stream, err := s.mux.AcceptStream()
	if err != nil {
		return nil, err
	}
	return stream, nil
}

// Done is closed when the session has ended, by either end or by a fault of the stream.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Close ends the session and all its streams.
func (s *Session) Close() error { return s.mux.Close() }

// Client starts the host's end of a session on a connection that belongs to it alone, as vsock gives one.
func Client(conn io.ReadWriteCloser) (*Session, error) {
	mux, err := yamux.Client(conn, config())
	if err != nil {
		return nil, err
	}
	s := &Session{mux}
	go func() {
		// The guest never opens streams. One that does has broken the protocol and could fill memory.
		if _, err := mux.AcceptStream(); err == nil {
			mux.Close()
		}
	}()
	return s, nil
}

// Server starts the agent's end on such a connection.
func Server(conn io.ReadWriteCloser) (*Session, error) {
	mux, err := yamux.Server(conn, config())
	if err != nil {
		return nil, err
	}
	return &Session{mux}, nil
}

func config() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog: 256,
		// No keep-alive and no short timeouts: a paused or restored machine is silent for any length of time.
		EnableKeepAlive:        false,
		KeepAliveInterval:      time.Hour,
		ConnectionWriteTimeout: 24 * time.Hour,
		StreamOpenTimeout:      0,
		StreamCloseTimeout:     time.Minute,
		MaxStreamWindowSize:    4 << 20,
		LogOutput:              io.Discard,
	}
}
