package user

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	maxFrame  = 1 << 16 // QEMU's own limit; also the largest buffer that the stack pools
	queueSize = 256     // frames that wait for a slow guest
	patience  = 50 * time.Millisecond
)

// nic is the network's end of one machine's card: frames as datagrams between two unix sockets.
type nic struct {
	mac     tcpip.LinkAddress
	addr    [4]byte
	gateway tcpip.LinkAddress

	conn  *net.UnixConn
	peer  *net.UnixAddr
	out   chan *buffer.View
	done  chan struct{}
	stuck atomic.Bool // the guest takes no frames: do not wait for it again
}

func newNIC(mac tcpip.LinkAddress, addr netip.Addr, gateway tcpip.LinkAddress, local, remote string) (*nic, error) {
	// A socket file that is left from a helper that died would be in the way.
	if err := os.Remove(remote); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: remote, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("binding %s: %w", remote, err)
	}
	growBuffers(conn)
	return &nic{
		mac: mac, addr: addr.As4(), gateway: gateway,
		conn: conn, peer: &net.UnixAddr{Name: local, Net: "unixgram"},
		out: make(chan *buffer.View, queueSize), done: make(chan struct{}),
	}, nil
}

// growBuffers makes room for many frames of 64 KiB, as far as the host lets us.
func growBuffers(conn *net.UnixConn) {
	const size = 4 << 20
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size) != nil {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, size)
		}
	})
}

func (n *nic) close() {
	close(n.done)
	n.conn.Close()
}

// receive hands over each frame that the machine may send, until the NIC is closed.
func (n *nic) receive(deliver func(*buffer.View)) {
	whole := buffer.NewViewSize(maxFrame)
	defer func() { whole.Release() }()
	for {
		size, err := n.conn.Read(whole.AsSlice())
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || !n.allowed(whole.AsSlice()[:size]) {
			continue
		}
		if size < 1<<13 { // the stack may keep it for long: not in a buffer of 64 KiB
			deliver(buffer.NewViewWithData(whole.AsSlice()[:size]))
			continue
		}
		frame := whole
		frame.CapLength(size)
		whole = buffer.NewViewSize(maxFrame)
		deliver(frame)
	}
}

// allowed lets a machine speak only for itself: with its own MAC and address, in ARP and IPv4.
func (n *nic) allowed(frame []byte) bool {
	if len(frame) < header.EthernetMinimumSize+header.ARPSize || string(frame[6:12]) != string(n.mac) {
		return false
	}
	packet := frame[header.EthernetMinimumSize:]
	switch header.Ethernet(frame).Type() {
	case header.ARPProtocolNumber:
		a := header.ARP(packet)
		if string(a.HardwareAddressSender()) != string(n.mac) {
			return false
		}
		sender := [4]byte(a.ProtocolAddressSender())
		return sender == n.addr || sender == [4]byte{} // zero: it probes whether its address is free
	case header.IPv4ProtocolNumber:
		source := [4]byte(packet[12:16])
		return source == n.addr || source == [4]byte{} && isDHCP(frame)
	}
	return false
}

// isDHCP says whether the frame is a datagram to a DHCP server.
func isDHCP(frame []byte) bool {
	if header.Ethernet(frame).Type() != header.IPv4ProtocolNumber {
		return false
	}
	packet := frame[header.EthernetMinimumSize:]
	length := int(packet[0]&0xf) * 4
	return packet[9] == uint8(header.UDPProtocolNumber) && len(packet) >= length+header.UDPMinimumSize &&
		binary.BigEndian.Uint16(packet[length+2:]) == dhcpPort
}

// send queues the frame and takes it over. A full queue holds the sender up for a moment, which is better for throughput
// than a loss; a guest that takes nothing at all is waited for only once.
func (n *nic) send(frame *buffer.View) {
	select {
	case n.out <- frame:
		return
	default:
	}
	if !n.stuck.Load() {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case n.out <- frame:
			return
		case <-timer.C:
			n.stuck.Store(true)
		case <-n.done:
		}
	}
	frame.Release()
}

// transmit writes the queued frames until the NIC is closed. While the VMM has not bound its socket, and for any other
// reason of the moment, a frame is lost.
func (n *nic) transmit() {
	for {
		select {
		case frame := <-n.out:
			// The deadline is needed because a full queue at the peer, filled by an earlier helper, drains without waking us.
			n.conn.SetWriteDeadline(time.Now().Add(patience))
			_, err := n.conn.WriteToUnix(frame.AsSlice(), n.peer)
			frame.Release()
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				n.stuck.Store(false)
			}
		case <-n.done:
			return
		}
	}
}
