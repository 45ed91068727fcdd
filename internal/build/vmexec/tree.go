//go:build linux

package vmexec

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/buildkit/executor"
	"golang.org/x/sys/unix"
)

const rootName = "root"

// unmountPatience is how long virtiofsd may take to close what the guest has forgotten.
const unmountPatience = 200 * time.Millisecond

// tree is what one step sees of the host: directories and files mounted below dir, which is in the shared directory, while it runs.
type tree struct {
	dir   string
	aside string         // of mounts of which the step gets only a part; outside the shared directory
	undo  []func() error // in the order of doing
}

func (t *tree) root() string { return filepath.Join(t.dir, rootName) }

// mountRoot mounts the step's root.
func (t *tree) mountRoot(ctx context.Context, root executor.Mount) error {
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return err
	}
	t.onClose(func() error { return os.Remove(t.dir) })
	mounts, err := t.resolve(ctx, root.Src, false)
	if err != nil {
		return err
	}
	return t.mount(mounts, t.root(), true)
}

// mountAll mounts the rest and returns what the guest has to do with it.
func (t *tree) mountAll(ctx context.Context, mounts []executor.Mount) ([]*agentv1.Mount, error) {
	var guest []*agentv1.Mount
	for i, m := range mounts {
		g, err := t.mountOne(ctx, strconv.Itoa(i), m)
		if err != nil {
			return nil, fmt.Errorf("mounting %s: %w", m.Dest, err)
		}
		guest = append(guest, g)
	}
	return guest, nil
}

func (t *tree) mountOne(ctx context.Context, name string, m executor.Mount) (*agentv1.Mount, error) {
	if m.Src == nil {
		return nil, errors.New("it has no source")
	}
	mounts, err := t.resolve(ctx, m.Src, m.Readonly)
	if err != nil {
		return nil, err
	}
	g := &agentv1.Mount{Target: m.Dest, ReadOnly: m.Readonly}
	if len(mounts) == 1 && mounts[0].Type == "tmpfs" {
		g.Options, g.ReadOnly = tmpfs(mounts[0].Options, m.Readonly)
		return g, nil // the guest's own memory
	}
	g.Source = filepath.Join(guestShare, filepath.Base(t.dir), name)
	target := filepath.Join(t.dir, name)
	if sub := filepath.Join("/", m.Selector); sub != "/" {
		return g, t.mountPart(mounts, sub, name, target)
	}
	dir := true
	if len(mounts) == 1 && mounts[0].Type == "bind" {
		info, err := os.Stat(mounts[0].Source)
		if err != nil {
			return nil, err
		}
		if info.Mode()&os.ModeSocket != 0 {
			return t.socket(m.Dest, mounts[0].Source, info)
		}
		dir = info.IsDir()
	}
	return g, t.mount(mounts, target, dir)
}

// socket has the guest make a socket like the host's, since none works through a share.
func (t *tree) socket(target, path string, info os.FileInfo) (*agentv1.Mount, error) {
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, fmt.Errorf("socket %s: its owner is unknown", path)
	}
	return &agentv1.Mount{Source: path, Target: target, Socket: true, Mode: uint32(info.Mode().Perm()), Uid: owner.Uid, Gid: owner.Gid}, nil
}

// tmpfs splits the options that are flags of mount(2) from the file system's own.
func tmpfs(options []string, readOnly bool) (own string, ro bool) {
	var rest []string
	for _, o := range options {
		switch o {
		case "ro":
			readOnly = true
		case "nosuid": // the agent's own choice
		default:
			rest = append(rest, o)
		}
	}
	return strings.Join(rest, ","), readOnly
}

// mountPart mounts the file or directory sub of a mount. A step that runs beside this one may be moving links about there: the kernel
// takes none of them for more than a path below the mount.
func (t *tree) mountPart(mounts []mount.Mount, sub, name, target string) error {
	if err := t.makeAside(); err != nil {
		return err
	}
	whole := filepath.Join(t.aside, name)
	if err := t.mount(mounts, whole, true); err != nil {
		return err
	}
	dir, err := os.OpenFile(whole, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), sub, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return &os.PathError{Op: "open", Path: sub, Err: err}
	}
	part := os.NewFile(uintptr(fd), sub)
	defer part.Close()
	info, err := part.Stat()
	if err != nil {
		return err
	}
	source := fmt.Sprintf("/proc/self/fd/%d", fd)
	return t.mount([]mount.Mount{{Type: "bind", Source: source, Options: []string{"rbind"}}}, target, info.IsDir())
}

func (t *tree) makeAside() error {
	err := os.Mkdir(t.aside, 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err == nil {
		t.onClose(func() error { return os.Remove(t.aside) })
	}
	return err
}

func (t *tree) resolve(ctx context.Context, src executor.Mountable, readOnly bool) ([]mount.Mount, error) {
	ref, err := src.Mount(ctx, readOnly)
	if err != nil {
		return nil, err
	}
	mounts, release, err := ref.Mount()
	if err != nil {
		return nil, err
	}
	if release != nil {
		t.onClose(release)
	}
	return mounts, nil
}

func (t *tree) mount(mounts []mount.Mount, target string, dir bool) error {
	make := func() error { return os.Mkdir(target, 0o700) }
	if !dir {
		make = func() error { return os.WriteFile(target, nil, 0o600) }
	}
	if err := make(); err != nil {
		return err
	}
	t.onClose(func() error { return os.Remove(target) })
	// The layers of several mounts lie one over the other; each comes off by itself.
	for _, m := range mounts {
		if err := m.Mount(target); err != nil {
			return err
		}
		t.onClose(func() error { return unmount(target) })
	}
	return nil
}

// unmount takes a mount away at once, or when the last file in it is closed where virtiofsd holds one longer than expected.
func unmount(target string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(unmountPatience); ; <-tick.C {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			return nil
		}
		if err != unix.EBUSY || time.Now().After(deadline) {
			break
		}
	}
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

func (t *tree) onClose(f func() error) { t.undo = append(t.undo, f) }

func (t *tree) close() error {
	var errs []error
	for i := len(t.undo) - 1; i >= 0; i-- {
		errs = append(errs, t.undo[i]())
	}
	t.undo = nil
	return errors.Join(errs...)
}
