package networktest

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/atollvm/atoll/internal/network"
)

// Wire is a bare network card: what a VMM has of an attachment.
type Wire struct {
	conn *net.UnixConn
	peer *net.UnixAddr
}

// Plug binds the VMM's socket until the test ends.
func Plug(t testing.TB, a network.Attachment) *Wire {
	t.Helper()
	os.Remove(a.Local)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: a.Local, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &Wire{conn, &net.UnixAddr{Name: a.Remote, Net: "unixgram"}}
}

// Send sends one frame; while the network's helper is away, it is lost.
func (w *Wire) Send(frame []byte) { w.conn.WriteToUnix(frame, w.peer) }

// Receive returns the first frame that matches, or nil after a while.
func (w *Wire) Receive(within time.Duration, match func(frame []byte) bool) []byte {
	w.conn.SetReadDeadline(time.Now().Add(within))
	defer w.conn.SetReadDeadline(time.Time{})
	buf := make([]byte, 1<<16)
	for {
		n, err := w.conn.Read(buf)
		if err != nil {
			return nil
		}
		if match(buf[:n]) {
			return buf[:n]
		}
	}
}

// Guest is a machine's TCP/IP on a Wire.
type Guest struct {
	network.Endpoint
	stack *stack.Stack
}

const guestNIC = 1

// Boot runs a guest with the endpoint's address until the test ends.
func Boot(t testing.TB, n network.Network, e network.Endpoint, a network.Attachment) *Guest {
	t.Helper()
	w := Plug(t, a)
	ch := channel.New(1024, uint32(n.MTU), tcpip.LinkAddress(mustMAC(t, e.MAC)))
	g := &Guest{e, stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})}
	if terr := g.stack.CreateNIC(guestNIC, ethernet.New(ch)); terr != nil {
		t.Fatal(terr)
	}
	if terr := g.stack.AddProtocolAddress(guestNIC, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(e.Address.As4()), PrefixLen: n.Subnet.Bits()},
	}, stack.AddressProperties{}); terr != nil {
		t.Fatal(terr)
	}
	subnet := tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(n.Subnet.Addr().As4()), PrefixLen: n.Subnet.Bits()}
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: subnet.Subnet(), NIC: guestNIC},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFrom4(n.Gateway.As4()), NIC: guestNIC},
	})
	sack := tcpip.TCPSACKEnabled(true)
	g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	go func() {
		for {
			pkt := ch.ReadContext(t.Context())
			if pkt == nil {
				return
			}
			v := pkt.ToView()
			w.Send(v.AsSlice())
			v.Release()
			pkt.DecRef()
		}
	}()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			size, err := w.conn.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || size < header.EthernetMinimumSize {
				continue
			}
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(buf[:size])})
			ch.InjectInbound(0, pkt)
			pkt.DecRef()
		}
	}()
	t.Cleanup(func() { ch.Close(); g.stack.Close() })
	return g
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: guestNIC, Addr: tcpip.AddrFrom4(a.Addr().As4()), Port: a.Port()}
}

// Dial opens a connection from within the guest; network is tcp or udp.
func (g *Guest) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	to := full(a)
	if network == "udp" {
		return gonet.DialUDP(g.stack, nil, &to, ipv4.ProtocolNumber)
	}
	return gonet.DialContextTCP(ctx, g.stack, to, ipv4.ProtocolNumber)
}

// Listen accepts TCP connections in the guest.
func (g *Guest) Listen(t testing.TB, port uint16) net.Listener {
	t.Helper()
	l, err := gonet.ListenTCP(g.stack, full(netip.AddrPortFrom(g.Address, port)), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// ListenPacket receives datagrams in the guest.
func (g *Guest) ListenPacket(t testing.TB, port uint16) net.PacketConn {
	t.Helper()
	at := full(netip.AddrPortFrom(g.Address, port))
	c, err := gonet.DialUDP(g.stack, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func mustMAC(t testing.TB, s string) net.HardwareAddr {
	t.Helper()
	mac, err := net.ParseMAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

func ethernetFrame(to, from net.HardwareAddr, protocol tcpip.NetworkProtocolNumber, payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize, header.EthernetMinimumSize+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: tcpip.LinkAddress(from), DstAddr: tcpip.LinkAddress(to), Type: protocol})
	return append(frame, payload...)
}

func arpRequest(mac net.HardwareAddr, from, who netip.Addr) []byte {
	a := header.ARP(make([]byte, header.ARPSize))
	a.SetIPv4OverEthernet()
	a.SetOp(header.ARPRequest)
	copy(a.HardwareAddressSender(), mac)
	copy(a.ProtocolAddressSender(), from.AsSlice())
	copy(a.ProtocolAddressTarget(), who.AsSlice())
	return ethernetFrame(broadcast, mac, header.ARPProtocolNumber, a)
}

func ipPacket(protocol tcpip.TransportProtocolNumber, from, to netip.Addr, payload []byte) []byte {
	ip := header.IPv4(make([]byte, header.IPv4MinimumSize))
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip) + len(payload)), TTL: 64, Protocol: uint8(protocol),
		SrcAddr: tcpip.AddrFrom4(from.As4()), DstAddr: tcpip.AddrFrom4(to.As4()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	return append(ip, payload...)
}

func echoRequest(from, to netip.Addr) []byte {
	e := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize+32))
	e.SetType(header.ICMPv4Echo)
	e.SetIdent(7)
	e.SetChecksum(^checksum.Checksum(e, 0))
	return ipPacket(header.ICMPv4ProtocolNumber, from, to, e)
}

func datagram(from, to netip.AddrPort, payload []byte) []byte {
	u := make([]byte, header.UDPMinimumSize) // checksum 0: none
	binary.BigEndian.PutUint16(u[0:], from.Port())
	binary.BigEndian.PutUint16(u[2:], to.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)+len(payload)))
	return ipPacket(header.UDPProtocolNumber, from.Addr(), to.Addr(), append(u, payload...))
}

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
