package machine

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"

	"github.com/atollvm/atoll/internal/metadata"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/provision"
)

// Metadata says what the machine's metadata service gives.
type Metadata struct {
	Disabled bool
	V1       bool // also to requests without a token
}

// requestFor is what was asked to be set in the guest, of which metadata tells something; nil: nothing.
func (ms *Machines) requestFor(m *Machine) (*provision.Request, error) {
	if !m.ownSystem() && len(m.Spec.Provisioning.Withheld) == 0 {
		return nil, nil
	}
	return requestOf(ms.dirOf(m.ID))
}

// document is what the machine can ask about itself. A guest without an agent gets its user-data here too, as in a cloud.
func (m *Machine) document(n network.Network, request *provision.Request) (json.RawMessage, error) {
	if m.Spec.Metadata.Disabled {
		return nil, nil
	}
	d := metadata.Document{
		MachineID:   string(m.ID),
		InstanceID:  m.instanceID(),
		Name:        m.Spec.Name,
		Hostname:    m.Spec.Hostname,
		Image:       cmp.Or(m.Image.Reference, m.Spec.Disk),
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
	if request != nil {
		d.PublicKeys = append(d.PublicKeys, request.SSHAuthorizedKeys...)
		if m.ownSystem() {
			d.NoCloud, d.UserData = true, request.UserData
		}
		if m.ownSystem() && m.Spec.Kernel != "" { // it may not read its seed disk; what need not be where any process can read it is not
			seed, err := request.NoCloud(m.instanceID(), m.Spec.Hostname)
			if err != nil {
				return nil, fmt.Errorf("writing the metadata of machine %q: %w", m.Spec.Name, err)
			}
			d.VendorData = seed["vendor-data"]
		}
	}
	data, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("writing the metadata of machine %q: %w", m.Spec.Name, err)
	}
	return data, nil
}
