package base

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
)

func builder(t *testing.T) *Builder {
	t.Helper()
	dir := t.TempDir()
	store, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	return New(Config{Content: store, TempDir: filepath.Join(dir, "temp"), Cache: cacheDir(t), Log: slog.New(slog.DiscardHandler)})
}

// cacheDir keeps packages from one test run to the next.
func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("ATOLL_TEST_CACHE"); dir != "" {
		return filepath.Join(dir, "debian")
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return t.TempDir()
	}
	return filepath.Join(dir, "atoll-test", "debian")
}

func build(t *testing.T, b *Builder, name string) ocispec.Descriptor {
	t.Helper()
	began := time.Now()
	d, err := b.Build(t.Context(), name, Options{}, nil)
	if errdefs.IsUnavailable(err) {
		t.Skipf("no Debian mirror: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s in %s", name, time.Since(began).Round(time.Millisecond))
	return d
}

func readJSON[T any](t *testing.T, b *Builder, d ocispec.Descriptor) (v T) {
	t.Helper()
	data, err := content.ReadBlob(t.Context(), b.Content, d)
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// unpack checks an image's digests and returns its configuration and its entries by name; files land in dir when it is not empty.
func unpack(t *testing.T, b *Builder, d ocispec.Descriptor, dir string) (ocispec.Image, map[string]*tar.Header) {
	t.Helper()
	m := readJSON[ocispec.Manifest](t, b, d)
	config := readJSON[ocispec.Image](t, b, m.Config)
	if len(m.Layers) != 1 || len(config.RootFS.DiffIDs) != 1 || config.OS != "linux" || d.Platform.Architecture != config.Architecture {
		t.Fatalf("%+v\n%+v", m, config)
	}
	ra, err := b.Content.ReaderAt(t.Context(), m.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer ra.Close()
	if ra.Size() != m.Layers[0].Size {
		t.Errorf("layer is %d bytes, its descriptor says %d", ra.Size(), m.Layers[0].Size)
	}
	zr, err := zstd.NewReader(content.NewReader(ra))
	if err != nil {
		t.Fatal(err)
	}
	defer zr.Close()
	diff := digest.Canonical.Digester()
	tree := io.TeeReader(zr, diff.Hash())
	entries := map[string]*tar.Header{}
	for tr := tar.NewReader(tree); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		entries[h.Name] = h
		if dir == "" {
			continue
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, h.FileInfo().Mode())
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		case tar.TypeReg:
			var data []byte
			if data, err = io.ReadAll(tr); err == nil {
				err = os.WriteFile(path, data, h.FileInfo().Mode())
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	io.Copy(io.Discard, tree)
	if diff.Digest() != config.RootFS.DiffIDs[0] {
		t.Errorf("the layer unpacks to %s, its diff ID is %s", diff.Digest(), config.RootFS.DiffIDs[0])
	}
	return config, entries
}

func TestBusybox(t *testing.T) {
	b := builder(t)
	d := build(t, b, "busybox")
	if again := build(t, b, "busybox:latest"); again.Digest != d.Digest {
		t.Error("the second build differs")
	}
	root := t.TempDir()
	config, entries := unpack(t, b, d, root)
	if diff := cmp.Diff([]string{"sh"}, config.Config.Cmd); diff != "" {
		t.Error(diff)
	}
	if m := entries["tmp/"].FileInfo().Mode(); m != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("/tmp is %v", m)
	}
	if os.Geteuid() != 0 {
		t.Skip("running it needs root for chroot")
	}
	cmd := exec.Command("/bin/sh", "-c", "whoami; for a in /bin/*; do test -x $a || echo $a; done; env -i /usr/bin/env A=b | cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "root\nA=b\n" {
		t.Errorf("%v: %s", err, out)
	}
	// Every link names something that the program really has.
	cmd = exec.Command("/bin/busybox", "--list")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.FieldsSeq(applets) {
		if !strings.Contains("\n"+string(out), "\n"+name+"\n") {
			t.Errorf("busybox has no %s", name)
		}
	}
}

func TestDebian(t *testing.T) {
	if testing.Short() {
		t.Skip("short: takes half a minute")
	}
	b := builder(t)
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Fatal("apt install mmdebstrap:", err)
	}
	os.MkdirAll(filepath.Join(b.TempDir, "base-killed", "etc"), 0o755)
	config, entries := unpack(t, b, build(t, b, "debian:12"), "")
	if diff := cmp.Diff([]string{"bash"}, config.Config.Cmd); diff != "" {
		t.Error(diff)
	}
	for _, name := range []string{"usr/bin/bash", "usr/bin/apt-get", "etc/apt/sources.list", "etc/apt/apt.conf.d/docker-clean", "usr/sbin/policy-rc.d", "dev/", "tmp/"} {
		if entries[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	for name, h := range entries {
		if h.ModTime.After(*config.Created) {
			t.Errorf("%s is of %s, after the release", name, h.ModTime)
		}
		switch {
		case strings.HasPrefix(name, "var/lib/apt/lists/deb"), strings.HasPrefix(name, "dev/") && name != "dev/",
			name == "etc/hostname", name == "etc/resolv.conf", strings.HasPrefix(name, "./"), strings.HasSuffix(name, ".deb"):
			t.Errorf("%s should not be there", name)
		}
	}
	nothingLeft(t, b)

	var lines []string
	if _, err := b.Build(t.Context(), "debian:bookworm", Options{Packages: []string{"no-such-package"}}, func(l string) { lines = append(lines, l) }); !errdefs.IsNotFound(err) ||
		!strings.Contains(err.Error(), "Debian bookworm has no package no-such-package") || hint.Of(err) == "" {
		t.Errorf("an unknown package: %v\n%s", err, strings.Join(lines, "\n"))
	}
	nothingLeft(t, b)
}

// TestDebianTwice: the same inputs give the same digest, wherever the image is made.
func TestDebianTwice(t *testing.T) {
	if testing.Short() {
		t.Skip("short: takes a minute")
	}
	var digests []digest.Digest
	for _, mode := range []os.FileMode{0o700, 0o755} { // apt's own user may see into the directory, or not
		b := builder(t)
		b.TempDir = filepath.Join(t.TempDir(), "temp")
		if err := os.Chmod(filepath.Dir(b.TempDir), mode); err != nil {
			t.Fatal(err)
		}
		d := build(t, b, "debian:bookworm-systemd")
		digests = append(digests, d.Digest)
		if mode != 0o700 {
			continue
		}
		config, entries := unpack(t, b, d, "")
		if diff := cmp.Diff([]string{"/sbin/init"}, config.Config.Cmd); diff != "" || config.Config.StopSignal != "SIGRTMIN+3" {
			t.Error(diff, config.Config.StopSignal)
		}
		for name, want := range map[string]bool{
			consoleLogin: true, screenLogin: false, policyFile: false, "etc/machine-id": false, "var/lib/dbus/machine-id": false,
			"var/lib/systemd/random-seed": false, "etc/systemd/system.conf.d/10-atoll.conf": true,
		} {
			if (entries[name] != nil) != want {
				t.Errorf("%s is there: %v, want %v", name, entries[name] != nil, want)
			}
		}
	}
	if digests[0] != digests[1] {
		t.Errorf("two builds differ: %v", digests)
	}
}

func TestList(t *testing.T) {
	seen := map[string]bool{}
	for _, b := range List() {
		for _, name := range append([]string{b.Name}, b.Aliases...) {
			if found, err := Find(name); err != nil || found.Name != b.Name || seen[name] {
				t.Errorf("%s finds %s: %v", name, found.Name, err)
			}
			seen[name] = true
		}
	}
	for _, name := range []string{"debian:12-systemd", "debian:13-slim", "ubuntu:20.04-systemd", "ubuntu:noble", "alpine:3.22-openrc", "ubi:9-systemd", "busybox:latest"} {
		if !seen[name] {
			t.Errorf("no %s", name)
		}
	}
}

func TestUBI(t *testing.T) {
	b := builder(t)
	want := ocispec.Descriptor{Digest: digest.FromString("x")}
	var asked []string
	b.Pull = func(_ context.Context, reference string, progress func(string)) (ocispec.Descriptor, error) {
		asked = append(asked, reference)
		progress("layer")
		return want, nil
	}
	for _, c := range []struct {
		name string
		o    Options
	}{{"ubi:9", Options{}}, {"ubi:10-systemd", Options{Mirror: "127.0.0.1:5000/rh/"}}} {
		if d, err := b.Build(t.Context(), c.name, c.o, nil); err != nil || d.Digest != want.Digest {
			t.Errorf("%s: %v %v", c.name, d, err)
		}
	}
	if diff := cmp.Diff([]string{"registry.access.redhat.com/ubi9/ubi:latest", "127.0.0.1:5000/rh/ubi10/ubi-init:latest"}, asked); diff != "" {
		t.Error(diff)
	}
	for _, o := range []Options{{Packages: []string{"vim"}}, {Snapshot: "2026-01-15"}, {Keyring: []byte("x")}, {Mirror: "https://m"}} {
		if _, err := b.Build(t.Context(), "ubi:9", o, nil); !errdefs.IsInvalidArgument(err) || hint.Of(err) == "" {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestOtherArchives runs where those archives can be reached, as far as to their signatures.
func TestOtherArchives(t *testing.T) {
	if testing.Short() {
		t.Skip("short: it fetches a release file")
	}
	b := builder(t)
	for _, name := range []string{"focal", "jammy", "noble"} {
		base, err := Find("ubuntu:" + name)
		if err != nil {
			t.Fatal(err)
		}
		p, err := base.family.plan(t.Context(), b, base, Options{}, func(string) {})
		if errdefs.IsUnavailable(err) {
			t.Skipf("Ubuntu's archive cannot be reached from here, so its signature was not checked: %v", err)
		}
		if err != nil || !strings.Contains(p.origin, name) || p.epoch.IsZero() {
			t.Errorf("%s: %+v %v", name, p, err)
		}
	}
	base, _ := Find("debian:bookworm")
	_, err := base.family.plan(t.Context(), b, base, Options{Snapshot: "2026-01-15"}, func(string) {})
	if errdefs.IsUnavailable(err) {
		t.Skipf("snapshot.debian.org cannot be reached from here, so no snapshot was tested: %v", err)
	}
	if err != nil {
		t.Error(err)
	}
}

func nothingLeft(t *testing.T, b *Builder) {
	t.Helper()
	if left, err := os.ReadDir(b.TempDir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(b.TempDir)) {
		t.Error("mounts are left behind")
	}
	if open, err := b.Content.ListStatuses(context.Background()); err != nil || len(open) > 0 {
		t.Errorf("blobs in the making: %v %v", open, err)
	}
}

func TestCancel(t *testing.T) {
	b := builder(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	began := time.Now()
	_, err := b.Build(ctx, "debian:bookworm", Options{}, func(line string) {
		if strings.Contains(line, "extracting") || strings.Contains(line, "installing") {
			cancel()
		}
	})
	if errdefs.IsUnavailable(err) {
		t.Skipf("no Debian mirror: %v", err)
	}
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	t.Logf("cancelled after %s", time.Since(began))
	nothingLeft(t, b)
}

func TestFaults(t *testing.T) {
	b := builder(t)
	if _, err := b.Build(t.Context(), "plan9:4", Options{}, nil); !errdefs.IsNotFound(err) || !strings.Contains(hint.Of(err), "debian:bookworm") {
		t.Errorf("an unknown base: %v (%s)", err, hint.Of(err))
	}
	if _, err := b.Build(t.Context(), "busybox", Options{Mirror: "http://127.0.0.1:1/debian"}, nil); !errdefs.IsUnavailable(err) || hint.Of(err) == "" {
		t.Errorf("an unreachable mirror: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	_, err := b.Build(t.Context(), "debian:bookworm", Options{}, nil)
	if errdefs.IsUnavailable(err) {
		t.Skipf("no Debian mirror: %v", err)
	}
	if !errdefs.IsFailedPrecondition(err) || hint.Of(err) != "apt install mmdebstrap" {
		t.Errorf("without mmdebstrap: %v (%s)", err, hint.Of(err))
	}
	if open, err := b.Content.ListStatuses(t.Context()); err != nil || len(open) > 0 {
		t.Errorf("blobs in the making: %v %v", open, err)
	}
}

func TestFailingToolSaysWhy(t *testing.T) {
	b := builder(t)
	bin := t.TempDir()
	os.WriteFile(filepath.Join(bin, "mmdebstrap"), []byte("#!/bin/sh\necho 'E: no space left' >&2\nexit 25\n"), 0o755)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	_, err := b.Build(t.Context(), "debian:bookworm", Options{}, nil)
	if errdefs.IsUnavailable(err) {
		t.Skipf("no Debian mirror: %v", err)
	}
	if err == nil || !strings.Contains(err.Error(), "exit status 25: E: no space left") || hint.Of(err) == "" {
		t.Errorf("got %v", err)
	}
	nothingLeft(t, b)
}
