package user

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	dialTimeout = 30 * time.Second
	maxUDPFlows = 1024 // of one network; each holds two buffers
)

// outbound says whether machines may reach the address through the host. They may not reach what only the host itself
// should: its loopback, its link and cloud metadata there. 0.0.0.0 is the loopback by another name.
func (s *segment) outbound(a netip.Addr) bool {
	b := a.As4()
	return !(b[0] == 0 || b[0] >= 240 || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || s.network.Subnet.Contains(a))
}

// flow finds who asks and where to, and whether it may.
func (s *segment) flow(id stack.TransportEndpointID) (from *endpoint, to netip.AddrPort, ok bool) {
	source := netip.AddrFrom4(id.RemoteAddress.As4())
	from = s.find(func(ep *endpoint) bool { return ep.Address == source })
	to = netip.AddrPortFrom(netip.AddrFrom4(id.LocalAddress.As4()), id.LocalPort)
	return from, to, from != nil && s.outbound(to.Addr())
}

// natTCP answers a machine's connection with one of the host's. It runs in a goroutine of its own.
func (s *segment) natTCP(r *tcp.ForwarderRequest) {
	from, to, ok := s.flow(r.ID())
	if from != nil && to == metadataAt {
		from.metadata.Load().accept(r)
		return
	}
	if !ok {
		r.Complete(true)
		return
	}
	ctx, cancel := context.WithTimeout(from.ctx, dialTimeout)
	defer cancel()
	host, err := new(net.Dialer).DialContext(ctx, "tcp4", to.String())
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(terr != nil)
	if terr != nil {
		host.Close()
		return
	}
	relay(from.ctx, newGuestConn(&wq, ep), host.(*net.TCPConn))
}

func (s *segment) natUDP(r *udp.ForwarderRequest) {
	from, to, ok := s.flow(r.ID())
	if !ok {
		return
	}
	if s.udpFlows.Add(1) > maxUDPFlows {
		s.udpFlows.Add(-1)
		return
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	if terr != nil {
		s.udpFlows.Add(-1)
		return
	}
	guest := gonet.NewUDPConn(&wq, ep)
	host, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		guest.Close()
		s.udpFlows.Add(-1)
		return
	}
	s.running.Go(func() {
		defer s.udpFlows.Add(-1)
		relayDatagrams(from.ctx, guest, host)
	})
}

// relayDatagrams carries both ways until one of them has been idle for long.
func relayDatagrams(ctx context.Context, a, b net.Conn) {
	end := sync.OnceFunc(func() {
		a.Close()
		b.Close()
	})
	defer context.AfterFunc(ctx, end)()
	defer end()
	var back sync.WaitGroup
	back.Go(func() {
		carryDatagrams(b, func(p []byte) error {
			a.SetReadDeadline(time.Now().Add(udpIdle))
			_, err := a.Write(p)
			return err
		})
		end()
	})
	carryDatagrams(a, func(p []byte) error {
		b.SetReadDeadline(time.Now().Add(udpIdle))
		_, err := b.Write(p)
		return err
	})
	end()
	back.Wait()
}

func fullAddress(a netip.Addr, port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: stackAddr(a), Port: port}
}
