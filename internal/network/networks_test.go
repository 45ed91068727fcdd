package network

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/state"
)

var cmpAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestParsePort(t *testing.T) {
	mapping := func(addr string, host, guest uint16, protocol string) PortMapping {
		m := PortMapping{HostPort: host, GuestPort: guest, Protocol: protocol}
		if addr != "" {
			m.HostAddress = netip.MustParseAddr(addr)
		}
		return m
	}
	for _, tt := range []struct {
		spec string
		want []PortMapping
	}{
		{"80", []PortMapping{mapping("", 0, 80, "tcp")}},
		{"53/udp", []PortMapping{mapping("", 0, 53, "udp")}},
		{"53/UDP", []PortMapping{mapping("", 0, 53, "udp")}},
		{"8080:80", []PortMapping{mapping("", 8080, 80, "tcp")}},
		{"0:80", []PortMapping{mapping("", 0, 80, "tcp")}},
		{":80", []PortMapping{mapping("", 0, 80, "tcp")}},
		{"0.0.0.0:8080:80", []PortMapping{mapping("0.0.0.0", 8080, 80, "tcp")}},
		{"127.0.0.1::80/tcp", []PortMapping{mapping("127.0.0.1", 0, 80, "tcp")}},
		{"[::1]:8080:80", []PortMapping{mapping("::1", 8080, 80, "tcp")}},
		{"[::]::53/udp", []PortMapping{mapping("::", 0, 53, "udp")}},
		{"8000-8001:80-81", []PortMapping{mapping("", 8000, 80, "tcp"), mapping("", 8001, 81, "tcp")}},
		{"80-81", []PortMapping{mapping("", 0, 80, "tcp"), mapping("", 0, 81, "tcp")}},
		{"65535:65535", []PortMapping{mapping("", 65535, 65535, "tcp")}},
	} {
		got, err := ParsePort(tt.spec)
		if err != nil {
			t.Errorf("ParsePort(%q): %v", tt.spec, err)
		} else if diff := cmp.Diff(tt.want, got, cmpAddr); diff != "" {
			t.Errorf("ParsePort(%q) (-want +got):\n%s", tt.spec, diff)
		}
	}
	for _, spec := range []string{
		"", ":", "a", "80:a", "65536", "80:0", "80:-1", "1:2:3:4", "80/", "80/sctp", "80/tcp/udp", "::1:80:80", "[::1:80:80", "[::1]:80",
		"[127.0.0.1]:80:80", "eth0:80:80", "8000-8002:80-81", "8002-8000:80-82", "0-1:80-81", "80:", "[::1]", "+80", " 80",
	} {
		got, err := ParsePort(spec)
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), `"`+spec+`"`) || hint.Of(err) == "" {
			t.Errorf("ParsePort(%q) = %v, %v", spec, got, err)
		}
	}
}

func FuzzParsePort(f *testing.F) {
	f.Add("[::1]:8000-8001:80-81/udp")
	f.Fuzz(func(t *testing.T, spec string) {
		got, err := ParsePort(spec)
		if err != nil {
			return
		}
		for _, m := range got {
			again, err := ParsePort(m.String())
			if diff := cmp.Diff([]PortMapping{m}, again, cmpAddr); err != nil || diff != "" {
				t.Errorf("%q: %v %v", m, err, diff)
			}
		}
	})
}

func open(t *testing.T, path string) (*Networks, func()) {
	t.Helper()
	db, err := state.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	n, err := Open(db)
	if err != nil {
		t.Fatal(err)
	}
	return n, func() { db.Close() }
}

func TestLease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	n, closeDB := open(t, path)
	lease := func(n *Networks, id string) Lease {
		t.Helper()
		l, err := n.Lease(Default, id)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	web, db := lease(n, "web"), lease(n, "db")
	if web.Address == db.Address || web.MAC == db.MAC {
		t.Fatalf("two machines share: %v, %v", web, db)
	}
	if web.Address == defaultNetwork.Gateway || !defaultNetwork.Subnet.Contains(web.Address) {
		t.Errorf("address %s", web.Address)
	}
	if strings.IndexByte("26ae", web.MAC[1]) < 0 {
		t.Errorf("MAC %s is not a locally administered unicast address", web.MAC)
	}
	closeDB()

	n, closeDB = open(t, path)
	defer closeDB()
	if got := lease(n, "web"); got != web {
		t.Errorf("after reopening: %v, want %v", got, web)
	}
	if err := n.Release("web"); err != nil {
		t.Fatal(err)
	}
	if got := lease(n, "new"); got.Address == web.Address || got.Address == db.Address {
		t.Errorf("address %s was reused at once", got.Address)
	}
	if got := lease(n, "web"); got.MAC != web.MAC {
		t.Errorf("MAC %s does not follow from the machine's ID (%s before)", got.MAC, web.MAC)
	}
	if _, err := n.Lease("none", "web"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("unknown network: %v", err)
	}
}

func TestLeaseExhausted(t *testing.T) {
	n, closeDB := open(t, filepath.Join(t.TempDir(), "state"))
	defer closeDB()
	small := defaultNetwork
	small.Subnet = netip.MustParsePrefix("10.215.0.0/29")
	n.networks[Default] = small
	got := map[netip.Addr]bool{}
	for _, id := range []string{"a", "b", "c", "d", "e"} { // 8 - network - gateway - broadcast
		l, err := n.Lease(Default, id)
		if err != nil {
			t.Fatal(err)
		}
		got[l.Address] = true
	}
	if len(got) != 5 {
		t.Errorf("addresses %v", got)
	}
	if _, err := n.Lease(Default, "f"); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("a full subnet: %v", err)
	}
	if err := n.Release("c"); err != nil {
		t.Fatal(err)
	}
	if l, err := n.Lease(Default, "f"); err != nil || !small.Subnet.Contains(l.Address) {
		t.Errorf("after a release: %v, %v", l, err)
	}
}
