package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/vmm"
)

const (
	kvmDevice  = "/dev/kvm"
	probeFile  = "qemu-probe.json"
	probeLimit = time.Second // the probe guest needs 30 to 150 ms, emulated too

	lastResort = "make sure that KVM works on this host, or go on emulated"
)

// facts is what the probe found out. It is kept on disk and holds as long as its key.
type facts struct {
	Key     key
	Version string
	KVM     bool   // a guest has really run
	Warning string // why not
	Hint    string
	TSCKHz  int
}

// key is what the facts depend on.
type key struct {
	BootID   string
	Binary   string
	Modified time.Time
	KVM      kvmState
}

// kvmState is what becomes of opening /dev/kvm, which is cheap enough to do every time.
type kvmState struct {
	Error string // empty: it opens
	Class string // absent, denied
	Mode  string
}

func (f *facts) host() host {
	h := host{arch: arch, accelerator: "tcg", tscKHz: f.TSCKHz}
	if f.KVM {
		h.accelerator = "kvm"
	}
	return h
}

// Probe says what QEMU can do here. The first call runs a tiny guest; later ones, also of later processes, only look whether
// anything has changed since.
func (d *Driver) Probe(ctx context.Context) (vmm.Capabilities, error) {
	f, err := d.facts(ctx)
	if err != nil {
		return vmm.Capabilities{}, fmt.Errorf("probing QEMU: %w", err)
	}
	return vmm.Capabilities{Version: f.Version, Accelerator: f.host().accelerator, Warning: f.Warning, Hint: f.Hint}, nil
}

func (d *Driver) facts(ctx context.Context) (*facts, error) {
	select {
	case d.probing <- struct{}{}:
		defer func() { <-d.probing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	k, err := d.key()
	if err != nil {
		return nil, err
	}
	if d.known != nil && d.known.Key == k {
		return d.known, nil
	}
	path := filepath.Join(d.opts.Dir, probeFile)
	if f := load(path); f != nil && f.Key == k {
		d.known = f
		return f, nil
	}
	f, err := d.find(ctx, k)
	if err != nil {
		return nil, err
	}
	d.known = f
	if err := save(path, f); err != nil {
		d.opts.Log.Warn("the answer of the QEMU probe is not kept", "error", err)
	}
	return f, nil
}

func (d *Driver) key() (key, error) {
	binary, err := d.binary()
	if err != nil {
		return key{}, err
	}
	info, err := os.Stat(binary)
	if err != nil {
		return key{}, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return key{}, err
	}
	return key{strings.TrimSpace(string(boot)), binary, info.ModTime().UTC().Round(0), openKVM()}, nil
}

func openKVM() kvmState {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		defer f.Close()
		var mode string
		if info, err := f.Stat(); err == nil {
			mode = info.Mode().String()
		}
		return kvmState{Mode: mode}
	}
	class := "absent"
	if errors.Is(err, os.ErrPermission) {
		class = "denied"
	}
	return kvmState{Error: err.Error(), Class: class}
}

func load(path string) *facts {
	data, err := os.ReadFile(path)
	var f facts
	if err != nil || json.Unmarshal(data, &f) != nil {
		return nil
	}
	return &f
}

func save(path string, f *facts) error {
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return writeWhole(path, data)
}

func (d *Driver) find(ctx context.Context, k key) (*facts, error) {
	f := &facts{Key: k}
	tsc := make(chan int, 1)
	go func() { tsc <- measureTSC(ctx) }() // beside the rest, which takes as long
	version, err := readVersion(ctx, k.Binary)
	if err == nil {
		f.Version = version
		f.Warning, f.Hint = d.tryKVM(ctx, k)
		f.KVM = f.Warning == ""
	}
	f.TSCKHz = <-tsc
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx) // an answer that was cut short is none
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// tryKVM returns why KVM cannot be used and what mends it, or nothing when it can.
func (d *Driver) tryKVM(ctx context.Context, k key) (warning, next string) {
	switch k.KVM.Class {
	case "denied":
		return "KVM is not used: " + k.KVM.Error + "; machines are emulated, about ten times slower",
			"sudo usermod -aG kvm $USER, then log in again"
	case "absent":
		return "KVM is not used: " + k.KVM.Error + "; machines are emulated, about ten times slower",
			"load it (sudo modprobe kvm_intel or kvm_amd), after switching on virtualisation in the firmware, or nested virtualisation in the hypervisor"
	}
	if arch != "amd64" {
		return "", "" // no probe guest for this processor yet
	}
	switch err := runProbe(ctx, k.Binary, "kvm", d.opts.Dir); {
	case errors.Is(err, errHang):
		return "KVM is not used: " + kvmDevice + " opens, but a guest hangs or crawls in it; machines are emulated, about ten times slower", lastResort
	case err != nil:
		return fmt.Sprintf("KVM is not used: %s opens, but a guest does not run: %v; machines are emulated, about ten times slower", kvmDevice, err), lastResort
	}
	return "", ""
}

var versionLine = regexp.MustCompile(`^QEMU emulator version (\d+)\.(\d+)[.\d]*`)

func readVersion(ctx context.Context, binary string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "-version").Output()
	if err != nil {
		return "", fmt.Errorf("running %s -version: %w", binary, err)
	}
	return parseVersion(string(out))
}

// parseVersion returns the version from what QEMU prints, which must be 7.2 or later: -netdev dgram is new in it.
func parseVersion(text string) (string, error) {
	m := versionLine.FindStringSubmatch(text)
	if m == nil {
		return "", fmt.Errorf("reading QEMU's version from %.80q: %w", text, errdefs.ErrFailedPrecondition)
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	version := strings.TrimPrefix(m[0], "QEMU emulator version ")
	if major < 7 || major == 7 && minor < 2 {
		return "", hint.With(fmt.Errorf("QEMU %s is older than 7.2: %w", version, errdefs.ErrFailedPrecondition),
			"install QEMU 7.2 or later, as in Debian 12: sudo apt install %s", packageName)
	}
	return version, nil
}

var errHang = errors.New("the probe guest hangs")

// runProbe boots the probe guest; nil means that it has run to its end.
func runProbe(ctx context.Context, binary, accelerator, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	kernel, err := os.CreateTemp(dir, "probe-*.elf")
	if err != nil {
		return err
	}
	defer os.Remove(kernel.Name())
	_, err = kernel.Write(probeGuest())
	if err := errors.Join(err, kernel.Close()); err != nil {
		return err
	}
	limit, cancel := context.WithTimeoutCause(ctx, probeLimit, errHang)
	defer cancel()
	cmd := exec.CommandContext(limit, binary, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-machine", "microvm,acpi=off", "-accel", accelerator, "-cpu", cpu(host{arch: arch, accelerator: accelerator}), "-m", "64M",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-kernel", kernel.Name())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = probeLimit // for a process that even SIGKILL does not end: KVM may hang in the kernel
	_ = cmd.Run()              // the process's state says all there is
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == probeExit {
		return nil
	}
	if limit.Err() != nil {
		return context.Cause(limit)
	}
	return fmt.Errorf("%s: %s", cmd.ProcessState, bytes.TrimSpace(stderr.Bytes()))
}
