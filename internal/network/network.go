// Package network owns networks: their subnets, the addresses and MACs of machines, DNS names and port mappings.
// It knows nothing of VMMs or of machines beyond an endpoint's ID and name; the drivers move the frames.
// Imported by machine and the drivers. Safe for concurrent use.
package network

import (
	"context"
	"encoding/json"
	"net/netip"
)

// Network is one layer-2 segment with a gateway that serves DHCP, DNS and NAT.
type Network struct {
	Name    string
	Driver  string // user
	Subnet  netip.Prefix
	Gateway netip.Addr
	MTU     int
}

// Endpoint is one NIC of one machine on a network. MAC and Address stay the same over stop and start.
type Endpoint struct {
	ID      string // machine ID; safe as a file name
	Name    string // DNS name on the network: the machine's
	Aliases []string
	MAC     string
	Address netip.Addr
	Ports   []PortMapping
	// Metadata is the document (metadata.Document) that is served to this NIC, and to no other, at 169.254.169.254; empty: none.
	// It is replaced by attaching again, without a break.
	Metadata json.RawMessage `json:",omitempty"`
}

// PortMapping publishes a guest's port on the host.
type PortMapping struct {
	HostAddress netip.Addr // invalid: 127.0.0.1
	HostPort    uint16     // 0: chosen by the driver
	GuestPort   uint16
	Protocol    string // tcp, udp
}

// Attachment is what the VMM needs for an attached endpoint: a pair of unix datagram sockets.
type Attachment struct {
	Local  string        // the VMM binds this one
	Remote string        // the network's helper has bound this one
	Ports  []PortMapping // as bound, with the ports chosen
}

// Driver runs networks of one kind. Every call is idempotent.
type Driver interface {
	Name() string
	// Attach makes the endpoint reachable, with its name and its ports, starting the network where it does not run yet.
	// A taken port is errdefs.ErrAlreadyExists (or ErrFailedPrecondition where the address is not this host's) that names the
	// port and who has it, where that can be found; nothing is left attached then.
	Attach(ctx context.Context, n Network, e Endpoint) (Attachment, error)
	// Detach takes the endpoint, its name, ports and sockets away; not attached is no error. A network without endpoints may end.
	Detach(ctx context.Context, n Network, endpointID string) error
	// Recover is called once at start with the endpoints that should be attached: it takes over a helper that still runs (no
	// connection is dropped), starts one that died, and detaches what is not in the list.
	Recover(ctx context.Context, n Network, endpoints []Endpoint) error
	// Close lets go of the helpers, which run on while they have endpoints.
	Close() error
}
