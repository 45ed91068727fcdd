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

// lateWrites is how long files may take to be closed that the guest had open for writing.
const lateWrites = 5 * time.Second

// tree is what one step sees of the host while it runs: directories and files mounted in a directory on the stage.
type tree struct {
	made  string         // where its mount points are made
	seen  string         // where they are mounted on
	aside string         // of mounts of which the step gets only a part; not shared
	undo  []func() error // in the order of doing
}

func (t *tree) root() string { return filepath.Join(t.seen, rootName) }

// mountRoot mounts the step's root.
func (t *tree) mountRoot(ctx context.Context, root executor.Mount) error {
	if err := makeMountPoint(t.made, true); err != nil {
		return err
	}
	t.onClose(func() error { return os.Remove(t.made) })
	mounts, err := t.resolve(ctx, root.Src, false)
	if err != nil {
		return err
	}
	return t.mountSeen(mounts, rootName, true)
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
	g.Source = filepath.Join(guestShare, filepath.Base(t.seen), name)
	if sub := filepath.Join("/", m.Selector); sub != "/" {
		return g, t.mountPart(mounts, sub, name)
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
	return g, t.mountSeen(mounts, name, dir)
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
func (t *tree) mountPart(mounts []mount.Mount, sub, name string) error {
	if err := t.makeAside(); err != nil {
		return err
	}
	whole := filepath.Join(t.aside, name)
	if err := t.mount(mounts, whole, whole, true); err != nil {
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
	return t.mountSeen([]mount.Mount{{Type: "bind", Source: source, Options: []string{"rbind"}}}, name, info.IsDir())
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

func (t *tree) mountSeen(mounts []mount.Mount, name string, dir bool) error {
	return t.mount(mounts, filepath.Join(t.made, name), filepath.Join(t.seen, name), dir)
}

// mount makes a mount point at made, which is target or another way to it, and mounts there.
func (t *tree) mount(mounts []mount.Mount, made, target string, dir bool) error {
	if err := makeMountPoint(made, dir); err != nil {
		return err
	}
	t.onClose(func() error { return os.Remove(made) })
	// The layers of several mounts lie one over the other; each comes off by itself.
	for _, m := range mounts {
		if err := m.Mount(target); err != nil {
			return err
		}
		t.onClose(func() error { return unmount(target) })
	}
	return nil
}

// unmount takes a mount away at once, or when the last file in it is closed where virtiofsd holds one longer than expected. The guest
// cannot change what was mounted afterwards: it is a layer of an image then, or somebody else's.
func unmount(target string) error {
	err := retry(unmountPatience, func() error { return unix.Unmount(target, unix.UMOUNT_NOFOLLOW) })
	if err == nil {
		return nil
	}
	// Through what virtiofsd still holds a guest could go on to write.
	err = retry(lateWrites, func() error {
		return unix.MountSetattr(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	})
	if err != nil {
		err = fmt.Errorf("the virtual machine goes on writing to %s after the step: %w", filepath.Base(target), err)
	}
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "unmount", Path: target, Err: err}
	}
	return err
}

// retry does something again while it is said to be busy.
func retry(patience time.Duration, do func() error) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		if err := do(); !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
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
