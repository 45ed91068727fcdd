package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

// HostAddress is an address of the host by which machines reach what listens on all of its addresses: the one that it goes out from,
// else the first that is no loopback. errdefs.ErrNotFound: there is none.
func HostAddress() (netip.Addr, error) {
	if c, err := net.Dial("udp4", "192.0.2.1:9"); err == nil { // sends nothing (the address is for documentation), but has a route chosen
		defer c.Close()
		if a, ok := c.LocalAddr().(*net.UDPAddr); ok && reachable(a.AddrPort().Addr()) {
			return a.AddrPort().Addr().Unmap(), nil
		}
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("looking for the host's address: %w", err)
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && reachable(p.Addr()) {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, hint.With(fmt.Errorf("the host has no address but loopback, which machines do not reach: %w", errdefs.ErrNotFound), "give an address instead of host-gateway")
}

// reachable leaves out what a network keeps from its machines.
func reachable(a netip.Addr) bool {
	return a.IsValid() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsUnspecified()
}
