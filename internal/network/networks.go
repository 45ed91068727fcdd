package network

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/state"
)

// Default is the network that a machine gets when it names none.
const Default = "default"

// defaultNetwork's subnet lies in RFC 1918 space, since programs trust such peers by default, and away from what is common:
// Docker 172.17-31/16 and 192.168/16, Podman 10.88, Kubernetes 10.96 and 10.244, k3s 10.42-43, slirp 10.0.2, libvirt
// 192.168.122, gvproxy 192.168.127, VPNs of the 100.64/10 kind. Only machines see it, so that a clash hides a piece of the
// real network from them and breaks nothing else. The MTU is the largest that virtio-net takes: a frame per 64 KiB.
var defaultNetwork = Network{
	Name:    Default,
	Driver:  "user",
	Subnet:  netip.MustParsePrefix("10.215.0.0/16"),
	Gateway: netip.MustParseAddr("10.215.0.1"),
	MTU:     65520,
}

// Lease is what a machine has on a network from its first start until Release.
type Lease struct {
	Network   string
	MachineID string
	MAC       string
	Address   netip.Addr
}

// Networks knows the networks and their leases. Made by Open.
type Networks struct {
	drivers map[string]Driver
	stored  *state.Collection[Lease]

	mu       sync.Mutex // guards the rest
	networks map[string]Network
	leases   map[string]Lease      // by leaseKey
	last     map[string]netip.Addr // by network: where the search for a free address goes on
}

// Open reads the leases from db.
func Open(db *state.DB, drivers ...Driver) (*Networks, error) {
	stored, err := state.Of[Lease](db, "leases")
	if err != nil {
		return nil, err
	}
	leases, err := stored.All()
	if err != nil {
		return nil, fmt.Errorf("reading leases: %w", err)
	}
	n := &Networks{
		drivers:  map[string]Driver{},
		stored:   stored,
		networks: map[string]Network{Default: defaultNetwork},
		leases:   leases,
		last:     map[string]netip.Addr{},
	}
	for _, d := range drivers {
		n.drivers[d.Name()] = d
	}
	for _, l := range leases {
		if last := n.last[l.Network]; !last.IsValid() || last.Less(l.Address) {
			n.last[l.Network] = l.Address
		}
	}
	return n, nil
}

// Get returns the network and its driver. errdefs.ErrNotFound: there is no such network.
func (n *Networks) Get(name string) (Network, Driver, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	nw, ok := n.networks[name]
	if !ok {
		return Network{}, nil, fmt.Errorf("network %q: %w", name, errdefs.ErrNotFound)
	}
	d, ok := n.drivers[nw.Driver]
	if !ok {
		return Network{}, nil, fmt.Errorf("network %q: driver %q: %w", name, nw.Driver, errdefs.ErrNotFound)
	}
	return nw, d, nil
}

// List returns the networks by name.
func (n *Networks) List() []Network {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.SortedFunc(maps.Values(n.networks), func(a, b Network) int { return strings.Compare(a.Name, b.Name) })
}

// Lease returns the machine's MAC and address on the network: the same ones until Release.
// errdefs.ErrResourceExhausted: the subnet has no free address.
func (n *Networks) Lease(name, machineID string) (Lease, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	nw, ok := n.networks[name]
	if !ok {
		return Lease{}, fmt.Errorf("network %q: %w", name, errdefs.ErrNotFound)
	}
	key := leaseKey(name, machineID)
	if l, ok := n.leases[key]; ok {
		return l, nil
	}
	used, macs := map[netip.Addr]bool{nw.Gateway: true}, map[string]bool{}
	for _, l := range n.leases {
		macs[l.MAC] = true
		if l.Network == name {
			used[l.Address] = true
		}
	}
	addr, ok := nextFree(nw.Subnet, n.last[name], used)
	if !ok {
		return Lease{}, fmt.Errorf("leasing an address of network %q: all of %s are in use: %w", name, nw.Subnet, errdefs.ErrResourceExhausted)
	}
	l := Lease{Network: name, MachineID: machineID, MAC: newMAC(key, macs), Address: addr}
	if err := n.stored.Put(key, l); err != nil {
		return Lease{}, err
	}
	n.leases[key], n.last[name] = l, addr
	return l, nil
}

// Release gives up all that the machine has leased; none is no error.
func (n *Networks) Release(machineID string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for key, l := range n.leases {
		if l.MachineID != machineID {
			continue
		}
		if err := n.stored.Delete(key); err != nil {
			return fmt.Errorf("releasing addresses of machine %s: %w", machineID, err)
		}
		delete(n.leases, key)
	}
	return nil
}

func leaseKey(network, machineID string) string { return network + "/" + machineID }

// nextFree searches onward from last and around, so that a released address rests before it is leased again: neighbours
// still have the old MAC in their ARP tables.
func nextFree(subnet netip.Prefix, last netip.Addr, used map[netip.Addr]bool) (netip.Addr, bool) {
	first := subnet.Masked().Addr()
	if !last.IsValid() || !subnet.Contains(last) {
		last = first
	}
	for a := last.Next(); ; a = a.Next() {
		if !a.IsValid() || !subnet.Contains(a) {
			a = first
		}
		broadcast := !subnet.Contains(a.Next())
		if a != first && !broadcast && !used[a] {
			return a, true
		}
		if a == last {
			return netip.Addr{}, false
		}
	}
}

// newMAC derives a locally administered unicast address from the key. Machine IDs are unique over hosts, so the MACs are too.
func newMAC(key string, used map[string]bool) string {
	for seed := []byte(key); ; seed = append(seed, '+') {
		sum := sha256.Sum256(seed)
		mac := bytes.Clone(sum[:6])
		mac[0] = mac[0]&^1 | 2
		if s := net.HardwareAddr(mac).String(); !used[s] {
			return s
		}
	}
}
