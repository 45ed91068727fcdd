// Package machine is the VM that users see: what it should be (Spec), what it is (Machine), and the steps that bring it from
// one to the other and back. It owns a machine's directory and its record in the state; images, disks, kernels and networks
// come through the small interfaces below, the VMM through vmm.Driver, the guest through agent/host.
// Imported by server and daemon. Machines is safe for concurrent use; commands on one machine take turns.
package machine

import (
	"context"
	"net/netip"
	"time"

	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/diskimage"
	"github.com/atollvm/atoll/internal/health"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/opencontainers/go-digest"
)

// ID names a machine in all places and on all hosts: 32 hex digits.
type ID string

// Short is the form shown to people and used in paths.
func (id ID) Short() string { return string(id[:12]) }

// State is where a machine is in its life.
type State string

// The states, in the order of a life.
const (
	Created  State = "created"
	Starting State = "starting"
	Running  State = "running"
	Paused   State = "paused"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Failed   State = "failed"
)

// Alive says that a VMM belongs to this state.
func (s State) Alive() bool {
	return s == Starting || s == Running || s == Paused || s == Stopping
}

// Reason is why a machine stopped.
type Reason string

// The reasons of architecture.md §4.
const (
	ReasonExited     Reason = "exited"
	ReasonKilled     Reason = "killed"
	ReasonPoweroff   Reason = "poweroff"
	ReasonReboot     Reason = "reboot"
	ReasonPanic      Reason = "panic"
	ReasonVMMDied    Reason = "vmm-died"
	ReasonHostReboot Reason = "host-reboot"
	ReasonVerity     Reason = "verity" // a root disk is not what its root hash says
)

// Spec is what a user asked for. Zero values are filled by Create.
type Spec struct {
	Name          string
	Image         string
	Command       []string
	Entrypoint    []string
	SetEntrypoint bool // Entrypoint replaces the image's even when it is empty
	Env           []string
	WorkingDir    string
	User          string
	TTY           bool
	Stdin         bool
	Remove        bool
	Hostname      string
	CPUs          int
	MemoryBytes   int64
	DiskBytes     int64
	Ports         []network.PortMapping
	Labels        map[string]string
	Network       string
	Kernel        string
	VMM           string
	Platform      string
	StopSignal    string
	StopTimeout   time.Duration
	Verity        bool   // root disks must verify
	Init          string // InitAuto, InitAgent or InitImage
	LogMaxBytes   int64  // of one file of the entrypoint's output
	LogMaxFiles   int
	ReadOnly      bool // the root
	Tmpfs         []Tmpfs
	Ulimits       []Ulimit
	Sysctls       map[string]string
	AddHosts      []HostEntry
	DNS           []string // servers, instead of the network's
	DNSSearch     []string
	DNSOptions    []string
	PublishAll    bool         // every port that the image exposes
	Health        health.Check // over the image's
	KernelArgs    []string
	Metadata      Metadata
	// Provisioning is what is set in the guest at its first boot. Create takes it whole; a record has it redacted.
	Provisioning provision.Request
	Profiles     []string // where some of all this came from; for people
	Disk         string   // path of a disk image that boots in the place of an image
	Firmware     string   // with Disk: vmm.BIOS or vmm.UEFI
}

// Tmpfs is a file system in memory.
type Tmpfs struct {
	Path    string
	Options string // as size=64m,exec; Docker's defaults hold beside them
}

// Ulimit is a resource limit of the entrypoint and of what Exec runs.
type Ulimit struct {
	Name       string // as nofile
	Soft, Hard int64  // -1: unlimited
}

// HostEntry is a line of /etc/hosts.
type HostEntry struct {
	Address string // or HostGateway
	Names   []string
}

// HostGateway stands for an address by which a machine reaches its host.
const HostGateway = "host-gateway"

// Machine is the record of one machine: spec and status, as stored.
type Machine struct {
	ID         ID
	Host       string // the owner
	Spec       Spec
	State      State
	Reason     Reason
	ExitCode   int
	Error      string
	FailedStep string
	Image      Image
	Disk       *diskimage.Image // of Spec.Disk, as it was at create
	Created    time.Time
	Started    time.Time
	Finished   time.Time
	Lease      network.Lease
	Ports      []network.PortMapping // as bound
	VMM        VMMStatus
	Steps      []StepTime      // of the last start
	Last       *LastWord       // what the agent of this run said before it went down
	AgentToken transport.Token // reopens the agent's channel
	HostBoot   string          // the host's boot ID at the last start
	Health     *health.State   // nil: there is no check. The state is replaced, not changed

	Provisioning ProvisionStatus
}

// LastWord is why a guest goes down, in its agent's words.
type LastWord struct {
	Reason   Reason
	ExitCode int
	Detail   string
}

// VMMStatus says what runs, or last ran, the machine.
type VMMStatus struct {
	Driver      string
	Accelerator string
	PID         int
	Kernel      string
	Console     string
	ConsoleBase uint64 // of a guest without an agent: how much of this run's console was emptied away
}

// StepTime is one step of a start and how long it took.
type StepTime struct {
	Name string
	Took time.Duration
}

// Image is what a machine needs to know of its image, resolved once at create.
type Image struct {
	Digest     digest.Digest
	Reference  string
	Entrypoint []string
	Cmd        []string
	Env        []string
	WorkingDir string
	User       string
	StopSignal string

	ExposedPorts []string // as 80/tcp
	Volumes      []string
	Labels       map[string]string
	Shell        []string // for lines such as that of a health check
	Health       health.Check
}

// Images finds local images.
type Images interface {
	// Find returns the image of that reference or digest for a platform ("" = the host's). errdefs.ErrNotFound, or
	// ErrInvalidArgument for an image that this host cannot run.
	Find(ctx context.Context, ref, platform string) (Image, error)
	// Hold keeps every image from being deleted until release is called.
	Hold() (release func())
}

// Disks makes the disks of a machine.
type Disks interface {
	// Root returns the read-only root disks of an image, the lowest first, made now when they are not there.
	Root(ctx context.Context, img digest.Digest) ([]RootDisk, error)
	// Verify reads the root disks of an image whole and compares them with their root hashes; errdefs.ErrDataLoss: they differ.
	Verify(ctx context.Context, img digest.Digest) error
	// Scratch makes an empty file system of that size.
	Scratch(path string, size int64) error
}

// RootDisk is one of the disks that an image's root is joined of, and its dm-verity hash tree, which lies behind the data.
type RootDisk struct {
	Path       string
	HasRoot    bool // says what the root directory is like
	RootHash   string
	Salt       string
	DataBlocks int64
}

// Kernels finds kernels.
type Kernels interface {
	// Boot returns the kernel of that name ("" = the default) with its initramfs, ready for a VMM. errdefs.ErrFailedPrecondition: it
	// lacks one of the features.
	Boot(ctx context.Context, name string, features ...string) (vmm.Kernel, string, error)
	// Modules returns what guests with that kernel may load while they run; nil: it has all built in.
	Modules(name string) KernelModules
}

// KernelModules is the modules of one kernel.
type KernelModules interface {
	// Find returns the modules to load, in that order, for what a kernel asks for.
	Find(request string) ([]string, error)
	Read(name string) ([]byte, error)
}

// featureVerity is dm-verity, as a kernel's feature and among the modules that the agent loads on demand.
const featureVerity = "verity"

// Networks knows the networks, their drivers and what each machine has leased.
type Networks interface {
	Get(name string) (network.Network, network.Driver, error)
	List() []network.Network
	Lease(network, machineID string) (network.Lease, error)
	Release(machineID string) error
}

// endpoint is the machine's NIC as the network sees it.
func (m *Machine) endpoint(n network.Network, request *provision.Request) (network.Endpoint, error) {
	document, err := m.document(n, request)
	return network.Endpoint{
		ID:       m.ID.Short(),
		Name:     m.Spec.Name,
		Aliases:  aliases(m),
		MAC:      m.Lease.MAC,
		Address:  m.Lease.Address,
		Ports:    m.ports(),
		Metadata: document,
	}, err
}

func aliases(m *Machine) []string {
	a := []string{m.ID.Short()}
	if m.Spec.Hostname != m.Spec.Name {
		a = append(a, m.Spec.Hostname)
	}
	return a
}

func (m *Machine) address(n network.Network) netip.Prefix {
	return netip.PrefixFrom(m.Lease.Address, n.Subnet.Bits())
}
