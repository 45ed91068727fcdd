// Package metadata is what a machine can ask about itself at 169.254.169.254: a Document, served in the shapes that guests know (EC2's
// tree with the tokens of IMDSv2, cloud-init's NoCloud, plain JSON). It owns paths, shapes and who needs a token. Which machine asks is
// for the network to say, which keeps one Service for each NIC; what the document tells is the machine's.
// Imported by machine and network/user; imports nothing of ours. A Service may be used from several goroutines.
package metadata

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"
)

// Address is where every cloud has it.
var Address = netip.AddrFrom4([4]byte{169, 254, 169, 254})

// Port is HTTP's.
const Port = 80

// NoCloudURL is where cloud-init's NoCloud finds its seed.
func NoCloudURL() string { return "http://" + Address.String() + nocloudPath }

// Document is all that a machine gets to know. Nothing in it is secret to any process of the guest that can speak to the network.
type Document struct {
	MachineID   string            `json:"machine_id"`
	InstanceID  string            `json:"instance_id"` // a guest that sees another one takes this for its first boot
	Name        string            `json:"name"`
	Hostname    string            `json:"hostname"`
	Image       string            `json:"image"`
	ImageDigest string            `json:"image_digest,omitempty"`
	Arch        string            `json:"arch"` // as Go names it
	CPUs        int               `json:"cpus"`
	MemoryBytes int64             `json:"memory_bytes"`
	Created     time.Time         `json:"created"`
	Host        string            `json:"host"` // its ID
	Interfaces  []Interface       `json:"interfaces"`
	PublicKeys  []string          `json:"public_keys"` // lines of authorized_keys
	Labels      map[string]string `json:"labels"`
	UserData    []byte            `json:"user_data,omitempty"`   // only of a machine without an agent, which gets it over its own channel
	VendorData  []byte            `json:"vendor_data,omitempty"` // where such a machine has no other way to it: what flags ask for, as cloud-config

	// V1 answers requests without a token.
	V1 bool `json:"v1,omitempty"`
	// NoCloud answers below /nocloud/ without a token, as cloud-init has none to send there.
	NoCloud bool `json:"nocloud,omitempty"`
}

// Interface is a NIC.
type Interface struct {
	MAC     string       `json:"mac"`
	Network string       `json:"network"`
	Address netip.Prefix `json:"address"`
	Gateway netip.Addr   `json:"gateway"`
	DNS     []netip.Addr `json:"dns"`
	MTU     int          `json:"mtu"`
}

// Service answers one machine. Made by NewService; a zero Document is set.
type Service struct {
	tokens tokens
	trees  atomic.Pointer[trees]
}

// NewService returns a service whose tokens no other one takes.
func NewService() *Service {
	s := &Service{tokens: newTokens()}
	s.trees.Store(newTrees(&Document{}))
	return s
}

// Set replaces the document, in the form of JSON. Tokens stay good.
func (s *Service) Set(document json.RawMessage) error {
	if old := s.trees.Load(); bytes.Equal(old.source, document) {
		return nil
	}
	var d Document
	if err := json.Unmarshal(document, &d); err != nil {
		return fmt.Errorf("reading a machine's metadata: %w", err)
	}
	t := newTrees(&d)
	t.source = bytes.Clone(document)
	s.trees.Store(t)
	return nil
}
