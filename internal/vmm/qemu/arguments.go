package qemu

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/vmm"
)

const (
	minMemory   = 64 << 20
	maxSocket   = 107 // bytes of a unix socket's path: sun_path less its NUL
	maxTag      = 36  // bytes of a share's tag in the device's configuration
	mmioDevices = 8   // virtio-mmio slots of microvm without ACPI
	acpiDevices = 23  // and with it: QEMU 7.2 has 24 (hw/i386/microvm.c), but with all in use Linux 6.1 does not find every device
	ownDevices  = 2   // the agent's port and the random number device take a slot each
	pciDevices  = 26  // of the 32 slots of a PCI bus; the machine itself takes up to three, as does what makes panics known
)

// host is what the command line depends on besides the spec.
type host struct {
	arch        string
	accelerator string
	tscKHz      int // of the host's clock; 0 when it is not constant
	uefi        uefi
}

// check refuses what QEMU would refuse later, or only by hanging. It gathers every fault.
func check(spec vmm.Spec, h host) error {
	var faults []error
	invalid := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	if spec.MemoryBytes < minMemory {
		invalid("memory of %d bytes is less than %d MiB", spec.MemoryBytes, minMemory>>20)
		faults = append(faults[:len(faults)-1], hint.With(faults[len(faults)-1], "give the machine at least %dM of memory", minMemory>>20))
	}
	if spec.CPUs < 1 {
		invalid("%d CPUs", spec.CPUs)
	}
	if n, most := len(spec.Disks)+len(spec.NICs)+len(spec.Shares), slots(spec, h)-ownDevices; n > most {
		invalid("%d disks, NICs and shares, but there is room for %d", n, most)
	}
	paths := []string{filepath.Join(spec.Dir, agentSocket)}
	for i, s := range spec.Shares {
		paths = append(paths, shareSocket(spec.Dir, i))
		if len(s.Tag) < 1 || len(s.Tag) > maxTag {
			invalid("share %s: tag %q: it needs 1 to %d bytes", s.Path, s.Tag, maxTag)
		}
	}
	for _, n := range spec.NICs {
		paths = append(paths, n.Local, n.Remote)
	}
	for _, s := range paths {
		if len(s) > maxSocket {
			faults = append(faults, hint.With(fmt.Errorf("socket %s: its path is longer than %d bytes: %w", s, maxSocket, errdefs.ErrInvalidArgument),
				"use a shorter ATOLL_HOME"))
		}
	}
	var files []string
	switch f := spec.Firmware; {
	case f == nil:
		if err := checkKernel(spec.Kernel.Path, h.arch); err != nil {
			faults = append(faults, err)
		}
		if spec.Kernel.Initramfs != "" {
			files = append(files, spec.Kernel.Initramfs)
		}
	case f.Kind == vmm.BIOS && h.arch != "amd64":
		invalid("there is no BIOS on %s", h.arch)
		faults[len(faults)-1] = hint.With(faults[len(faults)-1], "use UEFI firmware")
	}
	for _, d := range spec.Disks {
		files = append(files, d.Path)
		if d.Backing != nil {
			files = append(files, d.Backing.Path)
		}
	}
	for _, s := range spec.Shares {
		files = append(files, s.Path)
	}
	for _, name := range files {
		if _, err := os.Stat(name); err != nil {
			faults = append(faults, class(err))
		}
	}
	return errors.Join(faults...)
}

// slots is how many virtio devices the machine has room for.
func slots(spec vmm.Spec, h host) int {
	if spec.Firmware != nil {
		return pciDevices
	}
	if h.arch == "amd64" && !useACPI(spec) {
		return mmioDevices
	}
	return acpiDevices
}

// useACPI: a kernel boots faster with its devices on the command line. It gets ACPI when it needs that, when it has more devices than a
// machine without ACPI has room for, or when it is to switch itself off: without ACPI a microvm stays on, halted.
func useACPI(spec vmm.Spec) bool {
	many := len(spec.Disks)+len(spec.NICs)+len(spec.Shares)+ownDevices > mmioDevices
	return spec.Kernel.NeedsACPI || spec.Kernel.ACPI && (many || spec.PowersOff)
}

func class(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return err
}

// checkKernel looks at the file's first bytes: QEMU would run a file of zeros, and hang.
func checkKernel(path, arch string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening the kernel: %w", class(err))
	}
	defer f.Close()
	head := make([]byte, 64)
	if _, err := io.ReadFull(f, head); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading kernel %s: %w", path, err)
	}
	const x86, i386 = 62, 3 // ELF machines
	var good bool
	switch machine := binary.LittleEndian.Uint16(head[18:]); arch {
	case "amd64":
		good = bytes.HasPrefix(head, []byte("\x7fELF")) && (machine == x86 || machine == i386)
	case "arm64":
		good = string(head[56:60]) == "ARM\x64" // the Image format
	}
	if good {
		return nil
	}
	return hint.With(fmt.Errorf("%s is no uncompressed kernel for %s: %w", path, arch, errdefs.ErrInvalidArgument),
		"get a kernel that works: atoll kernel pull")
}

// arguments is QEMU's command line without its name. The listening sockets are inherited from fd 3 on, in the order of sockets.
func arguments(spec vmm.Spec, h host) []string {
	args := []string{
		"-name", escape(spec.ID),
		"-no-user-config", "-nodefaults", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", machine(spec, h),
		"-accel", h.accelerator,
		"-cpu", cpu(h),
		"-smp", strconv.Itoa(spec.CPUs),
		"-m", strconv.FormatInt(spec.MemoryBytes>>20, 10) + "M",
	}
	if len(spec.Shares) > 0 {
		// virtiofsd works on the guest's memory, and speaks the virtio of today only.
		args = append(args,
			"-object", fmt.Sprintf("memory-backend-memfd,id=memory,share=on,size=%dM", spec.MemoryBytes>>20),
			"-global", "virtio-mmio.force-legacy=false")
	}
	bus := "device" // virtio-mmio, whose devices QEMU names so
	if spec.Firmware == nil {
		args = append(args, "-no-reboot", "-kernel", spec.Kernel.Path)
		if spec.Kernel.Initramfs != "" {
			args = append(args, "-initrd", spec.Kernel.Initramfs)
		}
		args = append(args, "-append", kernelArguments(spec, h))
	} else {
		bus = "pci"
		args = append(args, firmwareArguments(spec, h)...)
	}
	args = append(args,
		"-chardev", "socket,id=qmp,fd=3,server=on,wait=off",
		"-mon", "chardev=qmp,mode=control",
		// The log gets everything, with a connection or without. It is appended to: the machine room may empty it.
		"-chardev", "socket,id=console,fd=4,server=on,wait=off,logappend=on,logfile="+escape(filepath.Join(spec.Dir, vmm.ConsoleFile)),
		"-serial", "chardev:console",
	)
	// QEMU gives devices their virtio-mmio slots in the order of the command line, which is the guest's order too. Slots are not named:
	// with ACPI, Linux 6.1 finds nothing in slot 0.
	device := func(format string, more ...any) { args = append(args, "-device", fmt.Sprintf(format, more...)) }
	if !spec.NoAgent {
		args = append(args, "-chardev", "socket,id=agent,fd=5,server=on,wait=off")
		device("virtio-serial-%s,id=ports,max_ports=2", bus)
		device("virtserialport,bus=ports.0,chardev=agent,name=atoll.agent,id=agent") // only with an id QEMU tells when the guest closes it
	}
	device("virtio-rng-%s", bus)
	for i, d := range spec.Disks {
		args = append(args, blockdevs(d, fmt.Sprint("disk", i))...)
		text := fmt.Sprintf("virtio-blk-%s,drive=disk%d", bus, i)
		if spec.Firmware != nil && i == 0 {
			text += ",bootindex=0"
		}
		device("%s", text)
	}
	for i, n := range spec.NICs {
		args = append(args, "-netdev", fmt.Sprintf("dgram,id=nic%d,local.type=unix,local.path=%s,remote.type=unix,remote.path=%s",
			i, escape(n.Local), escape(n.Remote)))
		text := fmt.Sprintf("virtio-net-%s,netdev=nic%d,mac=%s,host_mtu=%d", bus, i, n.MAC, n.MTU)
		if spec.Firmware != nil {
			text += ",romfile=" // nobody boots from the network
		}
		device("%s", text)
	}
	for i, s := range spec.Shares {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=share%d,path=%s", i, escape(shareSocket(spec.Dir, i))))
		device("vhost-user-fs-%s,chardev=share%d,tag=%s,queue-size=1024", bus, i, escape(s.Tag))
	}
	return args
}

// blockdevs are the arguments that make a disk's image, and first what lies below it.
func blockdevs(d vmm.Disk, node string) []string {
	format := "raw"
	if d.QCOW2 {
		format = "qcow2"
	}
	text := fmt.Sprintf("driver=%s,node-name=%s,file.driver=file,file.filename=%s", format, node, escape(d.Path))
	if d.ReadOnly {
		text += ",read-only=on,file.locking=off"
	} else {
		text += ",discard=unmap"
	}
	if d.Backing == nil {
		return []string{"-blockdev", text}
	}
	base := node + "-base"
	if !d.Backing.QCOW2 {
		return append(blockdevs(vmm.Disk{Path: d.Backing.Path, ReadOnly: true}, base), "-blockdev", text+",backing="+base)
	}
	// As JSON, which alone can say that there is nothing below: QEMU would open what the file's header names.
	below, err := json.Marshal(map[string]any{
		"driver": "qcow2", "node-name": base, "read-only": true, "backing": nil,
		"file": map[string]any{"driver": "file", "filename": d.Backing.Path, "locking": "off"},
	})
	if err != nil {
		panic(err) // strings and constants: it cannot fail
	}
	return []string{"-blockdev", string(below), "-blockdev", text + ",backing=" + base}
}

// escape keeps a comma in a value from ending it.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }

func machine(spec vmm.Spec, h host) string {
	name := "microvm,acpi=off"
	switch {
	case spec.Firmware != nil:
		name = firmwareMachine(spec, h)
	case h.arch == "arm64":
		name = "virt,gic-version=max"
	case useACPI(spec):
		name = "microvm,acpi=on"
	}
	if len(spec.Shares) > 0 {
		name += ",memory-backend=memory"
	}
	return name
}

func cpu(h host) string {
	switch {
	case h.accelerator == "kvm":
		return "host"
	case h.arch == "amd64":
		return "max,-erms,-fsrm" // emulated, rep movsb is a loop over bytes: without it copies are two to four times as fast
	}
	return "max"
}

// kernelArguments is the guest kernel's command line: what the machine needs, then the kernel's own part, which so has the last word.
func kernelArguments(spec vmm.Spec, h host) string {
	args := []string{"panic=-1", "quiet"} // a panic is printed all the same, and ends QEMU
	if h.arch == "arm64" {
		args = append(args, "console=ttyAMA0")
	} else {
		args = append(args, "console=ttyS0", "reboot=t")
	}
	if h.arch == "amd64" && !useACPI(spec) && spec.Kernel.ACPI {
		args = append(args, "acpi=off") // there is none: left alone, the kernel looks for it and complains
	}
	if h.arch == "amd64" && h.accelerator == "tcg" {
		args = append(args, emulatedArguments(spec, h.tscKHz)...)
	}
	args = slices.DeleteFunc(args, func(a string) bool { return slices.Contains(spec.Kernel.DropArgs, a) })
	if spec.Kernel.Args != "" {
		args = append(args, spec.Kernel.Args)
	}
	return strings.Join(args, " ")
}

// emulatedArguments saves an emulated x86 kernel much of what it would measure about its clocks, and its text patching.
func emulatedArguments(spec vmm.Spec, tscKHz int) []string {
	// The mitigations of processor faults are sequences of instructions that mean nothing once they are translated; an own kernel's boot takes
	// 0.56 s of CPU time with them and 0.47 s without.
	args := []string{"no_timer_check", "mitigations=off"}
	if tscKHz > 0 {
		// Emulated, the guest's TSC is the host's. Without the figure a kernel on a busy host finds none ("Unable to calibrate
		// against PIT") and may hang.
		args = append(args, fmt.Sprintf("tsc_early_khz=%d", tscKHz), "tsc=reliable")
	}
	if spec.CPUs == 1 {
		args = append(args, "noreplace-smp")
		if !useACPI(spec) {
			// The PIT ticks in its place, which saves the 0.2 s that it takes to calibrate the local APIC's timer. Only without ACPI: with
			// it no interrupt of the PIT arrives, and timers stop for ever.
			args = append(args, "nolapic_timer")
		}
	}
	return args
}
