package user

import (
	"errors"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const dhcpPort = 67

// serveDHCP answers machines with the leases of their endpoints; it has none of its own to give.
func (s *segment) serveDHCP() error {
	var wq waiter.Queue
	ep, terr := s.stack.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		return errors.New(terr.String())
	}
	ep.SocketOptions().SetBroadcast(true)
	if terr := ep.Bind(tcpip.FullAddress{NIC: nicID, Port: dhcpPort}); terr != nil {
		ep.Close()
		return errors.New(terr.String())
	}
	conn := gonet.NewUDPConn(&wq, ep)
	s.running.Go(func() {
		<-s.ctx.Done()
		conn.Close()
	})
	s.running.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				if s.ctx.Err() != nil {
					return
				}
				continue
			}
			request, err := dhcpv4.FromBytes(buf[:n])
			if err != nil {
				continue
			}
			reply := s.answerDHCP(request)
			if reply == nil {
				continue
			}
			to := from.(*net.UDPAddr)
			if to.IP.IsUnspecified() {
				to.IP = net.IPv4bcast
			}
			conn.WriteTo(reply.ToBytes(), to)
		}
	})
	return nil
}

// answerDHCP returns nil where silence is the answer.
func (s *segment) answerDHCP(request *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	ep := s.find(func(ep *endpoint) bool { return string(ep.nic.mac) == string(request.ClientHWAddr) })
	if ep == nil {
		return nil
	}
	gateway := net.IP(s.network.Gateway.AsSlice())
	reply, err := dhcpv4.NewReplyFromRequest(request, dhcpv4.WithServerIP(gateway), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(gateway)))
	if err != nil {
		return nil
	}
	lease := net.IP(ep.Address.AsSlice())
	switch request.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeOffer))
	case dhcpv4.MessageTypeRequest:
		wanted := request.RequestedIPAddress()
		if wanted == nil {
			wanted = request.ClientIPAddr
		}
		if !wanted.Equal(lease) {
			reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeNak))
			return reply
		}
		reply.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeAck))
	default:
		return nil
	}
	reply.YourIPAddr = lease
	for _, option := range []dhcpv4.Option{
		dhcpv4.OptIPAddressLeaseTime(24 * time.Hour),
		dhcpv4.OptSubnetMask(net.CIDRMask(s.network.Subnet.Bits(), 32)),
		dhcpv4.OptRouter(gateway),
		dhcpv4.OptDNS(gateway),
		dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: []string{zone}}),
		{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(s.network.MTU)},
	} {
		reply.UpdateOption(option)
	}
	return reply
}
