// Package qemu runs instances in QEMU: the microvm machine on x86-64, virt on arm64, by KVM where a probe guest proves that it
// works and emulated where not. It owns QEMU's command line, its process, its sockets and what is left in the instance's directory.
// Imported by what wires the daemon together. A Driver and its instances may be used from several goroutines.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/vmm"
)

// What an instance keeps in its directory while it runs.
const (
	qmpSocket     = "qmp.sock"
	consoleSocket = "tty.sock"
	agentSocket   = "agent.sock"
	pidFile       = "qemu.pid"
	argvFile      = "argv.json"
	stderrFile    = "qemu.stderr"
)

// sockets are those that QEMU inherits, from fd 3 on.
func sockets(spec vmm.Spec) []string {
	names := []string{qmpSocket, consoleSocket}
	if !spec.NoAgent {
		names = append(names, agentSocket)
	}
	return names
}

// Options is what New needs.
type Options struct {
	Binary string // QEMU; found in PATH by its usual name when empty
	Dir    string // where the answer of the probe is kept; made when it is not there
	Log    *slog.Logger
}

// Driver is the vmm.Driver "qemu".
type Driver struct {
	opts    Options
	probing chan struct{} // a lock that a context can give up on; it guards known
	known   *facts
}

var (
	_ vmm.Driver      = (*Driver)(nil)
	_ vmm.Instance    = (*instance)(nil)
	_ vmm.Pauser      = (*instance)(nil)
	_ vmm.PowerButton = (*instance)(nil)
	_ vmm.Console     = (*instance)(nil)
)

// New returns the driver. It looks at nothing yet.
func New(opts Options) *Driver {
	return &Driver{opts: opts, probing: make(chan struct{}, 1)}
}

// Name is "qemu".
func (d *Driver) Name() string { return "qemu" }

// Start runs QEMU. It returns as soon as the process runs: its sockets are open already, so both connect at once, and an early end
// of the process is reported by DialAgent and Done with QEMU's own words.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) (vmm.Instance, error) {
	i, err := d.start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("starting QEMU for %s: %w", spec.ID, err)
	}
	return i, nil
}

func (d *Driver) start(ctx context.Context, spec vmm.Spec) (*instance, error) {
	f, err := d.facts(ctx)
	if err != nil {
		return nil, err
	}
	h := f.host()
	if spec.Firmware != nil && spec.Firmware.Kind == vmm.UEFI {
		if h.uefi, err = findUEFI(h.arch); err != nil {
			return nil, err
		}
	}
	if err := check(spec, h); err != nil {
		return nil, err
	}
	if pid, err := find(spec.Dir); err == nil {
		return nil, fmt.Errorf("%s: process %d runs there: %w", spec.Dir, pid, errdefs.ErrAlreadyExists)
	}
	if h.uefi.code != "" {
		if err := h.uefi.makeVariables(spec.Dir); err != nil {
			return nil, err
		}
	}
	argv := append([]string{f.Key.Binary}, arguments(spec, h)...)
	shares, err := startShares(spec)
	if err != nil {
		return nil, errors.Join(err, clean(spec))
	}
	p, err := launch(spec, argv)
	if err != nil {
		endShares(shares)
		return nil, errors.Join(err, clean(spec))
	}
	i, err := d.watch(spec, p.Pid, argv, p, shares)
	if err != nil {
		p.Kill()
		p.Wait()
		endShares(shares)
		return nil, errors.Join(err, clean(spec))
	}
	d.opts.Log.Debug("qemu started", "instance", spec.ID, "pid", p.Pid, "accelerator", h.accelerator)
	return i, nil
}

// Recover takes back the instance that an earlier process started.
func (d *Driver) Recover(_ context.Context, spec vmm.Spec) (vmm.Instance, error) {
	i, err := d.recover(spec)
	if err != nil {
		return nil, fmt.Errorf("recovering QEMU of %s: %w", spec.ID, err)
	}
	return i, nil
}

func (d *Driver) recover(spec vmm.Spec) (*instance, error) {
	pid, err := find(spec.Dir)
	if errdefs.IsNotFound(err) {
		return nil, errors.Join(err, clean(spec))
	}
	if err != nil {
		return nil, err
	}
	argv, err := savedArgv(spec.Dir)
	if err != nil {
		return nil, err
	}
	return d.watch(spec, pid, argv, nil, nil)
}

// launch makes the files and sockets of an instance and starts its process.
func launch(spec vmm.Spec, argv []string) (*os.Process, error) {
	console := filepath.Join(spec.Dir, vmm.ConsoleFile)
	if err := os.Rename(console, console+".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("keeping the last console: %w", err)
	}
	// Saved before the process exists: with it, Recover knows the process even when we die before the pid is written.
	if err := saveArgv(spec.Dir, argv); err != nil {
		return nil, fmt.Errorf("saving QEMU's arguments: %w", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	stderr, err := os.OpenFile(filepath.Join(spec.Dir, stderrFile), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	files := []*os.File{null, stderr, stderr}
	for _, name := range sockets(spec) {
		f, err := listen(filepath.Join(spec.Dir, name))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		files = append(files, f)
	}
	p, err := startProcess(argv, files, spec.Tethered)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(spec.Dir, pidFile), fmt.Appendln(nil, p.Pid), 0o600); err != nil {
		p.Kill()
		p.Wait()
		return nil, err
	}
	return p, nil
}

// listen opens a listening socket for QEMU to inherit, so that a connect works before QEMU has got as far as to make its own.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

// clean removes what an instance leaves behind, except its console.
func clean(spec vmm.Spec) error {
	var paths []string
	for _, name := range []string{agentSocket, consoleSocket, qmpSocket, pidFile, argvFile, stderrFile} {
		paths = append(paths, filepath.Join(spec.Dir, name))
	}
	for _, n := range spec.NICs {
		paths = append(paths, n.Local) // QEMU binds it, and never unlinks it
	}
	for i := range spec.Shares {
		paths = append(paths, shareSocket(spec.Dir, i), filepath.Join(spec.Dir, shareLog))
	}
	var errs []error
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func saveArgv(dir string, argv []string) error {
	data, err := json.Marshal(argv)
	if err != nil {
		return err
	}
	return writeWhole(filepath.Join(dir, argvFile), data)
}

func savedArgv(dir string) ([]string, error) {
	data, err := os.ReadFile(filepath.Join(dir, argvFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: no instance: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	var argv []string
	return argv, json.Unmarshal(data, &argv)
}

// writeWhole replaces a file at once; a crash leaves the old or the new one.
func writeWhole(path string, data []byte) error {
	temp := path + ".new"
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// binary returns the path of QEMU.
func (d *Driver) binary() (string, error) {
	name := d.opts.Binary
	if name == "" {
		name = binaryName
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", hint.With(fmt.Errorf("finding QEMU: %w: %w", err, errdefs.ErrNotFound), "install QEMU: sudo apt install %s", packageName)
	}
	return filepath.Abs(path)
}
