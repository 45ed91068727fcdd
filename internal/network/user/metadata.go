package user

import (
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/atollvm/atoll/internal/metadata"
)

var metadataAt = netip.AddrPortFrom(metadata.Address, metadata.Port)

// What one machine may take up of the helper that serves its neighbours too.
const (
	maxMetadataConns   = 32
	maxMetadataHeader  = 4 << 10 // and what net/http adds
	metadataHeaderTime = 5 * time.Second
	metadataTime       = 10 * time.Second
	metadataIdle       = 30 * time.Second
)

// metadataServer is one machine's metadata service. Each endpoint has its own, and the switch lets no frame in that does not bear the
// address of the NIC it came from (nic.allowed): so a connection that seems to be this machine's is.
type metadataServer struct {
	service *metadata.Service
	http    *http.Server
	conns   chan net.Conn
	slots   chan struct{} // holds a token for each connection
	closed  chan struct{}
	close   func()
}

var _ net.Listener = (*metadataServer)(nil)

func newMetadataServer() *metadataServer {
	service := metadata.NewService()
	m := &metadataServer{
		service: service,
		http: &http.Server{
			Handler:                      service,
			ReadHeaderTimeout:            metadataHeaderTime,
			ReadTimeout:                  metadataTime,
			WriteTimeout:                 metadataTime,
			IdleTimeout:                  metadataIdle,
			MaxHeaderBytes:               maxMetadataHeader,
			DisableGeneralOptionsHandler: true,
			ErrorLog:                     log.New(io.Discard, "", 0), // else a guest fills the log
		},
		conns:  make(chan net.Conn),
		slots:  make(chan struct{}, maxMetadataConns),
		closed: make(chan struct{}),
	}
	m.close = sync.OnceFunc(func() { close(m.closed) })
	return m
}

// Accept implements net.Listener.
func (m *metadataServer) Accept() (net.Conn, error) {
	select {
	case c := <-m.conns:
		return c, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (m *metadataServer) Close() error { m.close(); return nil }

// Addr implements net.Listener.
func (m *metadataServer) Addr() net.Addr { return net.TCPAddrFromAddrPort(metadataAt) }

// setMetadata needs attaching to be held. Connections and tokens outlive a change of the document.
func (s *segment) setMetadata(ep *endpoint, document json.RawMessage) error {
	m := ep.metadata.Load()
	if len(document) == 0 {
		ep.metadata.Store(nil)
		m.end()
		return nil
	}
	if m != nil {
		return m.service.Set(document)
	}
	m = newMetadataServer()
	if err := m.service.Set(document); err != nil {
		return err
	}
	s.running.Go(func() { m.http.Serve(m) })
	ep.metadata.Store(m)
	return nil
}

func (m *metadataServer) end() {
	if m != nil {
		m.close()
		m.http.Close() // with every connection
	}
}

// accept takes over the machine's connection.
func (m *metadataServer) accept(r *tcp.ForwarderRequest) {
	if m == nil { // it has no such service
		r.Complete(true)
		return
	}
	select {
	case m.slots <- struct{}{}:
	default:
		r.Complete(true)
		return
	}
	free := sync.OnceFunc(func() { <-m.slots })
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(terr != nil)
	if terr != nil {
		free()
		return
	}
	c := &metadataConn{newGuestConn(&wq, ep), free}
	select {
	case m.conns <- c:
	case <-m.closed:
		c.abort()
		free()
	}
}

// metadataConn gives its slot back.
type metadataConn struct {
	*guestConn
	free func()
}

func (c *metadataConn) Close() error {
	defer c.free()
	return c.guestConn.Close()
}
