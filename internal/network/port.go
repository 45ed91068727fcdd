package network

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// ParsePort reads a port specification: [[address:]host:]guest[/tcp|/udp]. An IPv6 address stands in brackets. A host port that
// is empty, absent or 0 is chosen by the driver. Both sides may be ranges of one length (8000-8002:80-82).
// errdefs.ErrInvalidArgument: the error quotes the specification.
func ParsePort(spec string) ([]PortMapping, error) {
	fail := func(format string, args ...any) ([]PortMapping, error) {
		err := fmt.Errorf("port %q: %s: %w", spec, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
		return nil, hint.With(err, "write it as [[address:]host:]guest[/udp], for example 8080:80 or [::1]:5353:53/udp")
	}
	rest, protocol, found := strings.Cut(spec, "/")
	if !found {
		protocol = "tcp"
	}
	if protocol = strings.ToLower(protocol); protocol != "tcp" && protocol != "udp" {
		return fail("protocol %q is neither tcp nor udp", protocol)
	}
	// The address may have colons of its own, so the ports are cut off from the right.
	rest, guest := cutLast(rest)
	address, host := cutLast(rest)

	var addr netip.Addr
	if address != "" {
		bare, bracketed := strings.CutPrefix(address, "[")
		if bracketed {
			var closed bool
			if bare, closed = strings.CutSuffix(bare, "]"); !closed {
				return fail("address %q lacks its closing bracket", address)
			}
		}
		var err error
		if addr, err = netip.ParseAddr(bare); err != nil {
			return fail("%q is not an IP address", address)
		}
		if addr.Is6() != bracketed {
			return fail("an IPv6 address, and only that, stands in brackets")
		}
		addr = addr.Unmap()
	}
	g, err := parseRange(guest)
	if err != nil {
		return fail("guest %s", err)
	}
	if g.first == 0 {
		return fail("guest port 0 does not exist")
	}
	h := portRange{}
	if host != "" {
		if h, err = parseRange(host); err != nil {
			return fail("host %s", err)
		}
	}
	chosen := h == portRange{}
	if !chosen && h.last-h.first != g.last-g.first {
		return fail("%d host ports for %d guest ports", h.last-h.first+1, g.last-g.first+1)
	}
	if !chosen && h.first == 0 {
		return fail("a range cannot begin at 0")
	}
	var mappings []PortMapping
	for i := range g.last - g.first + 1 {
		m := PortMapping{HostAddress: addr, GuestPort: uint16(g.first + i), Protocol: protocol}
		if !chosen {
			m.HostPort = uint16(h.first + i)
		}
		mappings = append(mappings, m)
	}
	return mappings, nil
}

// String is the mapping as ParsePort reads it.
func (m PortMapping) String() string {
	s := fmt.Sprintf("%d:%d/%s", m.HostPort, m.GuestPort, m.Protocol)
	if !m.HostAddress.IsValid() {
		return s
	}
	if m.HostAddress.Is6() {
		return "[" + m.HostAddress.String() + "]:" + s
	}
	return m.HostAddress.String() + ":" + s
}

// cutLast splits at the last colon outside of brackets; without one, all is after it.
func cutLast(s string) (before, after string) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || i < strings.LastIndexByte(s, ']') {
		return "", s
	}
	return s[:i], s[i+1:]
}

type portRange struct{ first, last int }

func parseRange(s string) (portRange, error) {
	first, last, found := strings.Cut(s, "-")
	if !found {
		last = first
	}
	var r portRange
	for _, p := range []struct {
		text string
		to   *int
	}{{first, &r.first}, {last, &r.last}} {
		n, err := strconv.ParseUint(p.text, 10, 16)
		if err != nil {
			return r, fmt.Errorf("port %q is not a number from 0 to 65535", p.text)
		}
		*p.to = int(n)
	}
	if r.last < r.first {
		return r, fmt.Errorf("port range %s runs backwards", s)
	}
	return r, nil
}
