package qemu

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/atollvm/atoll/internal/vmm/vmmtest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestSuite(t *testing.T) {
	f := vmmtest.FromEnv(t)
	dir := t.TempDir()
	vmmtest.Run(t, func(t *testing.T) vmm.Driver {
		d := newDriver(t)
		d.opts.Dir = dir // as a restarted daemon: the probe's answer is kept
		return d
	}, f)
}

func TestFirmwareVariablesAreKeptUnlessShort(t *testing.T) {
	dir := t.TempDir()
	u := uefi{variables: filepath.Join(dir, "template")}
	path := filepath.Join(dir, variablesFile)
	for _, step := range []struct{ there, want string }{{"", "template"}, {"machine!", "machine!"}, {"tem", "template"}} {
		if err := os.WriteFile(u.variables, []byte("template"), 0o600); err != nil {
			t.Fatal(err)
		}
		if step.there != "" {
			if err := os.WriteFile(path, []byte(step.there), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := u.makeVariables(dir); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); string(got) != step.want {
			t.Errorf("with %q there: %q, %v", step.there, got, err)
		}
	}
}

func TestArguments(t *testing.T) {
	small := vmm.Spec{ID: "small", Dir: "/run/small", CPUs: 1, MemoryBytes: 256 << 20, Kernel: vmm.Kernel{Path: "/k/vmlinux", Initramfs: "/k/initramfs"}}
	full := small
	full.ID, full.Dir, full.CPUs, full.MemoryBytes = "full", "/run/a,b", 4, 2<<30
	full.Kernel.NeedsACPI, full.Kernel.Args = true, "quiet net.ifnames=0"
	full.Disks = []vmm.Disk{{Path: "/d/root,disk", ReadOnly: true}, {Path: "/d/scratch"}}
	full.NICs = []vmm.NIC{{MAC: "52:54:00:00:00:01", MTU: 65520, Local: "/run/a,b/nic0", Remote: "/net/a,b"}}
	shares := small
	shares.Shares = []vmm.Share{{Tag: "build", Path: "/srv/a"}, {Tag: "a,b", Path: "/srv/b", ReadOnly: true}}
	// Our own kernel takes its devices from its command line, as long as there is room for them.
	own := full
	own.Kernel.NeedsACPI, own.Kernel.ACPI, own.CPUs = false, true, 1
	many := own
	many.CPUs = 2
	for i := range 5 {
		many.Disks = append(many.Disks, vmm.Disk{Path: fmt.Sprint("/d/volume", i)})
	}
	// A disk image with a system of its own.
	disk := vmm.Spec{
		ID: "disk", Dir: "/run/a,b", CPUs: 2, MemoryBytes: 1 << 30, NoAgent: true, PowersOff: true, NICs: full.NICs,
		Firmware: &vmm.Firmware{Kind: vmm.BIOS, UUID: "00112233-4455-6677-8899-aabbccddeeff", Serial: "a,b"},
		Disks: []vmm.Disk{
			{Path: "/run/a,b/disk", QCOW2: true, Backing: &vmm.Disk{Path: "/d/image,qcow2", QCOW2: true}},
			{Path: "/run/a,b/seed", ReadOnly: true},
		},
	}
	efi := disk
	efi.Firmware = &vmm.Firmware{Kind: vmm.UEFI}
	efi.Disks = []vmm.Disk{{Path: "/run/a,b/disk", QCOW2: true, Backing: &vmm.Disk{Path: "/d/image,raw"}}}
	firmware := uefi{"/f/code", "/f/variables"}
	direct := own
	direct.NoAgent, direct.PowersOff, direct.Kernel.Initramfs = true, true, ""
	for name, c := range map[string]struct {
		spec vmm.Spec
		host host
	}{
		"disk-bios":   {disk, host{arch: "amd64", accelerator: "kvm"}},
		"disk-uefi":   {efi, host{arch: "amd64", accelerator: "tcg", uefi: firmware}},
		"disk-arm64":  {efi, host{arch: "arm64", accelerator: "tcg", uefi: firmware}},
		"disk-direct": {direct, host{arch: "amd64", accelerator: "tcg"}},
		"shares-tcg":  {shares, host{arch: "amd64", accelerator: "tcg", tscKHz: 2500000}},
		"own-tcg":     {own, host{arch: "amd64", accelerator: "tcg", tscKHz: 2500000}},
		"many-tcg":    {many, host{arch: "amd64", accelerator: "tcg", tscKHz: 2500000}},
		"small-kvm":   {small, host{arch: "amd64", accelerator: "kvm", tscKHz: 2500000}},
		"small-tcg":   {small, host{arch: "amd64", accelerator: "tcg", tscKHz: 2500000}},
		"full-kvm":    {full, host{arch: "amd64", accelerator: "kvm", tscKHz: 2500000}},
		"full-tcg":    {full, host{arch: "amd64", accelerator: "tcg"}},
		"full-arm64":  {full, host{arch: "arm64", accelerator: "tcg"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := strings.ReplaceAll(strings.Join(arguments(c.spec, c.host), "\n"), "\n-", "\n\n-") + "\n"
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("arguments differ (-want +got); go test -update rewrites them:\n%s", diff)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	kernel := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(kernel, probeGuest(), 0o600); err != nil {
		t.Fatal(err)
	}
	good := vmm.Spec{ID: "x", Dir: "/run/x", CPUs: 1, MemoryBytes: minMemory, Kernel: vmm.Kernel{Path: kernel, Initramfs: kernel}}
	if err := check(good, host{arch: "amd64"}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*vmm.Spec)
		text   string
		hinted bool
	}{
		"memory":      {func(s *vmm.Spec) { s.MemoryBytes = 1 << 20 }, "memory of 1048576 bytes", true},
		"long path":   {func(s *vmm.Spec) { s.Dir = "/" + strings.Repeat("x", 120) }, "longer than 107", true},
		"many disks":  {func(s *vmm.Spec) { s.Disks = make([]vmm.Disk, 7) }, "room for 6", false},
		"share's tag": {func(s *vmm.Spec) { s.Shares = []vmm.Share{{Path: "/", Tag: strings.Repeat("x", 37)}} }, "1 to 36 bytes", false},
		"very many":   {func(s *vmm.Spec) { s.Kernel.ACPI, s.Disks = true, make([]vmm.Disk, 22) }, "room for 21", false},
		"kernel":      {func(s *vmm.Spec) { s.Kernel.Path = "/etc/passwd" }, "no uncompressed kernel", true},
		"both faults": {func(s *vmm.Spec) { s.CPUs, s.MemoryBytes = 0, 0 }, "0 CPUs", true},
	} {
		spec := good
		c.change(&spec)
		err := check(spec, host{arch: "amd64"})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.text) || (hint.Of(err) != "") != c.hinted {
			t.Errorf("%s: %v, hint %q", name, err, hint.Of(err))
		}
	}
	bios := good
	bios.Kernel, bios.Firmware = vmm.Kernel{}, &vmm.Firmware{Kind: vmm.BIOS}
	if err := check(bios, host{arch: "amd64"}); err != nil {
		t.Errorf("BIOS, without a kernel: %v", err)
	}
	if err := check(bios, host{arch: "arm64"}); !errdefs.IsInvalidArgument(err) || hint.Of(err) == "" {
		t.Errorf("BIOS on arm64: %v", err)
	}
	bios.Disks = []vmm.Disk{{Path: kernel, QCOW2: true, Backing: &vmm.Disk{Path: "/nowhere"}}}
	if err := check(bios, host{arch: "amd64"}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("a disk over one that is not there: %v", err)
	}
	if err := checkKernel(kernel, "arm64"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an x86 kernel on arm64: %v", err)
	}
}

// QEMU itself finds fault: its words come out, and nothing stays.
func TestEarlyEnd(t *testing.T) {
	d := newDriver(t)
	spec := probeSpec(t)
	spec.NICs = []vmm.NIC{{MAC: "no MAC", MTU: 1500, Local: filepath.Join(spec.Dir, "l"), Remote: filepath.Join(spec.Dir, "r")}}
	i, err := d.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := i.DialAgent(ctx); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no MAC") {
		t.Errorf("error %v", err)
	}
	if e := i.Exit(); e.Reason != vmm.ReasonDied {
		t.Errorf("exit %+v", e)
	}
	for _, name := range []string{pidFile, argvFile, agentSocket, qmpSocket, stderrFile} {
		if _, err := os.Lstat(filepath.Join(spec.Dir, name)); err == nil {
			t.Errorf("%s is left behind", name)
		}
	}
}

// probeSpec boots the probe guest, which without its exit port just halts: an instance that needs no kernel.
func probeSpec(t *testing.T) vmm.Spec {
	dir, err := os.MkdirTemp("", "qemu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	kernel := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(kernel, probeGuest(), 0o600); err != nil {
		t.Fatal(err)
	}
	return vmm.Spec{ID: "probe", Dir: dir, CPUs: 1, MemoryBytes: minMemory, Kernel: vmm.Kernel{Path: kernel, Initramfs: kernel}}
}

func TestStartTakesNoTime(t *testing.T) {
	d := newDriver(t)
	if _, err := d.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	spec := probeSpec(t)
	began := time.Now()
	i, err := d.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	defer i.Close()
	defer i.Kill(t.Context())
	if err := i.(*instance).ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("Start took %v, QMP answers after %v", took, time.Since(began))
	if took > 100*time.Millisecond {
		t.Errorf("Start took %v", took)
	}
	if _, err := d.Start(t.Context(), spec); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second start in the same directory: %v", err)
	}
}

// The daemon dies between the start of QEMU and the writing of its pid, or the pid is a stranger's by now.
func TestFindWithoutPID(t *testing.T) {
	d := newDriver(t)
	spec := probeSpec(t)
	i, err := d.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	defer i.Kill(t.Context())
	name := filepath.Join(spec.Dir, pidFile)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if pid, err := find(spec.Dir); pid != i.PID() {
		t.Errorf("found %d, %v instead of %d", pid, err, i.PID())
	}
	if err := os.WriteFile(name, fmt.Appendln(nil, os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	if pid, err := find(spec.Dir); !errdefs.IsNotFound(err) {
		t.Errorf("took process %d for QEMU, %v", pid, err)
	}
}

func TestMeasureTSC(t *testing.T) {
	if arch != "amd64" {
		t.Skip("x86-64 only")
	}
	first, second := measureTSC(t.Context()), measureTSC(t.Context())
	if first == 0 {
		t.Skip("this host's TSC is not constant")
	}
	t.Logf("%d and %d kHz", first, second)
	if d := first - second; max(d, -d) > first/10000 {
		t.Errorf("%d and %d kHz differ by more than 100 ppm", first, second)
	}
}

// Our own kernel finds every device, in the order of the spec: from its command line, and by ACPI when they are too many for that.
func TestOwnKernel(t *testing.T) {
	path := os.Getenv("ATOLL_TEST_OWN_KERNEL")
	if path == "" {
		t.Skip("ATOLL_TEST_OWN_KERNEL is not set: make test sets it to a kernel that atoll kernel build has built")
	}
	g := vmmtest.NewGuest(t, newDriver(t), vmmtest.Fixture{Kernel: vmm.Kernel{Path: path, ACPI: true}})
	for _, c := range []struct {
		cpus, disks int
		online      string
		acpi        string
	}{{1, 6, "0", "acpi=off"}, {2, 6, "0-1", "acpi=off"}, {2, acpiDevices - ownDevices, "0-1", "acpi=on"}} {
		t.Run(fmt.Sprintf("%d CPUs, %d disks", c.cpus, c.disks), func(t *testing.T) {
			spec := g.Spec(t)
			spec.CPUs = c.cpus
			for i := range c.disks {
				name := fmt.Sprintf("disk%d", i)
				disk := filepath.Join(spec.Dir, name)
				if err := os.WriteFile(disk, append([]byte(name+"\n"), make([]byte, 1<<20)...)[:1<<20], 0o600); err != nil {
					t.Fatal(err)
				}
				spec.Disks = append(spec.Disks, vmm.Disk{Path: disk, ReadOnly: i == 0})
			}
			i := g.Start(t, spec)
			if argv := strings.Join(i.(*instance).argv, " "); !strings.Contains(argv, "microvm,"+c.acpi) {
				t.Errorf("%s", argv)
			}
			conn := vmmtest.Dial(t, i)
			conn.Expect(t, "hello")
			conn.Say(t, "cpus")
			conn.Expect(t, c.online)
			for n := range c.disks {
				conn.Say(t, fmt.Sprintf("disk vd%c", 'a'+n))
				conn.Expect(t, fmt.Sprintf("disk%d", n))
			}
		})
	}
}

// Frames of every size pass both ways through -netdev dgram, also after the network's helper was away.
func TestFrames(t *testing.T) {
	f := vmmtest.FromEnv(t)
	g := vmmtest.NewGuest(t, newDriver(t), f)
	spec := g.Spec(t)
	nic := vmm.NIC{MAC: "52:54:00:12:34:56", MTU: 65520, Local: filepath.Join(spec.Dir, "nic0"), Remote: filepath.Join(spec.Dir, "peer")}
	spec.NICs = []vmm.NIC{nic}
	if stale, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: nic.Local, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	} else if err := stale.Close(); err != nil { // what a crash of the host leaves
		t.Fatal(err)
	}
	peer := listenFrames(t, nic.Remote)
	i := g.Start(t, spec)
	c := vmmtest.Dial(t, i)
	c.Expect(t, "hello")
	c.Say(t, "bounce")
	c.Expect(t, "bouncing")
	for _, size := range []int{60, 1514, 9014, 32 << 10, 65520 + 14} {
		bounce(t, peer, nic, size)
	}
	if err := os.Remove(nic.Remote); err != nil {
		t.Fatal(err)
	}
	if err := send(peer, nic, make([]byte, 60)); err != nil { // its answer finds no one
		t.Fatal(err)
	}
	c.Say(t, "alive")
	c.Expect(t, "alive")
	peer.Close()
	bounce(t, listenFrames(t, nic.Remote), nic, 1514)
	if err := i.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(nic.Local); err == nil {
		t.Error("the NIC's socket is left behind")
	}
}

func listenFrames(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	peer, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return peer
}

const experimental = "\x88\xb5" // an EtherType that no one else uses

func send(peer *net.UnixConn, nic vmm.NIC, frame []byte) error {
	mac, err := net.ParseMAC(nic.MAC)
	if err != nil {
		return err
	}
	copy(frame, mac)
	copy(frame[6:], []byte{0x52, 0x54, 0, 0, 0, 1})
	copy(frame[12:], experimental)
	_, err = peer.WriteTo(frame, &net.UnixAddr{Name: nic.Local, Net: "unixgram"})
	return err
}

// bounce sends a frame of random bytes, which must come back whole.
func bounce(t *testing.T, peer *net.UnixConn, nic vmm.NIC, size int) {
	t.Helper()
	frame := make([]byte, size)
	for j := range frame {
		frame[j] = byte(rand.Uint32())
	}
	if err := send(peer, nic, frame); err != nil {
		t.Fatalf("%d bytes: %v", size, err)
	}
	buffer := make([]byte, 1<<17)
	peer.SetReadDeadline(time.Now().Add(5 * time.Second))
	for {
		n, err := peer.Read(buffer)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if n != size || string(buffer[12:14]) != experimental {
			continue // the guest's own neighbour discovery, or a late answer
		}
		if !bytes.Equal(frame[14:], buffer[14:n]) {
			t.Errorf("%d bytes come back as others", size)
		}
		return
	}
}

// A binary that is not QEMU is refused before anything starts.
func TestStrangeBinary(t *testing.T) {
	path, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	d := newDriver(t)
	d.opts.Binary = path
	if _, err := d.Start(t.Context(), probeSpec(t)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("error %v", err)
	}
}

func TestDroppedKernelArguments(t *testing.T) {
	h := host{arch: "amd64", accelerator: "tcg", tscKHz: 1}
	spec := vmm.Spec{CPUs: 1, Kernel: vmm.Kernel{Args: "mitigations=off own", DropArgs: []string{"mitigations=off", "quiet"}}}
	got := kernelArguments(spec, h)
	if strings.Contains(got, "quiet") || strings.Count(got, "mitigations=off") != 1 || !strings.HasPrefix(got, "panic=-1 ") {
		t.Errorf("%q: want neither quiet nor the driver's mitigations=off", got)
	}
}
