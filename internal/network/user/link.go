package user

import (
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link is the gateway's own port on the segment: what the stack sends goes to the switch, and the other way round.
type link struct {
	mac        tcpip.LinkAddress
	mtu        uint32
	forward    func(from *nic, frame *buffer.View)
	dispatcher stack.NetworkDispatcher
}

var _ stack.LinkEndpoint = (*link)(nil)

func (l *link) MTU() uint32                               { return l.mtu }
func (l *link) SetMTU(mtu uint32)                         { l.mtu = mtu }
func (l *link) MaxHeaderLength() uint16                   { return header.EthernetMinimumSize }
func (l *link) LinkAddress() tcpip.LinkAddress            { return l.mac }
func (l *link) SetLinkAddress(mac tcpip.LinkAddress)      { l.mac = mac }
func (l *link) ARPHardwareType() header.ARPHardwareType   { return header.ARPHardwareEther }
func (l *link) Attach(dispatcher stack.NetworkDispatcher) { l.dispatcher = dispatcher }
func (l *link) IsAttached() bool                          { return l.dispatcher != nil }
func (l *link) ParseHeader(*stack.PacketBuffer) bool      { return true }
func (l *link) Wait()                                     {}
func (l *link) Close()                                    {}
func (l *link) SetOnCloseAction(func())                   {}
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	// Frames come through memory: their checksums need not be checked again.
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}

func (l *link) AddHeader(pkt *stack.PacketBuffer) {
	header.Ethernet(pkt.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: l.mac,
		DstAddr: pkt.EgressRoute.RemoteLinkAddress,
		Type:    pkt.NetworkProtocolNumber,
	})
}

func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		l.forward(nil, pkt.ToView())
	}
	return pkts.Len(), nil
}

// deliver gives a machine's frame to the stack and takes it over.
func (l *link) deliver(frame *buffer.View) {
	protocol := header.Ethernet(frame.AsSlice()).Type()
	frame.TrimFront(header.EthernetMinimumSize)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(frame)})
	l.dispatcher.DeliverNetworkPacket(protocol, pkt)
	pkt.DecRef()
}
