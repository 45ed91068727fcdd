package user

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// guestConn is a TCP connection with a machine. Unlike gonet's it can be reset, so that a break is not taken for an end.
type guestConn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

func newGuestConn(wq *waiter.Queue, ep tcpip.Endpoint) *guestConn {
	ep.SocketOptions().SetKeepAlive(true)
	idle, interval := tcpip.KeepaliveIdleOption(time.Minute), tcpip.KeepaliveIntervalOption(15*time.Second)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	return &guestConn{gonet.NewTCPConn(wq, ep), ep}
}

func (c *guestConn) abort() {
	c.ep.Abort()
	c.Close()
}

func (s *segment) dialGuest(ctx context.Context, to tcpip.FullAddress) (*guestConn, error) {
	var wq waiter.Queue
	ep, terr := s.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	entry, connected := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr = ep.Connect(to)
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-connected:
			terr = ep.LastError()
		case <-ctx.Done():
			ep.Close()
			return nil, ctx.Err()
		}
	}
	if terr != nil {
		ep.Close()
		return nil, errors.New(terr.String())
	}
	return newGuestConn(&wq, ep), nil
}

// relay carries bytes both ways until both ends have finished; each may finish on its own before the other. When ctx ends or
// one end breaks, both are reset.
func relay(ctx context.Context, guest *guestConn, host *net.TCPConn) {
	reset := sync.OnceFunc(func() {
		guest.abort()
		host.SetLinger(0)
		host.Close()
	})
	defer context.AfterFunc(ctx, reset)()
	defer guest.Close()
	defer host.Close()
	var both sync.WaitGroup
	both.Go(func() {
		if carry(host, guest) != nil {
			reset()
		}
	})
	both.Go(func() {
		if carry(guest, host) != nil {
			reset()
		}
	})
	both.Wait()
}

var buffers = sync.Pool{New: func() any { return new([1 << 17]byte) }}

func carry(to, from interface {
	io.ReadWriter
	CloseWrite() error
}) error {
	buf := buffers.Get().(*[1 << 17]byte)
	defer buffers.Put(buf)
	// The wrappers hide net.TCPConn's ReadFrom and WriteTo, which would copy in small pieces.
	if _, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, buf[:]); err != nil {
		return err
	}
	return to.CloseWrite()
}

// udpIdle is how long a datagram's way back stays open.
const udpIdle = 90 * time.Second

// carryDatagrams passes datagrams from one end on until it is closed or idle.
func carryDatagrams(from net.Conn, send func([]byte) error) {
	buf := buffers.Get().(*[1 << 17]byte)
	defer buffers.Put(buf)
	for {
		from.SetReadDeadline(time.Now().Add(udpIdle))
		n, err := from.Read(buf[:])
		if closed(err) {
			return
		}
		if err == nil {
			send(buf[:n])
		}
	}
}

// closed tells the errors that end a datagram socket from those of a single datagram, such as a port unreachable.
func closed(err error) bool {
	var timeout net.Error
	return errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.As(err, &timeout) && timeout.Timeout()
}
