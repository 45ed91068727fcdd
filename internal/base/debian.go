package base

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// grace is how long mmdebstrap gets to unmount and remove what it made after it was told to stop.
const grace = 10 * time.Second

// files go into the image beside the packages, as in Docker's: apt keeps no caches, writes small lists, and starts no services
// while an image is being built.
var files = map[string]string{
	"etc/apt/apt.conf.d/docker-clean": `DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
`,
	"etc/apt/apt.conf.d/docker-gzip-indexes": "Acquire::GzipIndexes \"true\";\n",
	"etc/apt/apt.conf.d/docker-no-languages": "Acquire::Languages \"none\";\n",
	policyFile:                               "#!/bin/sh\nexit 101\n",
}

const policyFile = "usr/sbin/policy-rc.d"

// initFiles go into an image that boots systemd: what it does shows on the console in spite of the kernel's quiet.
var initFiles = map[string]string{
	"etc/systemd/system.conf.d/10-atoll.conf": "[Manager]\nShowStatus=yes\n",
}

// Logins are on the console that attach joins, beside the serial one, which systemd finds by itself; a machine has no screen for tty1.
const (
	consoleLogin = "etc/systemd/system/getty.target.wants/console-getty.service"
	screenLogin  = "etc/systemd/system/getty.target.wants/getty@tty1.service"
)

// initPackages make such an image: systemd as /sbin/init, what sessions and devices need, and what every administrator looks for.
var initPackages = []string{"systemd-sysv", "dbus", "udev", "libpam-systemd", "login", "kmod", "procps", "iproute2"}

// apt is the distributions whose archives have Debian's form.
type apt struct{ debian.Distribution }

func (a apt) plan(ctx context.Context, b *Builder, base Base, o Options, progress func(string)) (*plan, error) {
	suites, release, err := sourceOf(ctx, b, a.Distribution, base, o)
	if err != nil {
		return nil, err
	}
	ring, err := a.KeyringOf(debian.Source{Keyring: o.Keyring})
	if err != nil {
		return nil, err
	}
	in := inputs{Distribution: a.Distribution, suites: suites, epoch: release.Date, ring: ring, Options: o, progress: progress}
	p := &plan{
		origin: fmt.Sprintf("%s %s (%s) from %s", a.Name, release.Version, base.release, suites[0].Mirror),
		epoch:  release.Date, config: imageConfig(base, "bash"),
		write: func(ctx context.Context, layer io.Writer) error { return b.bootstrap(ctx, base, in, layer) },
	}
	if base.init {
		p.config.StopSignal = "SIGRTMIN+3" // what systemd's images have: a container ends, and a machine is switched off
	}
	return p, nil
}

// sourceOf finds the suites that a base is made from and verifies the first one's Release file.
func sourceOf(ctx context.Context, b *Builder, d debian.Distribution, base Base, o Options) (debian.Archives, *debian.Release, error) {
	source := debian.Source{Mirror: o.Mirror, Keyring: o.Keyring}
	if o.Snapshot != "" {
		var err error
		if source.Snapshot, err = debian.ParseSnapshot(o.Snapshot); err != nil {
			return nil, nil, err
		}
	}
	suites, err := d.Suites(base.release, source, b.Cache, b.Log)
	if err != nil {
		return nil, nil, err
	}
	release, err := suites[0].Release(ctx)
	return suites, release, err
}

// inputs is what a bootstrap starts from.
type inputs struct {
	debian.Distribution
	Options
	suites   debian.Archives
	epoch    time.Time // of the suite's release: the date of everything in the image
	ring     []byte
	progress func(line string)
}

// bootstrap writes a minimal system as a tar.
func (b *Builder) bootstrap(ctx context.Context, base Base, in inputs, layer io.Writer) error {
	tool, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return hint.With(fmt.Errorf("mmdebstrap is not installed: %w", errdefs.ErrFailedPrecondition), "apt install mmdebstrap")
	}
	mode := "root"
	if os.Geteuid() != 0 {
		mode = "unshare"
		if err := mayUnshare(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(b.TempDir, 0o755); err != nil {
		return err
	}
	if err := b.removeLeftovers(); err != nil {
		return err
	}
	work, err := os.MkdirTemp(b.TempDir, "base-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil {
		return err
	}
	keyring := filepath.Join(work, "archive-keyring.gpg")
	if err := os.WriteFile(keyring, in.ring, 0o644); err != nil {
		return err
	}
	argv := []string{"--variant=minbase", "--mode=" + mode, "--format=tar", "--keyring=" + keyring, "--skip=check/signed-by",
		"--dpkgopt=force-unsafe-io"} // no fsync per file, here and, as in Docker's images, in the image
	if base.slim {
		for _, p := range []string{"doc/*", "man/*", "info/*", "lintian/*", "linda/*", "locale/*"} {
			argv = append(argv, "--dpkgopt=path-exclude=/usr/share/"+p)
		}
		argv = append(argv, "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=path-include=/usr/share/locale/locale.alias")
	}
	packages := in.Packages
	if base.init {
		packages = append(slices.Clone(initPackages), packages...)
	}
	if len(packages) > 0 {
		argv = append(argv, "--include="+strings.Join(packages, ","))
	}
	argv = append(argv, base.release, "-")
	options := ""
	if in.Snapshot != "" {
		options = "[check-valid-until=no] " // in the image too: its archive stands still
	}
	for _, a := range in.suites {
		argv = append(argv, fmt.Sprintf("deb %s%s %s %s", options, a.Mirror, a.Suite, strings.Join(a.Components, " ")))
	}

	cmd := exec.CommandContext(ctx, tool, argv...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", fmt.Sprintf("SOURCE_DATE_EPOCH=%d", in.epoch.Unix()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if mode == "root" {
		// What it mounts goes with its processes, however they end. An unshare has a namespace of its own already, and
		// leaves its files, which belong to mapped users that could not reach our directory, in the system's.
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
		cmd.Env = append(cmd.Env, "TMPDIR="+work)
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = grace
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	said := &lines{each: in.progress}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting mmdebstrap: %w", err)
	}
	b.Log.Debug("mmdebstrap started", "pid", cmd.Process.Pid, "argv", argv)
	copyErr := copyTree(layer, out, in.epoch, base.init, own(base, in))
	if copyErr != nil {
		cmd.Cancel() // nobody reads its output any more
	}
	waitErr := cmd.Wait()
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what outlived it
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case waitErr != nil && said.missing != "":
		return noSuchPackages(said.missing, in.Name+" "+base.release)
	case waitErr != nil && (copyErr == nil || errors.Is(copyErr, io.ErrUnexpectedEOF) || errors.Is(copyErr, io.EOF)):
		return hint.With(fmt.Errorf("mmdebstrap: %w: %s", waitErr, said.tail()), "check that %s can be reached and that %s has 1 GiB free", in.suites[0].Mirror, b.TempDir)
	}
	return copyErr
}

// mayUnshare checks what mmdebstrap needs of a host to work without root.
func mayUnshare() error {
	if _, err := exec.LookPath("newuidmap"); err != nil {
		return hint.With(fmt.Errorf("building a base without root needs newuidmap: %w", errdefs.ErrFailedPrecondition), "apt install uidmap")
	}
	me, err := user.Current()
	if err != nil {
		return err
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		data, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if !bytes.HasPrefix(data, []byte(me.Username+":")) && !bytes.Contains(data, []byte("\n"+me.Username+":")) {
			return hint.With(fmt.Errorf("building a base without root needs a range of IDs for %s in %s: %w", me.Username, file, errdefs.ErrFailedPrecondition),
				"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", me.Username)
		}
	}
	return nil
}

// removeLeftovers removes the file systems of builds that were killed along with the daemon; their mounts went with them.
func (b *Builder) removeLeftovers() error {
	left, err := filepath.Glob(filepath.Join(b.TempDir, "base-*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing what an interrupted build left: %w", err)
		}
	}
	return nil
}

// own returns the files that an image gets beside its packages.
func own(base Base, in inputs) map[string]string {
	all := maps.Clone(files)
	if base.init {
		maps.Copy(all, initFiles)
		delete(all, policyFile) // a machine's services start when they are installed
	}
	if len(in.Options.Keyring) > 0 {
		all["etc/apt/trusted.gpg.d/atoll-base.gpg"] = string(in.ring) // the image's sources name that archive
	}
	return all
}

// copyTree makes a layer of mmdebstrap's tar: names without "./", no device nodes, nothing of the host, no identity, and files of our own.
func copyTree(layer io.Writer, tree io.Reader, epoch time.Time, init bool, own map[string]string) error {
	tr, tw := tar.NewReader(tree), tar.NewWriter(layer)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		h.Name = strings.TrimPrefix(h.Name, "./")
		switch {
		case h.Name == "", strings.HasPrefix(h.Name, "dev/") && h.Name != "dev/", h.Name == "etc/resolv.conf", h.Name == "etc/hostname",
			h.Name == "etc/machine-id", h.Name == "var/lib/dbus/machine-id", h.Name == "var/lib/systemd/random-seed",
			h.Name == screenLogin,
			// apt makes these anew; whom they belong to depends on who may see the directory that the image is made in.
			h.Name == "var/cache/apt/archives/partial/", h.Name == "var/lib/apt/lists/partial/":
			continue
		}
		if h.Typeflag == tar.TypeLink {
			h.Linkname = strings.TrimPrefix(h.Linkname, "./")
		}
		// The format is chosen anew for what the header holds now; extended attributes are in its PAX records.
		h.Format, h.AccessTime, h.ChangeTime = tar.FormatUnknown, time.Time{}, time.Time{}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return err
		}
	}
	for _, name := range sorted(own) {
		mode := int64(0o644)
		if name == policyFile {
			mode = 0o755
		}
		if err := writeFile(tw, name, mode, epoch, []byte(own[name])); err != nil {
			return err
		}
	}
	if init {
		link := &tar.Header{Name: consoleLogin, Typeflag: tar.TypeSymlink, Linkname: "/lib/systemd/system/console-getty.service", Mode: 0o777, ModTime: epoch}
		if err := tw.WriteHeader(link); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, tree) // the padding: mmdebstrap must not see a closed pipe
	return err
}

func writeFile(tw *tar.Writer, name string, mode int64, mtime time.Time, data []byte) error {
	if err := tw.WriteHeader(&tar.Header{Name: path.Clean(name), Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(data)), ModTime: mtime}); err != nil {
		return err
	}
	_, err := tw.Write(data)
	return err
}

// lines hands on what a tool prints line by line and keeps the last ones for the error.
type lines struct {
	each    func(string)
	buf     []byte
	last    []string
	missing string // the package that apt does not know
}

func (l *lines) Write(p []byte) (int, error) {
	l.buf = append(l.buf, p...)
	for {
		advance, line, _ := bufio.ScanLines(l.buf, false)
		if advance == 0 {
			return len(p), nil
		}
		l.buf = l.buf[advance:]
		if i := bytes.LastIndexByte(line, '\r'); i >= 0 { // a progress bar: its last state
			line = line[i+1:]
		}
		text := strings.TrimSpace(string(line))
		if text == "" {
			continue
		}
		if _, name, found := strings.Cut(text, "E: Unable to locate package "); found {
			l.missing = name
		}
		l.last = append(l.last, text)
		l.last = l.last[max(0, len(l.last)-8):]
		l.each(text)
	}
}

func (l *lines) tail() string { return strings.Join(l.last, "; ") }
