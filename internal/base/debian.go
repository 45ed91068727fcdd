package base

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path"
	"path/filepath"
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
}

// bootstrap writes a minimal Debian as a tar.
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
	keyring := filepath.Join(work, "debian-archive-keyring.gpg")
	if err := os.WriteFile(keyring, debian.KeyringData, 0o644); err != nil {
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
	argv = append(argv, base.suite, "-")
	for _, a := range in.suites {
		argv = append(argv, fmt.Sprintf("deb %s %s %s", a.Mirror, a.Suite, strings.Join(a.Components, " ")))
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
	copyErr := copyTree(layer, out, in.epoch)
	if copyErr != nil {
		cmd.Cancel() // nobody reads its output any more
	}
	waitErr := cmd.Wait()
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what outlived it
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case waitErr != nil && (copyErr == nil || errors.Is(copyErr, io.ErrUnexpectedEOF) || errors.Is(copyErr, io.EOF)):
		return hint.With(fmt.Errorf("mmdebstrap: %w: %s", waitErr, said.tail()), "check that %s can be reached and that %s has 1 GiB free", in.mirror, b.TempDir)
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

// copyTree makes a layer of mmdebstrap's tar: names without "./", no device nodes, nothing of the host, and files of our own.
func copyTree(layer io.Writer, tree io.Reader, epoch time.Time) error {
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
		case h.Name == "", strings.HasPrefix(h.Name, "dev/") && h.Name != "dev/", h.Name == "etc/resolv.conf", h.Name == "etc/hostname":
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
	for _, name := range sorted(files) {
		if err := writeFile(tw, name, 0o644, epoch, []byte(files[name])); err != nil {
			return err
		}
	}
	if err := writeFile(tw, "usr/sbin/policy-rc.d", 0o755, epoch, []byte("#!/bin/sh\nexit 101\n")); err != nil {
		return err
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
	each func(string)
	buf  []byte
	last []string
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
		l.last = append(l.last, text)
		l.last = l.last[max(0, len(l.last)-8):]
		l.each(text)
	}
}

func (l *lines) tail() string { return strings.Join(l.last, "; ") }
