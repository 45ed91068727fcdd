// Package netconf brings the guest's network cards up: it finds each by its MAC, gives it address and MTU and sets the default route,
// by rtnetlink. It holds no state.
package netconf

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// Set brings up the loopback and the given interfaces.
func Set(interfaces []*agentv1.Interface) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening rtnetlink: %w", err)
	}
	defer unix.Close(fd)
	c := &conn{fd: fd}
	if err := c.linkUp(1, 0); err != nil { // the loopback is always the first
		return fmt.Errorf("bringing up the loopback: %w", err)
	}
	for _, i := range interfaces {
		if err := c.set(i); err != nil {
			return fmt.Errorf("network card %s: %w", i.GetMac(), err)
		}
	}
	return nil
}

func (c *conn) set(i *agentv1.Interface) error {
	index, err := findByMAC(i.GetMac())
	if err != nil {
		return err
	}
	if err := c.linkUp(index, i.GetMtu()); err != nil {
		return fmt.Errorf("bringing it up: %w", err)
	}
	if i.GetAddress() == "" {
		return nil
	}
	prefix, err := netip.ParsePrefix(i.GetAddress())
	if err != nil {
		return err
	}
	if err := c.addAddress(index, prefix); err != nil {
		return fmt.Errorf("adding address %s: %w", prefix, err)
	}
	if i.GetGateway() == "" {
		return nil
	}
	gateway, err := netip.ParseAddr(i.GetGateway())
	if err != nil {
		return err
	}
	if err := c.addDefaultRoute(index, gateway); err != nil {
		return fmt.Errorf("adding the default route by %s: %w", gateway, err)
	}
	return nil
}

func findByMAC(mac string) (index int, err error) {
	const dir = "/sys/class/net/"
	cards, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, card := range cards {
		address, _ := os.ReadFile(dir + card.Name() + "/address")
		if !strings.EqualFold(strings.TrimSpace(string(address)), mac) {
			continue
		}
		index, err := os.ReadFile(dir + card.Name() + "/ifindex")
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(string(index)))
	}
	return 0, fmt.Errorf("there is none with this address")
}

type conn struct {
	fd  int
	seq uint32
}

func (c *conn) linkUp(index int, mtu uint32) error {
	body := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	binary.NativeEndian.PutUint32(body[8:], unix.IFF_UP)
	binary.NativeEndian.PutUint32(body[12:], unix.IFF_UP)
	if mtu > 0 {
		body = attribute(body, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, mtu))
	}
	return c.ask(unix.RTM_NEWLINK, 0, body)
}

func (c *conn) addAddress(index int, p netip.Prefix) error {
	// No duplicate address detection: addresses are leased, and an entrypoint may bind at once.
	body := []byte{family(p.Addr()), byte(p.Bits()), unix.IFA_F_NODAD, unix.RT_SCOPE_UNIVERSE}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	body = attribute(body, unix.IFA_LOCAL, p.Addr().AsSlice())
	body = attribute(body, unix.IFA_ADDRESS, p.Addr().AsSlice())
	return c.ask(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

func (c *conn) addDefaultRoute(index int, gateway netip.Addr) error {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[4], body[5], body[6], body[7] = family(gateway), unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	// On-link: the gateway need not be in the address's own subnet.
	binary.NativeEndian.PutUint32(body[8:], unix.RTNH_F_ONLINK)
	body = attribute(body, unix.RTA_GATEWAY, gateway.AsSlice())
	body = attribute(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index)))
	return c.ask(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// attribute appends a struct rtattr with its padding.
func attribute(body []byte, kind uint16, value []byte) []byte {
	body = binary.NativeEndian.AppendUint16(body, uint16(unix.SizeofRtAttr+len(value)))
	body = binary.NativeEndian.AppendUint16(body, kind)
	body = append(body, value...)
	return append(body, make([]byte, -len(body)&3)...)
}

// ask sends one request and waits for its acknowledgement.
func (c *conn) ask(kind, flags uint16, body []byte) error {
	c.seq++
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	m = binary.NativeEndian.AppendUint32(m, c.seq)
	m = binary.NativeEndian.AppendUint32(m, 0)
	if err := unix.Sendto(c.fd, append(m, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	reply := make([]byte, 4096)
	n, _, err := unix.Recvfrom(c.fd, reply, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(reply[4:]) != unix.NLMSG_ERROR {
		return unix.EPROTO
	}
	if code := int32(binary.NativeEndian.Uint32(reply[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}
