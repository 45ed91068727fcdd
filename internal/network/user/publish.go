package user

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
)

func withDefaults(m network.PortMapping) network.PortMapping {
	if !m.HostAddress.IsValid() {
		m.HostAddress = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if m.Protocol == "" {
		m.Protocol = "tcp"
	}
	return m
}

// publish binds the mapping's port for the endpoint and returns it with the port that it got.
func (s *segment) publish(ep *endpoint, m network.PortMapping) (network.PortMapping, error) {
	m = withDefaults(m)
	host := netip.AddrPortFrom(m.HostAddress, m.HostPort)
	family := "4"
	if m.HostAddress.Is6() {
		family = "6"
	}
	switch m.Protocol {
	case "tcp":
		l, err := net.ListenTCP("tcp"+family, net.TCPAddrFromAddrPort(host))
		if err != nil {
			return m, s.bindError(m, err)
		}
		ep.published = append(ep.published, l)
		m.HostPort = uint16(l.Addr().(*net.TCPAddr).Port)
		s.running.Go(func() { s.acceptTCP(ep, l, m.GuestPort) })
	case "udp":
		c, err := net.ListenUDP("udp"+family, net.UDPAddrFromAddrPort(host))
		if err != nil {
			return m, s.bindError(m, err)
		}
		ep.published = append(ep.published, c)
		m.HostPort = uint16(c.LocalAddr().(*net.UDPAddr).Port)
		askForDestination(c)
		s.running.Go(func() { s.acceptUDP(ep, c, m.GuestPort) })
	default:
		return m, fmt.Errorf("protocol %q: %w", m.Protocol, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

func (s *segment) bindError(m network.PortMapping, err error) error {
	at := netip.AddrPortFrom(m.HostAddress, m.HostPort)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		err = fmt.Errorf("port %d/%s on %s is taken%s: %w", m.HostPort, m.Protocol, m.HostAddress, s.owner(m), errdefs.ErrAlreadyExists)
		return hint.With(err, "publish another host port, or let one be chosen: -p %d", m.GuestPort)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		err = fmt.Errorf("%s is no address of this host: %w", m.HostAddress, errdefs.ErrFailedPrecondition)
		return hint.With(err, "see the host's addresses: ip -brief address")
	case errors.Is(err, syscall.EACCES):
		err = fmt.Errorf("binding %s/%s: ports below 1024 need root: %w", at, m.Protocol, errdefs.ErrPermissionDenied)
		return hint.With(err, "publish a port from 1024 on, or allow it for all: sudo sysctl net.ipv4.ip_unprivileged_port_start=%d", m.HostPort)
	}
	return fmt.Errorf("binding %s/%s: %w", at, m.Protocol, err)
}

func (s *segment) acceptTCP(ep *endpoint, l *net.TCPListener, port uint16) {
	for {
		host, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of files, most likely: some will be freed
			s.log.Warn("accepting on a published port failed", "port", l.Addr(), "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ep.ctx.Done():
			}
			continue
		}
		s.running.Go(func() {
			ctx, cancel := context.WithTimeout(ep.ctx, dialTimeout)
			defer cancel()
			guest, err := s.dialGuest(ctx, fullAddress(ep.Address, port))
			if err != nil {
				host.SetLinger(0)
				host.Close()
				return
			}
			relay(ep.ctx, guest, host)
		})
	}
}

// askForDestination makes a datagram come with the host's address that it was sent to: the answer has to leave from there.
func askForDestination(c *net.UDPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
}

// acceptUDP keeps one socket towards the machine for each client, so that answers find their way.
func (s *segment) acceptUDP(ep *endpoint, host *net.UDPConn, port uint16) {
	var mu sync.Mutex // guards clients
	clients := map[netip.AddrPort]net.Conn{}
	to := fullAddress(ep.Address, port)
	buf, oob := make([]byte, maxFrame), make([]byte, 128)
	for {
		n, oobn, _, client, err := host.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		mu.Lock()
		guest := clients[client]
		full := len(clients) >= maxUDPFlows
		mu.Unlock()
		if guest == nil {
			if full {
				continue
			}
			if guest, err = gonet.DialUDP(s.stack, nil, &to, ipv4.ProtocolNumber); err != nil {
				s.log.Warn("reaching a published port failed", "machine", ep.ID, "error", err)
				continue
			}
			mu.Lock()
			clients[client] = guest
			mu.Unlock()
			control := replyFrom(oob[:oobn])
			s.running.Go(func() {
				defer context.AfterFunc(ep.ctx, func() { guest.Close() })()
				carryDatagrams(guest, func(p []byte) error {
					_, _, err := host.WriteMsgUDPAddrPort(p, control, client)
					return err
				})
				mu.Lock()
				delete(clients, client)
				mu.Unlock()
				guest.Close()
			})
		}
		guest.SetReadDeadline(time.Now().Add(udpIdle))
		guest.Write(buf[:n])
	}
}

// replyFrom turns the control message of a datagram into one that sends the answer from the address that it came to.
func replyFrom(oob []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[4:8])})
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])})
		}
	}
	return nil
}
