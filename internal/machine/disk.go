package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"

	"github.com/atollvm/atoll/internal/diskimage"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/metadata"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/atollvm/atoll/internal/vmm"
)

// A machine with a Spec.Disk boots a disk image that somebody else has made, with a system of its own: no agent of ours is in it. What
// the host knows of such a guest it knows from its VMM and its serial console.

const (
	overlayFile = "disk.qcow2" // what the machine has written, over its disk image
	seedFile    = "seed.iso"   // what cloud-init finds
	seedLabel   = "CIDATA"
)

// ownSystem says whether the guest is not ours: it has no agent.
func (m *Machine) ownSystem() bool { return m.Spec.Disk != "" }

// noAgent is the error of what only an agent could do.
func noAgent(m *Machine) error {
	err := fmt.Errorf("machine %q runs the system of its disk image, without Atoll's agent: %w", m.Spec.Name, errdefs.ErrFailedPrecondition)
	return hint.With(err, "use ssh, with port 22 published, or: atoll console %s", m.Spec.Name)
}

// checkDisk refuses what is only for images: a disk image's system decides that for itself.
func (s Spec) checkDisk(fault func(help, format string, args ...any)) {
	const help = "leave it out: the disk image's own system decides that"
	for _, f := range []struct {
		flag  string
		given bool
	}{
		{"--entrypoint", s.SetEntrypoint}, {"--env", len(s.Env) > 0}, {"--workdir", s.WorkingDir != ""}, {"--user", s.User != ""}, {"--tty", s.TTY},
		{"--interactive", s.Stdin}, {"--platform", s.Platform != ""}, {"--stop-signal", s.StopSignal != ""}, {"--verity", s.Verity},
		{"--init", s.Init != InitAuto}, {"--read-only", s.ReadOnly}, {"--tmpfs or --shm-size", len(s.Tmpfs) > 0}, {"--ulimit", len(s.Ulimits) > 0},
		{"--sysctl", len(s.Sysctls) > 0}, {"--add-host", len(s.AddHosts) > 0}, {"--dns", len(s.DNS)+len(s.DNSSearch)+len(s.DNSOptions) > 0},
		{"--publish-all", s.PublishAll}, {"--health-… or --no-healthcheck", !reflect.ValueOf(s.Health).IsZero()},
		{"--kernel-args without --kernel", len(s.KernelArgs) > 0 && s.Kernel == ""},
	} {
		if f.given {
			fault(help, "%s does not go with --disk", f.flag)
		}
	}
	if s.Image != "" || len(s.Command) > 0 {
		fault("leave out one of both", "an image or a command does not go with --disk")
	}
	switch {
	case s.Kernel != "" && s.Firmware != "":
		fault("leave out one of both", "a kernel boots without firmware")
	case s.Firmware == vmm.BIOS && runtime.GOARCH != "amd64":
		fault("use uefi", "there is no BIOS on %s", runtime.GOARCH)
	case s.Kernel == "" && s.Firmware != vmm.BIOS && s.Firmware != vmm.UEFI:
		fault("use bios or uefi", "firmware %q", shorten(s.Firmware))
	}
}

// defaultFirmware is what most images for the architecture boot with.
func defaultFirmware() string {
	if runtime.GOARCH == "amd64" {
		return vmm.BIOS
	}
	return vmm.UEFI
}

// openDisk looks at the image of a machine that is to be made, and says how large its disk becomes. sized: the user has said so.
func openDisk(s *Spec, sized bool) (*diskimage.Image, error) {
	img, err := diskimage.Open(s.Disk)
	if err != nil {
		return nil, err
	}
	if img.Format == diskimage.Raw && !img.Bootable && s.Kernel == "" {
		err := fmt.Errorf("disk image %s: it has neither a boot sector nor a partition table: %w", s.Disk, errdefs.ErrInvalidArgument)
		return nil, hint.With(err, "give a bootable disk image, or a --kernel to boot it with")
	}
	if !sized {
		s.DiskBytes = max(s.DiskBytes, img.Size)
	}
	if s.DiskBytes < img.Size {
		err := fmt.Errorf("disk image %s: its disk has %s, more than --disk-size %s: %w", s.Disk, units.BytesSize(float64(img.Size)),
			units.BytesSize(float64(s.DiskBytes)), errdefs.ErrInvalidArgument)
		return nil, hint.With(err, "a disk can only grow: leave out --disk-size, or give more")
	}
	return &img, nil
}

// diskSteps start a machine of a disk image. It runs as soon as its VMM does: what goes on in it is its own affair.
func (s *starting) diskSteps(driver vmm.Driver) []step {
	return []step{
		{"kernel", s.findDiskKernel},
		{"disk image", s.makeOverlay},
		{"seed", s.makeSeed},
		{"network", s.attachNetwork},
		{"vmm", func(ctx context.Context) error { return s.startVMM(ctx, driver) }},
		{"console", func(ctx context.Context) error { return s.run.line.check(ctx) }},
	}
}

// findDiskKernel finds the kernel that is to boot in the place of the image's own.
func (s *starting) findDiskKernel(ctx context.Context) error {
	if s.m.Spec.Kernel == "" {
		return nil
	}
	if err := s.findKernel(ctx); err != nil {
		return err
	}
	if !s.kernel.BuiltIn {
		err := fmt.Errorf("kernel %q needs modules to reach a disk, and the disk image has none for it: %w", s.m.VMM.Kernel, errdefs.ErrFailedPrecondition)
		return hint.With(err, "use one with everything built in (atoll kernel build), or leave out --kernel")
	}
	s.kernel.Initramfs = ""
	args := []string{"root=/dev/vda1 rw"} // of several roots the last counts
	if s.m.Spec.Network != NoNetwork && !s.m.Spec.Metadata.Disabled {
		// Such a kernel may not know ISO 9660, as ours does not. By this name all versions of cloud-init know what to do.
		args = append(args, "ds=nocloud-net;s="+metadata.NoCloudURL())
	}
	s.kernel.Args = strings.TrimSpace(strings.Join(append(args, s.kernel.Args), " "))
	return nil
}

// makeOverlay makes the machine's own disk at the first start. It is worth nothing over another image than that.
func (s *starting) makeOverlay(context.Context) error {
	if err := s.m.Disk.Check(); err != nil {
		return err
	}
	path := filepath.Join(s.e.dir, overlayFile)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	return s.m.Disk.Overlay(path, s.m.Spec.DiskBytes)
}

// makeSeed writes what the image's cloud-init is told. The disk is there at every boot, as cloud-init looks at it to tell a first boot
// from others.
func (s *starting) makeSeed(context.Context) error {
	r, err := requestOf(s.e.dir)
	if err != nil {
		return err
	}
	s.request = r
	if s.m.Provisioning.Due == DueAgain {
		s.m.Provisioning.Rounds++
	}
	if s.digest, err = digestOf(*r); err != nil {
		return err
	}
	files, err := r.NoCloud(s.m.instanceID(), s.m.Spec.Hostname)
	if err != nil {
		return err
	}
	return diskimage.WriteSeed(filepath.Join(s.e.dir, seedFile), seedLabel, files)
}

// requestOf is the provisioning of the machine in a directory.
func requestOf(dir string) (*provision.Request, error) {
	var k kept
	err := readWhole(filepath.Join(dir, requestFile), &k)
	return &k.Request, err
}

// instanceID is by what cloud-init tells whether it has seen this machine before: with another one it takes the boot for a first one.
func (m *Machine) instanceID() string {
	id := "i-" + string(m.ID)[:17] // as long as EC2's
	if n := m.Provisioning.Rounds; n > 0 {
		id += fmt.Sprintf("-%d", n)
	}
	return id
}

// diskProvisioned is the record's new status. The guest has been told; what it makes of that it does not say.
func (s *starting) diskProvisioned() {
	p := &s.m.Provisioning
	p.Due, p.Done, p.Digest, p.FailedStep, p.ExitCode = DueNothing, time.Now(), s.digest, "", nil
}

func (s *starting) diskSpec() vmm.Spec {
	id := string(s.m.ID)
	spec := vmm.Spec{
		ID:          s.m.ID.Short(),
		Dir:         s.e.dir,
		Kernel:      s.kernel,
		CPUs:        s.m.Spec.CPUs,
		MemoryBytes: s.m.Spec.MemoryBytes,
		Disks: []vmm.Disk{
			{Path: filepath.Join(s.e.dir, overlayFile), QCOW2: true, Backing: &vmm.Disk{Path: s.m.Disk.Path, QCOW2: s.m.Disk.Format == diskimage.QCOW2}},
			{Path: filepath.Join(s.e.dir, seedFile), ReadOnly: true},
		},
		NICs:      s.nic,
		PowersOff: true,
		NoAgent:   true,
	}
	if s.m.Spec.Kernel == "" {
		spec.Firmware = &vmm.Firmware{
			Kind: s.m.Spec.Firmware, Serial: id,
			UUID: strings.Join([]string{id[:8], id[8:12], id[12:16], id[16:20], id[20:]}, "-"),
		}
	}
	return spec
}

// pressEvery is how often a guest is asked again to switch itself off: one that is still booting misses it.
const pressEvery = 10 * time.Second

// press presses the power button until ctx ends.
func (ms *Machines) press(ctx context.Context, r *run) {
	tick := time.NewTicker(pressEvery)
	defer tick.Stop()
	for {
		if err := r.press(ctx); err != nil {
			ms.Log.Debug("pressing the power button", "machine", r.e.get().ID, "err", err)
		}
		select {
		case <-tick.C:
		case <-r.inst.Done():
			return
		case <-ctx.Done():
			return
		}
	}
}

func (r *run) press(ctx context.Context) error {
	b, ok := r.inst.(vmm.PowerButton)
	if !ok {
		return fmt.Errorf("this VMM has no power button: %w", errdefs.ErrNotImplemented)
	}
	return b.PressPowerButton(ctx)
}
