// Package vmmtest is the common suite of VMM drivers: real machines that boot a small init of the suite's own.
// Imported by the tests of drivers only.
package vmmtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/diskimage"
	"github.com/atollvm/atoll/internal/vmm"
)

const patience = 30 * time.Second // for one step of a guest on a busy host

// Fixture is the kernel that the suite boots.
type Fixture struct {
	Kernel  vmm.Kernel // without the initramfs, which the suite makes
	Modules string     // directory of *.ko files, loaded in the order of their names; may be empty
}

// FromEnv reads the fixture that `make test` hands to driver tests, or skips the test.
func FromEnv(t *testing.T) Fixture {
	t.Helper()
	path := os.Getenv("ATOLL_TEST_KERNEL")
	if path == "" {
		t.Skip("ATOLL_TEST_KERNEL is not set: make test sets it to an uncompressed kernel, and ATOLL_TEST_MODULES to its modules' directory")
	}
	modules := os.Getenv("ATOLL_TEST_MODULES")
	// A kernel that needs modules for virtio is a distribution's, which finds its devices through ACPI only.
	return Fixture{Kernel: vmm.Kernel{Path: path, NeedsACPI: modules != ""}, Modules: modules}
}

// Guest boots guests for tests.
type Guest struct {
	driver vmm.Driver
	kernel vmm.Kernel
}

// NewGuest makes the initramfs of the suite's init and the fixture's modules.
func NewGuest(t *testing.T, driver vmm.Driver, f Fixture) *Guest {
	t.Helper()
	path := filepath.Join(t.TempDir(), "initramfs")
	if err := writeInitramfs(t.Context(), path, f.Modules); err != nil {
		t.Fatal(err)
	}
	f.Kernel.Initramfs = path
	return &Guest{driver, f.Kernel}
}

func writeInitramfs(ctx context.Context, path, modules string) error {
	initPath := path + ".init"
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", initPath, "github.com/atollvm/atoll/internal/vmm/vmmtest/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the guest's init: %w: %s", err, out)
	}
	files := []string{}
	if modules != "" {
		var err error
		if files, err = filepath.Glob(filepath.Join(modules, "*.ko")); err != nil || len(files) == 0 {
			return fmt.Errorf("no modules in %s", modules)
		}
		sort.Strings(files)
	}
	var out bytes.Buffer
	entry(&out, "dev", unix.S_IFDIR|0o755, nil)
	entry(&out, "modules", unix.S_IFDIR|0o755, nil)
	if err := add(&out, "init", initPath); err != nil {
		return err
	}
	onDemand, err := filepath.Glob(filepath.Join(modules, "virtiofs", "*.ko"))
	if err != nil {
		return err
	}
	entry(&out, "modules/virtiofs", unix.S_IFDIR|0o755, nil)
	for _, path := range append(files, onDemand...) {
		name, err := filepath.Rel(modules, path)
		if err != nil {
			return err
		}
		if err := add(&out, filepath.Join("modules", name), path); err != nil {
			return err
		}
	}
	entry(&out, "TRAILER!!!", 0, nil)
	return os.WriteFile(path, out.Bytes(), 0o600)
}

func add(w *bytes.Buffer, name, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	entry(w, name, unix.S_IFREG|0o755, data)
	return nil
}

// entry writes one file of a cpio archive in the kernel's format: 14 numbers, the name, the data, each padded to 4 bytes.
// https://docs.kernel.org/driver-api/early-userspace/buffer-format.html
func entry(w *bytes.Buffer, name string, mode int, data []byte) {
	const inode, links, none = 1, 1, 0
	fmt.Fprintf(w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, mode, none, none, links, none, len(data), none, none, none, none, len(name)+1, none, name)
	pad := func() { w.Write(make([]byte, -w.Len()&3)) }
	pad()
	w.Write(data)
	pad()
}

// Spec returns a spec of one CPU and 256 MiB in a directory of its own, whose path is short enough for sockets.
func (g *Guest) Spec(t *testing.T) vmm.Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return vmm.Spec{ID: filepath.Base(dir), Dir: dir, Kernel: g.kernel, CPUs: 1, MemoryBytes: 256 << 20}
}

// Start starts the instance; the test's end kills it, and shows the end of its console when the test has failed.
func (g *Guest) Start(t *testing.T, spec vmm.Spec) vmm.Instance {
	t.Helper()
	i, err := g.driver.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			showConsole(t, spec)
		}
		// The instance may have been closed by the test: this ends the process whatever the driver thinks of it.
		unix.Kill(i.PID(), unix.SIGKILL)
		i.Close()
	})
	return i
}

func showConsole(t *testing.T, spec vmm.Spec) {
	text, err := os.ReadFile(filepath.Join(spec.Dir, vmm.ConsoleFile))
	if err != nil {
		t.Log(err)
	}
	t.Logf("console:\n%s", text[max(0, len(text)-4096):])
}

// Conn speaks with the suite's init, a line at a time.
type Conn struct {
	net.Conn
	in *bufio.Reader
}

// Dial opens the agent's port. A guest that has just booted says hello, to whoever dials first.
func Dial(t *testing.T, i vmm.Instance) *Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := i.DialAgent(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &Conn{c, bufio.NewReader(c)}
}

// Expect reads a line that must be want.
func (c *Conn) Expect(t *testing.T, want string) {
	t.Helper()
	if got := c.Line(t); got != want {
		t.Fatalf("the guest says %q instead of %q", got, want)
	}
}

// Line reads a line.
func (c *Conn) Line(t *testing.T) string {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	line, err := c.in.ReadString('\n')
	if err != nil {
		t.Fatalf("reading from the guest: %q, %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// Say writes a line.
func (c *Conn) Say(t *testing.T, line string) {
	t.Helper()
	if _, err := fmt.Fprintln(c, line); err != nil {
		t.Fatal(err)
	}
}

// ask says a line and returns the answer.
func (c *Conn) ask(t *testing.T, line string) string {
	t.Helper()
	c.Say(t, line)
	return c.Line(t)
}

// Run runs the suite. newDriver returns a fresh object over the same host each time, as a restarted daemon would have it.
func Run(t *testing.T, newDriver func(t *testing.T) vmm.Driver, f Fixture) {
	g := NewGuest(t, newDriver(t), f)
	t.Run("Devices", g.devices)
	t.Run("Shares", g.shares)
	t.Run("TwoCPUs", g.twoCPUs)
	t.Run("TwoAtOnce", g.twoAtOnce)
	t.Run("DialAgain", g.dialAgain)
	t.Run("Overlay", g.overlay)
	t.Run("Console", g.console)
	t.Run("Poweroff", g.poweroff)
	t.Run("Halt", g.halt)
	t.Run("Panic", g.panics)
	t.Run("Died", g.died)
	t.Run("Kill", g.kill)
	t.Run("Pause", g.pause)
	t.Run("Recover", func(t *testing.T) { g.recover(t, newDriver) })
	t.Run("RecoverNothing", g.recoverNothing)
	t.Run("BadSpec", g.badSpec)
}

func (g *Guest) devices(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	first, second := filepath.Join(spec.Dir, "first, with a comma"), filepath.Join(spec.Dir, "second")
	for name, text := range map[string]string{first: "I am first\n", second: "I am second\n"} {
		if err := os.WriteFile(name, append([]byte(text), make([]byte, 4096-len(text))...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spec.Disks = []vmm.Disk{{Path: first, ReadOnly: true}, {Path: second}}
	if err := os.WriteFile(filepath.Join(spec.Dir, vmm.ConsoleFile), []byte("of the last start"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Dial(t, g.Start(t, spec))
	c.Expect(t, "hello")
	for ask, want := range map[string]string{"disk vda": "I am first", "disk vdb": "I am second", "cpus": "0", "$a 'b'": "$a 'b'"} {
		if got := c.ask(t, ask); got != want {
			t.Errorf("%s: %q instead of %q", ask, got, want)
		}
	}
	if got := c.ask(t, "disk vda x"); !strings.HasPrefix(got, "error:") {
		t.Errorf("writing to a read-only disk: %q", got)
	}
	if got := c.ask(t, "disk vdb written"); got != "ok" {
		t.Errorf("writing: %q", got)
	}
	if data, err := os.ReadFile(second); err != nil || !bytes.HasPrefix(data, []byte("written\n")) {
		t.Errorf("the disk has %.20q, %v", data, err)
	}
	if data, err := os.ReadFile(filepath.Join(spec.Dir, vmm.ConsoleFile+".1")); err != nil || string(data) != "of the last start" {
		t.Errorf("the last console is %q, %v", data, err)
	}
}

// overlay: a disk over another one, which stays as it is, and whose own word on what lies below it is not taken.
func (g *Guest) overlay(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	raw, middle := filepath.Join(spec.Dir, "raw"), filepath.Join(spec.Dir, "middle")
	content := append([]byte("from below\n"), make([]byte, 1<<20)...)
	if err := os.WriteFile(raw, content, 0o400); err != nil {
		t.Fatal(err)
	}
	img, err := diskimage.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Overlay(middle, 2<<20); err != nil {
		t.Fatal(err)
	}
	for i, backing := range []*vmm.Disk{{Path: raw}, {Path: middle, QCOW2: true}} {
		over := diskimage.Image{Path: backing.Path, Format: diskimage.Raw, Size: img.Size}
		top := filepath.Join(spec.Dir, fmt.Sprint("top, ", i))
		if err := over.Overlay(top, 4<<20); err != nil {
			t.Fatal(err)
		}
		spec.Disks = append(spec.Disks, vmm.Disk{Path: top, QCOW2: true, Backing: backing})
	}
	c := Dial(t, g.Start(t, spec))
	c.Expect(t, "hello")
	if got := c.ask(t, "disk vda"); got != "from below" {
		t.Errorf("a disk over a raw one has %q", got)
	}
	if got := c.ask(t, "disk vdb"); strings.Contains(got, "below") {
		t.Errorf("what is two disks below a disk is seen in it: %q", got)
	}
	if got := c.ask(t, "disk vda written"); got != "ok" {
		t.Errorf("writing: %q", got)
	}
	if got := c.ask(t, "disk vda"); got != "written" {
		t.Errorf("what was written: %q", got)
	}
	if data, err := os.ReadFile(raw); err != nil || !bytes.Equal(data, content) {
		t.Errorf("the disk below was written to: %.20q, %v", data, err)
	}
}

func (g *Guest) console(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	i := g.Start(t, spec)
	joined, ok := i.(vmm.Console)
	if !ok {
		t.Skip("this driver's console cannot be joined")
	}
	c := Dial(t, i)
	c.Expect(t, "hello")
	c.Say(t, "print nobody is there")
	for range 2 { // the second takes the place of the first
		conn, err := joined.DialConsole(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c.Say(t, "print to whom it concerns")
		conn.SetReadDeadline(time.Now().Add(patience))
		for in := bufio.NewReader(conn); ; {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Fatalf("reading the console: %q, %v", line, err)
			}
			if strings.TrimSpace(line) == "to whom it concerns" {
				break
			}
		}
		c.Say(t, "hear")
		fmt.Fprintln(conn, "typed")
		c.Expect(t, "typed")
	}
	text, err := os.ReadFile(filepath.Join(spec.Dir, vmm.ConsoleFile))
	if err != nil {
		t.Fatal(err)
	}
	for words, times := range map[string]int{"nobody is there": 1, "to whom it concerns": 2} {
		if n := strings.Count(string(text), words); n != times {
			t.Errorf("the console's file has %q %d times", words, n)
		}
	}
	if err := i.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectClean(t, spec)
	if _, err := joined.DialConsole(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("the console of an instance that has ended: %v", err)
	}
}

func (g *Guest) shares(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("sharing directories needs root")
	}
	t.Parallel()
	spec := g.Spec(t)
	outer := t.TempDir()
	inner := filepath.Join(outer, "inner")
	later := filepath.Join(inner, "later")
	if err := errors.Join(os.MkdirAll(later, 0o755), os.WriteFile(filepath.Join(inner, "file"), []byte("of the host\n"), 0o644),
		os.WriteFile(filepath.Join(outer, "secret"), []byte("secret\n"), 0o644), os.Symlink("../secret", filepath.Join(inner, "up")),
		os.Symlink(filepath.Join(outer, "secret"), filepath.Join(inner, "absolute"))); err != nil {
		t.Fatal(err)
	}
	spec.Shares = []vmm.Share{{Tag: "all", Path: inner}, {Tag: "look", Path: inner, ReadOnly: true}}
	i := g.Start(t, spec)
	c := Dial(t, i)
	c.Expect(t, "hello")
	for ask, want := range map[string]string{"share all file": "of the host", "share look file": "of the host", "share all made by the guest": "ok"} {
		if got := c.ask(t, ask); got != want {
			t.Errorf("%s: %q instead of %q", ask, got, want)
		}
	}
	if data, err := os.ReadFile(filepath.Join(inner, "made")); string(data) != "by the guest\n" {
		t.Errorf("the guest's file: %q, %v", data, err)
	}
	for _, ask := range []string{"share look made x", "share all up", "share all absolute", "share all ../secret"} {
		if got := c.ask(t, ask); !strings.HasPrefix(got, "error:") {
			t.Errorf("%s: %q", ask, got)
		}
	}
	if err := unix.Mount("later", later, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(later, unix.MNT_DETACH) })
	if got := c.ask(t, "share all later/x on what was mounted later"); got != "ok" {
		t.Errorf("on a later mount: %q", got)
	}
	if data, err := os.ReadFile(filepath.Join(later, "x")); string(data) != "on what was mounted later\n" {
		t.Errorf("on a later mount: %q, %v", data, err)
	}
	if err := i.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectClean(t, spec)
}

func (g *Guest) twoCPUs(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	spec.CPUs = 2
	c := Dial(t, g.Start(t, spec))
	c.Expect(t, "hello")
	if got := c.ask(t, "cpus"); got != "0-1" {
		t.Errorf("CPUs %q", got)
	}
}

func (g *Guest) twoAtOnce(t *testing.T) {
	t.Parallel()
	shared := filepath.Join(t.TempDir(), "shared")
	if err := os.WriteFile(shared, append([]byte("shared\n"), make([]byte, 4089)...), 0o600); err != nil {
		t.Fatal(err)
	}
	var conns []*Conn
	for range 2 {
		spec := g.Spec(t)
		spec.Disks = []vmm.Disk{{Path: shared, ReadOnly: true}}
		conns = append(conns, Dial(t, g.Start(t, spec)))
	}
	for _, c := range conns {
		c.Expect(t, "hello")
		if got := c.ask(t, "disk vda"); got != "shared" {
			t.Errorf("disk %q", got)
		}
	}
}

func (g *Guest) dialAgain(t *testing.T) {
	t.Parallel()
	i := g.Start(t, g.Spec(t))
	old := Dial(t, i)
	old.Expect(t, "hello")
	c := Dial(t, i)
	old.SetReadDeadline(time.Now().Add(patience))
	if line, err := old.in.ReadString('\n'); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the old connection lives on: %q, %v", line, err)
	}
	if got := c.ask(t, "again"); got != "again" {
		t.Errorf("the guest says %q", got)
	}
}

func (g *Guest) poweroff(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	i := g.Start(t, spec)
	c := Dial(t, i)
	c.Expect(t, "hello")
	c.Say(t, "poweroff")
	expectEnd(t, i, spec, vmm.ReasonGuest, 5*time.Second)
}

// halt stops the CPUs for good, which no hardware notices; so ends a poweroff without the agent where a machine cannot switch itself off.
func (g *Guest) halt(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	i := g.Start(t, spec)
	c := Dial(t, i)
	c.Expect(t, "hello")
	c.Say(t, "halt")
	expectEnd(t, i, spec, vmm.ReasonGuest, 5*time.Second)
}

func (g *Guest) panics(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	i := g.Start(t, spec)
	c := Dial(t, i)
	c.Expect(t, "hello")
	c.Say(t, "panic")
	expectEnd(t, i, spec, vmm.ReasonPanic, 5*time.Second)
	if detail := i.Exit().Detail; !strings.Contains(detail, "Attempted to kill init") {
		t.Errorf("detail %q", detail)
	}
	if text, _ := os.ReadFile(filepath.Join(spec.Dir, vmm.ConsoleFile)); !bytes.Contains(text, []byte("told to panic")) {
		t.Errorf("the console has not init's words")
	}
}

func (g *Guest) died(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	i := g.Start(t, spec)
	Dial(t, i).Expect(t, "hello")
	if err := unix.Kill(i.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	expectEnd(t, i, spec, vmm.ReasonDied, time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := i.DialAgent(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("the agent of a dead VMM: %v", err)
	}
	if err := i.Kill(ctx); err != nil {
		t.Errorf("killing a dead VMM: %v", err)
	}
}

// kill ends an instance while it boots.
func (g *Guest) kill(t *testing.T) {
	t.Parallel()
	spec := g.Spec(t)
	i := g.Start(t, spec)
	if e := i.Exit(); e != (vmm.Exit{}) {
		t.Errorf("an instance that runs has ended: %+v", e)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := i.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	expectEnd(t, i, spec, vmm.ReasonDied, 0)
}

func (g *Guest) pause(t *testing.T) {
	t.Parallel()
	i := g.Start(t, g.Spec(t))
	p, ok := i.(vmm.Pauser)
	if !ok {
		t.Skip("the driver cannot pause")
	}
	c := Dial(t, i)
	c.Expect(t, "hello")
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Say(t, "echo")
	c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if line, err := c.in.ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a paused guest says %q, %v", line, err)
	}
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Expect(t, "echo")
}

func (g *Guest) recover(t *testing.T, newDriver func(t *testing.T) vmm.Driver) {
	for name, end := range map[string]struct {
		how    func(*Conn, vmm.Instance)
		reason vmm.Reason
	}{
		"Poweroff": {func(c *Conn, _ vmm.Instance) { c.Say(t, "poweroff") }, vmm.ReasonGuest},
		"Halt":     {func(c *Conn, _ vmm.Instance) { c.Say(t, "halt") }, vmm.ReasonGuest},
		"Panic":    {func(c *Conn, _ vmm.Instance) { c.Say(t, "panic") }, vmm.ReasonPanic},
		"Died":     {func(_ *Conn, i vmm.Instance) { unix.Kill(i.PID(), unix.SIGKILL) }, vmm.ReasonDied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := g.Spec(t)
			old := g.Start(t, spec)
			Dial(t, old).Expect(t, "hello")
			if err := old.Close(); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			i, err := newDriver(t).Recover(t.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			defer i.Close()
			if took := time.Since(began); took > time.Second {
				t.Errorf("recovered after %v", took)
			}
			if i.PID() != old.PID() || i.Accelerator() != old.Accelerator() {
				t.Errorf("recovered process %d (%s), started %d (%s)", i.PID(), i.Accelerator(), old.PID(), old.Accelerator())
			}
			c := Dial(t, i)
			if got := c.ask(t, "still there"); got != "still there" {
				t.Errorf("the guest says %q", got)
			}
			end.how(c, i)
			limit := 5 * time.Second
			if end.reason == vmm.ReasonDied {
				limit = time.Second
			}
			expectEnd(t, i, spec, end.reason, limit)
		})
	}
}

func (g *Guest) recoverNothing(t *testing.T) {
	spec := g.Spec(t)
	if i, err := g.driver.Recover(t.Context(), spec); !errdefs.IsNotFound(err) {
		t.Errorf("in an empty directory: %v, %v", i, err)
	}
	// It ended while nobody looked.
	i := g.Start(t, spec)
	i.Close()
	unix.Kill(i.PID(), unix.SIGKILL)
	deadline := time.Now().Add(time.Second)
	for unix.Kill(i.PID(), 0) == nil && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond) // nothing else tells the end of a process that was let go of
	}
	if i, err := g.driver.Recover(t.Context(), spec); !errdefs.IsNotFound(err) {
		t.Errorf("after its end: %v, %v", i, err)
	}
	expectClean(t, spec)
}

func (g *Guest) badSpec(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*vmm.Spec)
		class  func(error) bool
	}{
		"kernel that is none": {func(s *vmm.Spec) { s.Kernel.Path = text }, errdefs.IsInvalidArgument},
		"kernel missing":      {func(s *vmm.Spec) { s.Kernel.Path = "/nowhere/vmlinux" }, errdefs.IsNotFound},
		"initramfs missing":   {func(s *vmm.Spec) { s.Kernel.Initramfs = "/nowhere/initramfs" }, errdefs.IsNotFound},
		"disk missing":        {func(s *vmm.Spec) { s.Disks = []vmm.Disk{{Path: "/nowhere/disk"}} }, errdefs.IsNotFound},
		"memory":              {func(s *vmm.Spec) { s.MemoryBytes = 1 << 20 }, errdefs.IsInvalidArgument},
		"no CPU":              {func(s *vmm.Spec) { s.CPUs = 0 }, errdefs.IsInvalidArgument},
	} {
		spec := g.Spec(t)
		c.change(&spec)
		i, err := g.driver.Start(t.Context(), spec)
		if err == nil {
			i.Kill(t.Context())
			t.Errorf("%s: started", name)
			continue
		}
		if !c.class(err) {
			t.Errorf("%s: wrong class: %v", name, err)
		}
		expectClean(t, spec)
	}
}

func expectEnd(t *testing.T, i vmm.Instance, spec vmm.Spec, reason vmm.Reason, within time.Duration) {
	t.Helper()
	began := time.Now()
	select {
	case <-i.Done():
		t.Logf("seen after %v: %+v", time.Since(began), i.Exit())
	case <-time.After(within + patience):
		t.Fatal("the end is never seen")
	}
	if took := time.Since(began); within > 0 && took > within {
		t.Errorf("the end is seen after %v", took)
	}
	if got := i.Exit(); got.Reason != reason {
		t.Errorf("exit %+v instead of %s", got, reason)
	}
	if _, err := os.Stat(filepath.Join(spec.Dir, vmm.ConsoleFile)); err != nil && reason != vmm.ReasonDied {
		t.Errorf("the console is gone: %v", err)
	}
	expectClean(t, spec)
}

// expectClean checks that nothing of the driver is left but consoles.
func expectClean(t *testing.T, spec vmm.Spec) {
	t.Helper()
	entries, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), vmm.ConsoleFile) {
			t.Errorf("%s is left behind", e.Name())
		}
	}
}
