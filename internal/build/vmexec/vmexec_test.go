//go:build linux

package vmexec

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/executor"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/sys/user"
	"google.golang.org/protobuf/testing/protocmp"
)

func TestContainerOf(t *testing.T) {
	p := executor.ProcessInfo{
		Meta: executor.Meta{
			Args: []string{"/bin/sh", "-c", "echo $X"}, Env: []string{"PATH=/bin", "X=a b"}, User: "app:other", Cwd: "/srv", Tty: true,
			ExtraHosts: []executor.HostIP{{Host: "db", IP: net.ParseIP("10.0.0.9")}}, NetMode: pb.NetMode_NONE,
		},
		Stdin: io.NopCloser(strings.NewReader("")),
	}
	mounts := []*agentv1.Mount{{Source: "/share/id/0", Target: "/mnt"}}
	got := containerOf("id", p, true, mounts, []byte("nameserver 1.2.3.4\n"))
	want := &agentv1.Container{
		Id: "id",
		Process: &agentv1.Process{
			Argv: []string{"/bin/sh", "-c", "echo $X"}, Env: []string{"PATH=/bin", "X=a b"}, User: "app:other", WorkingDir: "/srv", Tty: true, Stdin: true,
		},
		Root: "/share/id/root", ReadOnly: true, Mounts: mounts, Hostname: "buildkitsandbox",
		Hosts:      []byte("127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n10.0.0.9\tdb\n"),
		ResolvConf: []byte("nameserver 1.2.3.4\n"), NoNetwork: true,
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	p.Meta.Hostname, p.Meta.NetMode, p.Stdin = "box", pb.NetMode_HOST, nil
	got = containerOf("id", p, false, nil, nil)
	if got.GetHostname() != "box" || got.GetNoNetwork() || got.GetReadOnly() || got.GetProcess().GetStdin() || !strings.Contains(string(got.GetHosts()), "localhost box\n") {
		t.Errorf("got %v", got)
	}
}

func TestRefuse(t *testing.T) {
	for name, m := range map[string]executor.Meta{
		"--security=insecure": {SecurityMode: pb.SecurityMode_INSECURE},
		"--device":            {CDIDevices: []*pb.CDIDevice{{Name: "x/y=z"}}},
		"ulimit":              {Ulimit: []*pb.Ulimit{{Name: "nofile"}}},
	} {
		if err := refuse(m); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := refuse(executor.Meta{NetMode: pb.NetMode_NONE}); err != nil {
		t.Error(err)
	}
}

func TestExitError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	if err := exitError(ctx, &agentv1.EntrypointExited{}, nil); err != nil {
		t.Error(err)
	}
	if err := exitError(ctx, &agentv1.EntrypointExited{Code: 7}, []int{0, 7}); err != nil {
		t.Error(err)
	}
	var exit *gatewayapi.ExitError
	if err := exitError(ctx, &agentv1.EntrypointExited{Code: 3}, nil); !errors.As(err, &exit) || exit.ExitCode != 3 || err.Error() != "exit code: 3" {
		t.Errorf("got %v", err)
	}
	if err := exitError(ctx, &agentv1.EntrypointExited{}, []int{1}); !errors.As(err, &exit) || exit.ExitCode != 0 {
		t.Errorf("0 where 1 is wanted: %v", err)
	}
	if err := exitError(ctx, &agentv1.EntrypointExited{Code: 137, OomKilled: true}, nil); !errors.Is(err, syscall.ENOMEM) || !strings.Contains(err.Error(), "exit code: 137") {
		t.Errorf("out of memory: %v", err)
	}
	cancel()
	if err := exitError(ctx, &agentv1.EntrypointExited{Code: 137}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// source is an executor.Mountable of fixed mounts.
type source struct {
	mounts   []mount.Mount
	released *int
}

func (s source) Mount(context.Context, bool) (executor.MountableRef, error) { return ref(s), nil }

type ref source

func (r ref) Mount() ([]mount.Mount, func() error, error) {
	return r.mounts, func() error { *r.released++; return nil }, nil
}

func (ref) IdentityMapping() *user.IdentityMapping { return nil }

func openStage(t *testing.T) stage {
	t.Helper()
	s := stage{t.TempDir()}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	return s
}

// A guest does between two mounts of a step whatever it can where it sees them, through what it opened before.
func TestHostileGuest(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir, released := t.TempDir(), 0
	bind := func(path string) source {
		return source{[]mount.Mount{{Type: "bind", Source: path, Options: []string{"rbind"}}}, &released}
	}
	root, victim, secret := filepath.Join(dir, "rootfs"), filepath.Join(dir, "victim"), filepath.Join(dir, "secret")
	if err := errors.Join(os.Mkdir(root, 0o755), os.WriteFile(victim, []byte("precious"), 0o600), os.WriteFile(secret, []byte("hidden"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s := openStage(t)
	share, err := os.OpenRoot(s.seen())
	if err != nil {
		t.Fatal(err)
	}
	defer share.Close()
	tr := s.tree("step")
	t.Cleanup(func() { tr.close() })
	if err := tr.mountRoot(t.Context(), executor.Mount{Src: bind(root)}); err != nil {
		t.Fatal(err)
	}
	step, err := share.OpenRoot("step")
	if err != nil {
		t.Fatal(err)
	}
	defer step.Close()
	for what, err := range map[string]error{
		"a link for a mount point": step.Symlink(victim, "0"),
		"a directory swapped":      share.Rename("step", "elsewhere"),
		"a step to come":           share.Symlink(dir, "next"),
		"a mount point gone":       step.Remove("root"),
	} {
		if !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.EBUSY) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := step.WriteFile("root/file", []byte("written"), 0o600); err != nil {
		t.Errorf("writing to its root: %v", err)
	}
	if _, err := tr.mountOne(t.Context(), "0", executor.Mount{Src: bind(secret), Dest: "/0"}); err != nil {
		t.Error(err)
	}
	// Were a link there all the same, it is not followed.
	if err := errors.Join(os.Symlink(victim, filepath.Join(tr.made, "1")), os.Symlink(root, filepath.Join(tr.made, "2"))); err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]string{"1": secret, "2": dir} {
		if _, err := tr.mountOne(t.Context(), name, executor.Mount{Src: bind(src), Dest: "/x"}); !errors.Is(err, os.ErrExist) {
			t.Errorf("over the link %s: %v", name, err)
		}
	}
	if err := errors.Join(os.Remove(filepath.Join(tr.made, "1")), os.Remove(filepath.Join(tr.made, "2"))); err != nil {
		t.Error(err)
	}
	// What the guest keeps hold of when the step ends is of no use to it.
	held, err := step.OpenRoot("root")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := tr.close(); err != nil {
		t.Error(err)
	}
	if err := held.WriteFile("file", []byte("after the end"), 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("writing after the end of the step: %v", err)
	}
	if data, err := os.ReadFile(victim); string(data) != "precious" {
		t.Errorf("the victim: %q, %v", data, err)
	}
}

// What a step could not unmount comes off with the stage, and is not removed.
func TestStageClose(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	root, released := t.TempDir(), 0
	file := filepath.Join(root, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v := New(t.TempDir(), Spec{}, nil, slog.New(slog.DiscardHandler))
	if err := v.stage().open(); err != nil {
		t.Fatal(err)
	}
	src := source{[]mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind"}}}, &released}
	tr := v.stage().tree("step")
	if err := tr.mountRoot(t.Context(), executor.Mount{Src: src}); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.mountOne(t.Context(), "0", executor.Mount{Src: src, Selector: "file", Dest: "/x"}); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(v.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the VM's directory is left: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("removed through a mount: %v", err)
	}
}

// Mount stubs are removed by paths that a guest may be changing: no link leads out.
func TestInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("changing the root needs root")
	}
	root, outside := t.TempDir(), t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(outside, "empty"), 0o755), os.Mkdir(filepath.Join(root, "etc"), 0o755)); err != nil {
		t.Fatal(err)
	}
	var clean func()
	if err := inside(root, func() {
		clean = executor.MountStubsCleaner(t.Context(), "/", []executor.Mount{{Dest: "/etc/empty"}}, false)
	}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(filepath.Join(root, "etc/empty"), 0o755), os.Symlink(outside, filepath.Join(root, "out"))); err != nil {
		t.Fatal(err)
	}
	var through error
	if err := inside(root, func() { clean(); through = os.Remove("/out/empty") }); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(through, os.ErrNotExist) {
		t.Errorf("removing through a link: %v", through)
	}
	if _, err := os.Stat(filepath.Join(root, "etc/empty")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the stub is left: %v", err)
	}
	if _, err := os.Stat(filepath.Join(outside, "empty")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(root); err != nil {
		t.Errorf("the host's root did not come back: %v", err)
	}
}

func TestTree(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir, outside := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(outside, "secret"), "of the host")
	root, data := filepath.Join(dir, "rootfs"), filepath.Join(dir, "data")
	write(filepath.Join(root, "file"), "in the root")
	write(filepath.Join(data, "sub/file"), "in a part")
	// Links that a step left behind.
	if err := errors.Join(os.Symlink(outside, filepath.Join(data, "absolute")), os.Symlink("../../../../../../../"+outside, filepath.Join(data, "up"))); err != nil {
		t.Fatal(err)
	}
	agent, err := net.Listen("unix", filepath.Join(dir, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if err := errors.Join(os.Chmod(filepath.Join(dir, "agent"), 0o640), os.Chown(filepath.Join(dir, "agent"), 12, 34)); err != nil {
		t.Fatal(err)
	}
	released := 0
	bind := func(path string) source {
		return source{[]mount.Mount{{Type: "bind", Source: path, Options: []string{"rbind"}}}, &released}
	}
	tr := openStage(t).tree("step")
	if err := tr.mountRoot(t.Context(), executor.Mount{Src: bind(root)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.close() })
	got, err := tr.mountAll(t.Context(), []executor.Mount{
		{Src: bind(data), Dest: "/data"},
		{Src: bind(data), Selector: "sub", Dest: "/part", Readonly: true},
		{Src: bind(data), Selector: "/sub/file", Dest: "/one"},
		{Src: bind(filepath.Join(data, "sub/file")), Dest: "/run/secrets/x", Readonly: true},
		{Src: source{[]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "ro", "size=100"}}}, &released}, Dest: "/tmp"},
		{Src: bind(filepath.Join(dir, "agent")), Dest: "/run/agent"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []*agentv1.Mount{
		{Source: "/share/step/0", Target: "/data"},
		{Source: "/share/step/1", Target: "/part", ReadOnly: true},
		{Source: "/share/step/2", Target: "/one"},
		{Source: "/share/step/3", Target: "/run/secrets/x", ReadOnly: true},
		{Target: "/tmp", ReadOnly: true, Options: "size=100"},
		{Source: filepath.Join(dir, "agent"), Target: "/run/agent", Socket: true, Mode: 0o640, Uid: 12, Gid: 34},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if paths := takeSockets(got); paths[5] != filepath.Join(dir, "agent") || len(paths) != 1 || got[5].GetSource() != "" {
		t.Errorf("sockets %v, and to the guest %v", paths, got[5])
	}
	for name, text := range map[string]string{"root/file": "in the root", "0/sub/file": "in a part", "1/file": "in a part", "2": "in a part", "3": "in a part"} {
		if data, err := os.ReadFile(filepath.Join(tr.seen, name)); string(data) != text {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	// A part that leads out of its mount is looked for inside.
	for i, selector := range []string{"absolute", "up", "up/secret", "../../data/sub/../../secret"} {
		if _, err := tr.mountOne(t.Context(), fmt.Sprint("x", i), executor.Mount{Src: bind(data), Selector: selector, Dest: "/x"}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("selector %q: %v", selector, err)
		}
	}
	if err := tr.close(); err != nil {
		t.Error(err)
	}
	for _, gone := range []string{tr.made, tr.seen, tr.aside} {
		if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", gone, err)
		}
	}
	if data, err := os.ReadFile(filepath.Join(root, "file")); string(data) != "in the root" {
		t.Errorf("the source went with its mount: %q, %v", data, err)
	}
	if released == 0 {
		t.Error("nothing was released")
	}
}

// brokenDriver never starts anything.
type brokenDriver struct {
	vmm.Driver
	starts int
}

func (d *brokenDriver) Start(context.Context, vmm.Spec) (vmm.Instance, error) {
	d.starts++
	return nil, errors.New("no VMM today")
}

func TestStartFails(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir, err := os.MkdirTemp("", "vmexec")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &brokenDriver{}
	v := New(dir, Spec{CPUs: 1, MemoryBytes: 1 << 30}, d, slog.New(slog.DiscardHandler))
	for range 2 { // the second step need not try again
		ready := make(chan struct{})
		_, err := v.Run(t.Context(), "", executor.Mount{}, nil, executor.ProcessInfo{}, ready)
		if err == nil || !strings.Contains(err.Error(), "starting the build's virtual machine: no VMM today") {
			t.Errorf("got %v", err)
		}
		<-ready
	}
	if d.starts != 1 {
		t.Errorf("%d starts", d.starts)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory is left: %v", err)
	}
	if err := v.Exec(t.Context(), "x", executor.ProcessInfo{}); !errdefs.IsAborted(err) {
		t.Errorf("after the end: %v", err)
	}
}
