package machine

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"

	"github.com/atollvm/atoll/internal/metadata"
	"github.com/atollvm/atoll/internal/network"
)

// Metadata says what the machine's metadata service gives.
type Metadata struct {
	Disabled bool
	V1       bool // also to requests without a token
}

// document is what the machine can ask about itself.
func (m *Machine) document(n network.Network) (json.RawMessage, error) {
	if m.Spec.Metadata.Disabled {
		return nil, nil
	}
	d := metadata.Document{
		MachineID:   string(m.ID),
		InstanceID:  "i-" + string(m.ID)[:17], // as long as EC2's
		Name:        m.Spec.Name,
		Hostname:    m.Spec.Hostname,
		Image:       m.Image.Reference,
		ImageDigest: m.Image.Digest.String(),
		Arch:        runtime.GOARCH,
		CPUs:        m.Spec.CPUs,
		MemoryBytes: m.Spec.MemoryBytes,
		Created:     m.Created.UTC(),
		Host:        m.Host,
		Interfaces: []metadata.Interface{{
			MAC: m.Lease.MAC, Network: n.Name, Address: m.address(n), Gateway: n.Gateway, DNS: []netip.Addr{n.Gateway}, MTU: n.MTU,
		}},
		PublicKeys: []string{},
		Labels:     m.Spec.Labels,
		V1:         m.Spec.Metadata.V1,
	}
	data, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("writing the metadata of machine %q: %w", m.Spec.Name, err)
	}
	return data, nil
}
