// Package vmm starts and stops instances: one VMM process each, with its disks, NICs, agent channel and console.
// It knows nothing of images, networks or machines; those rooms hand it files and sockets.
// Imported by machine and the drivers. A Driver and an Instance may be used from several goroutines.
package vmm

import (
	"context"
	"net"
)

// Spec is what a driver needs to start one instance. Paths are absolute.
type Spec struct {
	ID          string // names the instance in logs; safe as a file name
	Dir         string // exists, mode 0700: the driver keeps its sockets, pid file, argv and console.log here
	Kernel      Kernel
	Firmware    *Firmware // boots the first disk, in a machine with PCI and ACPI; then Kernel is empty
	CPUs        int
	MemoryBytes int64
	Disks       []Disk // in this order: the guest sees /dev/vda, /dev/vdb, …
	NICs        []NIC
	Shares      []Share
	// Tethered: the instance ends with the process that starts it, however that ends. There is nothing to recover then.
	Tethered  bool
	PowersOff bool // the guest switches itself off; without it only a reset is sure to end the VMM
	NoAgent   bool // nothing in the guest listens to us: the agent's port is left out
}

// Firmware is what a machine has that boots from its disk, like hardware. A reset of the guest is its own affair: the instance goes on.
type Firmware struct {
	Kind   string // BIOS or UEFI; the latter keeps its variables in Spec.Dir
	UUID   string // of the machine, in SMBIOS
	Serial string // its serial number there
}

// The kinds of firmware.
const (
	BIOS = "bios"
	UEFI = "uefi"
)

// Kernel is what boots: an uncompressed ELF kernel, its initramfs, and what the kernel is able to do.
type Kernel struct {
	Path      string
	Initramfs string // empty: none
	Args      string // the kernel's own part of the command line; the driver adds what its machine type needs
	// DropArgs are words that the driver would add and is not to: those that make a boot faster can be left out.
	DropArgs []string
	// NeedsACPI: the kernel cannot find virtio-mmio devices from its command line (Debian's kernels).
	NeedsACPI bool
	// BuiltIn: it reaches a disk without modules.
	BuiltIn bool
	// ACPI: the kernel can find them by ACPI, which has room for more.
	ACPI bool
}

// Disk is a disk image, raw unless it says otherwise.
type Disk struct {
	Path     string
	ReadOnly bool  // shared with other instances: the driver takes no lock on it
	QCOW2    bool  // whatever the file itself says of a backing file is not followed
	Backing  *Disk // of a QCOW2 disk: where the guest reads what the disk does not hold itself; read-only
}

// NIC is a network card whose frames travel as datagrams, one Ethernet frame each, between two unix sockets.
// The driver binds Local; the network's helper binds Remote and may be restarted at any time.
type NIC struct {
	MAC    string
	MTU    int
	Local  string
	Remote string
}

// Share is a directory of the host that the guest mounts as virtio-fs by its tag: owners, modes, devices and links are the host's own.
// The guest reaches nothing outside it. What is mounted below Path later is seen, unless the share is read-only.
type Share struct {
	Tag      string // at most 36 bytes
	Path     string
	ReadOnly bool
}

// Driver starts instances of one VMM.
type Driver interface {
	Name() string
	// Probe says what the driver can do on this host; it really runs a guest where that is the only proof.
	// The answer may be cached by the driver; ctx bounds the wait.
	Probe(ctx context.Context) (Capabilities, error)
	// Start runs the VMM in a session of its own, so that it outlives the caller, and returns when its process runs. A process that
	// ends at once is reported by DialAgent and Done, with its own words. On an error nothing is left behind.
	Start(ctx context.Context, spec Spec) (Instance, error)
	// Recover takes back an instance that an earlier process started in spec.Dir. errdefs.ErrNotFound: it runs no longer;
	// then whatever it left in Dir but the console is removed.
	Recover(ctx context.Context, spec Spec) (Instance, error)
}

// Capabilities is what a driver can do on this host.
type Capabilities struct {
	Version     string
	Accelerator string // kvm, tcg
	Warning     string // why the fastest accelerator is not used; empty when it is
	Hint        string // the command that mends it
}

// Instance is a running VMM. Whoever starts or recovers it must Close it.
type Instance interface {
	PID() int
	Accelerator() string
	// DialAgent waits for the VMM's control socket and opens the raw byte stream to the agent's port; the guest may not listen yet.
	// One connection at a time: a new one replaces the old. errdefs.ErrUnavailable: the VMM has ended, and why.
	DialAgent(ctx context.Context) (net.Conn, error)
	// Done is closed when the VMM process has ended, within a second of its death.
	Done() <-chan struct{}
	// Exit says why; valid after Done.
	Exit() Exit
	// Kill ends the VMM process with SIGKILL and waits for its end.
	Kill(ctx context.Context) error
	// Close lets go of the instance, which runs on.
	Close() error
}

// Exit is how an instance ended.
type Exit struct {
	Reason Reason
	Detail string // the VMM's own words or signal, for a person
	Reset  bool   // with ReasonGuest: it asked for a reset, not to be switched off
}

// Reason is the VMM's view of the end; only the agent knows more.
type Reason string

const (
	ReasonGuest Reason = "guest"    // the guest powered off, reset or halted
	ReasonPanic Reason = "panic"    // the guest's kernel panicked
	ReasonDied  Reason = "vmm-died" // the VMM process was killed or crashed
)

// Pauser is a driver extra: instances that can be paused.
type Pauser interface {
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
}

// PowerButton is a driver extra: instances whose guest can be asked to switch itself off. A guest that is not listening yet misses it.
type PowerButton interface {
	PressPowerButton(ctx context.Context) error
}

// Console is a driver extra: the serial console as a raw byte stream, from now on. All that the guest writes goes to ConsoleFile too,
// whether or not there is a connection. One at a time, which must be read: a guest waits for a reader that does not keep up.
// errdefs.ErrUnavailable: the VMM has ended, and why.
type Console interface {
	DialConsole(ctx context.Context) (net.Conn, error)
}

// ConsoleFile is the file in Spec.Dir that gets the serial console, kept after the instance ended.
const ConsoleFile = "console.log"
