package user

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/atollvm/atoll/internal/network"
)

// owner says who has the port, as the end of a sentence; empty when that cannot be found out.
func (s *segment) owner(m network.PortMapping) string {
	clashes := func(a netip.Addr) bool {
		return a == m.HostAddress || a.IsUnspecified() || m.HostAddress.IsUnspecified()
	}
	if other := s.find(func(ep *endpoint) bool {
		return slices.ContainsFunc(ep.attachment.Ports, func(o network.PortMapping) bool {
			return o.HostPort == m.HostPort && o.Protocol == m.Protocol && clashes(o.HostAddress)
		})
	}); other != nil {
		return fmt.Sprintf(" by machine %q", other.Name)
	}
	inodes := map[string]bool{}
	for _, table := range []string{m.Protocol, m.Protocol + "6"} {
		for addr, inode := range boundSockets("/proc/net/" + table) {
			if addr.Port() == m.HostPort && clashes(addr.Addr()) {
				inodes["socket:["+inode+"]"] = true
			}
		}
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && inodes[target] {
			pid := strings.Split(link, "/")[2]
			name, err := os.ReadFile("/proc/" + pid + "/comm")
			if err != nil {
				continue
			}
			return fmt.Sprintf(" by process %q (pid %s)", strings.TrimSpace(string(name)), pid)
		}
	}
	return ""
}

// boundSockets reads a table of the kernel: local addresses of listening TCP or bound UDP sockets, with their inodes.
func boundSockets(table string) map[netip.AddrPort]string {
	const listening, unconnected = "0A", "07"
	found := map[netip.AddrPort]string{}
	f, err := os.Open(table)
	if err != nil {
		return nil
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != listening && fields[3] != unconnected {
			continue
		}
		if addr, ok := parseProcAddr(fields[1]); ok {
			found[addr] = fields[9]
		}
	}
	return found
}

// parseProcAddr reads hexadecimal address:port, where the address is in 32-bit words of the host's byte order; all hosts that
// we run on are little-endian.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	address, port, _ := strings.Cut(s, ":")
	words, err := hex.DecodeString(address)
	if err != nil || len(words)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for w := range slices.Chunk(words, 4) {
		slices.Reverse(w)
	}
	addr, ok := netip.AddrFromSlice(words)
	p, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(addr.Unmap(), uint16(p)), ok && err == nil
}
