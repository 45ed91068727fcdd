package user

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/metadata"
	"github.com/atollvm/atoll/internal/network"
)

const nicID tcpip.NICID = 1

// segment is one network at work: the switch, the stack at the gateway's address and its services.
type segment struct {
	network    network.Network
	dir        string
	resolvConf string
	log        *slog.Logger
	ctx        context.Context // ends with the segment
	cancel     context.CancelFunc
	stack      *stack.Stack
	link       *link
	running    sync.WaitGroup
	udpFlows   atomic.Int32

	attaching sync.Mutex   // orders attach and detach; taken before mu
	mu        sync.RWMutex // guards the rest
	endpoints map[string]*endpoint
	nics      map[tcpip.LinkAddress]*nic
}

// endpoint is an attached machine.
type endpoint struct {
	network.Endpoint
	attachment network.Attachment
	nic        *nic
	published  []io.Closer
	metadata   atomic.Pointer[metadataServer] // nil: none
	ctx        context.Context                // ends with the attachment, and every connection with it
	cancel     context.CancelFunc
}

func newSegment(ctx context.Context, dir string, n network.Network, resolvConf string, log *slog.Logger) (*segment, error) {
	sum := sha256.Sum256([]byte("gateway of " + n.Name))
	mac := sum[:6]
	mac[0] = mac[0]&^1 | 2
	s := &segment{
		network:    n,
		dir:        dir,
		resolvConf: resolvConf,
		log:        log,
		endpoints:  map[string]*endpoint{},
		nics:       map[tcpip.LinkAddress]*nic{},
	}
	s.link = &link{mac: tcpip.LinkAddress(mac), mtu: uint32(n.MTU), forward: s.forward}
	s.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := s.configure(); err != nil {
		return nil, fmt.Errorf("making the stack of network %q: %w", n.Name, err)
	}
	s.ctx, s.cancel = context.WithCancel(ctx)
	if err := errors.Join(s.serveDHCP(), s.serveDNS()); err != nil {
		s.close()
		return nil, fmt.Errorf("starting the services of network %q: %w", n.Name, err)
	}
	return s, nil
}

func (s *segment) configure() error {
	if terr := s.stack.CreateNIC(nicID, s.link); terr != nil {
		return errors.New(terr.String())
	}
	subnet := s.network.Subnet.Masked()
	if terr := s.stack.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: stackAddr(s.network.Gateway), PrefixLen: subnet.Bits()},
	}, stack.AddressProperties{}); terr != nil {
		return errors.New(terr.String())
	}
	// The stack answers in the name of every host out there: that is what NAT is here.
	s.stack.SetPromiscuousMode(nicID, true)
	s.stack.SetSpoofing(nicID, true)
	dst := tcpip.AddressWithPrefix{Address: stackAddr(subnet.Addr()), PrefixLen: subnet.Bits()}
	s.stack.SetRouteTable([]tcpip.Route{{Destination: dst.Subnet(), NIC: nicID}})
	sack := tcpip.TCPSACKEnabled(true)
	s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	s.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s.stack, 0, 1024, s.natTCP).HandlePacket)
	s.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(s.stack, s.natUDP).HandlePacket)
	return nil
}

func stackAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

func (s *segment) close() {
	for _, id := range s.list() {
		s.detach(id)
	}
	s.cancel()
	s.running.Wait()
	s.stack.Destroy()
}

// forward moves a frame to where it belongs and takes it over; from is nil for the gateway's.
func (s *segment) forward(from *nic, frame *buffer.View) {
	b := frame.AsSlice()
	dst := header.Ethernet(b).DestinationAddress()
	if from != nil && (dst == s.link.mac || isDHCP(b)) { // no machine is asked for leases but the gateway
		s.toGateway(b, frame)
		return
	}
	if b[0]&1 == 0 {
		s.mu.RLock()
		to := s.nics[dst]
		s.mu.RUnlock()
		if to == nil {
			frame.Release()
			return
		}
		to.send(frame)
		return
	}
	s.mu.RLock()
	all := slices.Collect(maps.Values(s.nics))
	s.mu.RUnlock()
	for _, to := range all {
		if to != from {
			to.send(frame.Clone())
		}
	}
	if from == nil || dst != header.EthernetBroadcastAddress {
		frame.Release()
		return
	}
	s.toGateway(b, frame)
}

// toGateway keeps back what the stack would answer in another's name: ARP requests, and echo requests. The metadata service's address is
// its own as well, for a guest that has it on its link and no route.
func (s *segment) toGateway(b []byte, frame *buffer.View) {
	packet := b[header.EthernetMinimumSize:]
	var target []byte
	switch protocol := header.Ethernet(b).Type(); {
	case protocol == header.ARPProtocolNumber:
		target = header.ARP(packet).ProtocolAddressTarget()
	case protocol == header.IPv4ProtocolNumber && packet[9] == uint8(header.ICMPv4ProtocolNumber):
		target = packet[16:20]
	}
	if target != nil && !s.answersFor(netip.AddrFrom4([4]byte(target))) {
		frame.Release()
		return
	}
	s.link.deliver(frame)
}

func (s *segment) answersFor(a netip.Addr) bool {
	return a == s.network.Gateway || a == metadata.Address
}

func (s *segment) attach(e network.Endpoint) (network.Attachment, error) {
	s.attaching.Lock()
	defer s.attaching.Unlock()
	s.mu.RLock()
	old := s.endpoints[e.ID]
	s.mu.RUnlock()
	if old != nil {
		if old.same(e) {
			return old.attachment, s.setMetadata(old, e.Metadata)
		}
		s.detachOne(e.ID)
	}
	mac, err := net.ParseMAC(e.MAC)
	if err != nil {
		return network.Attachment{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if !s.network.Subnet.Contains(e.Address) || e.Address == s.network.Gateway {
		return network.Attachment{}, fmt.Errorf("address %s is none for a machine on %s: %w", e.Address, s.network.Subnet, errdefs.ErrInvalidArgument)
	}
	if other := s.find(func(o *endpoint) bool { return o.Address == e.Address || o.nic.mac == tcpip.LinkAddress(mac) }); other != nil {
		return network.Attachment{}, fmt.Errorf("address %s or %s is machine %q's: %w", e.Address, e.MAC, other.Name, errdefs.ErrAlreadyExists)
	}
	local, remote := socketPaths(s.dir, e.Address)
	n, err := newNIC(tcpip.LinkAddress(mac), e.Address, s.link.mac, local, remote)
	if err != nil {
		return network.Attachment{}, err
	}
	ep := &endpoint{Endpoint: e, nic: n, attachment: network.Attachment{Local: local, Remote: remote}}
	ep.ctx, ep.cancel = context.WithCancel(s.ctx)
	if err := s.setMetadata(ep, e.Metadata); err != nil {
		ep.close()
		return network.Attachment{}, err
	}
	for _, m := range e.Ports {
		bound, err := s.publish(ep, m)
		if err != nil {
			ep.close()
			return network.Attachment{}, fmt.Errorf("publishing port %s: %w", m, err)
		}
		ep.attachment.Ports = append(ep.attachment.Ports, bound)
	}
	s.mu.Lock()
	s.endpoints[e.ID], s.nics[n.mac] = ep, n
	s.mu.Unlock()
	// No ARP towards machines: their MACs are known, and a machine that still boots is not given up early.
	s.stack.AddStaticNeighbor(nicID, ipv4.ProtocolNumber, stackAddr(e.Address), n.mac)
	s.running.Go(func() { n.receive(func(frame *buffer.View) { s.forward(n, frame) }) })
	s.running.Go(n.transmit)
	return ep.attachment, nil
}

// same says whether e asks for what is attached; a port that was chosen may be asked for by its number or by 0.
func (ep *endpoint) same(e network.Endpoint) bool {
	return ep.Name == e.Name && slices.Equal(ep.Aliases, e.Aliases) && ep.MAC == e.MAC && ep.Address == e.Address &&
		slices.EqualFunc(ep.attachment.Ports, e.Ports, func(bound, asked network.PortMapping) bool {
			asked = withDefaults(asked)
			if asked.HostPort == 0 {
				asked.HostPort = bound.HostPort
			}
			return asked == bound
		})
}

func (s *segment) detach(id string) {
	s.attaching.Lock()
	defer s.attaching.Unlock()
	if ep := s.detachOne(id); ep != nil {
		os.Remove(ep.attachment.Local)
	}
}

// detachOne needs attaching to be held. The VMM's socket stays: it may run on with the endpoint that follows.
func (s *segment) detachOne(id string) *endpoint {
	s.mu.Lock()
	ep := s.endpoints[id]
	if ep == nil {
		s.mu.Unlock()
		return nil
	}
	delete(s.endpoints, id)
	delete(s.nics, ep.nic.mac)
	s.mu.Unlock()
	s.stack.RemoveNeighbor(nicID, ipv4.ProtocolNumber, stackAddr(ep.Address))
	ep.close()
	return ep
}

// close gives back all that the endpoint holds on the host.
func (ep *endpoint) close() {
	for _, p := range ep.published {
		p.Close()
	}
	ep.cancel()
	ep.metadata.Load().end()
	ep.nic.close()
	os.Remove(ep.attachment.Remote)
}

func (s *segment) list() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.AppendSeq([]string{}, maps.Keys(s.endpoints))
}

// find returns an endpoint that matches, or nil.
func (s *segment) find(match func(*endpoint) bool) *endpoint {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, ep := range s.endpoints {
		if match(ep) {
			return ep
		}
	}
	return nil
}
