//go:build linux

package vmexec

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// stage is where the roots and mounts of steps are put for the guest to see. A hostile guest can do whatever it likes in a directory that
// it shares, at any time, and the host mounts there as root. So the guest sees the directory through a read-only mount, in which it
// can write only to what is mounted for it: each name on the way to a mount point is of the host's making. The host makes and removes
// mount points by another way to the same directory, which the guest does not see.
type stage struct {
	dir string
}

func (s stage) hidden() string { return filepath.Join(s.dir, "hidden") }

// made is where mount points are made.
func (s stage) made() string { return filepath.Join(s.hidden(), "steps") }

// seen is the shared directory, where they are mounted on.
func (s stage) seen() string { return filepath.Join(s.dir, "share") }

func (s stage) open() error {
	if err := os.Mkdir(s.hidden(), 0o700); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", s.hidden(), "tmpfs", flags, "mode=0700"); err != nil {
		return &os.PathError{Op: "mount", Path: s.hidden(), Err: err}
	}
	// Private, so that what is mounted where the guest looks is mounted nowhere else.
	if err := unix.Mount("", s.hidden(), "", unix.MS_PRIVATE, ""); err != nil {
		return &os.PathError{Op: "mount", Path: s.hidden(), Err: err}
	}
	for _, dir := range []string{s.made(), s.seen()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	if err := unix.Mount(s.made(), s.seen(), "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "mount", Path: s.seen(), Err: err}
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(unix.AT_FDCWD, s.seen(), unix.AT_SYMLINK_NOFOLLOW, attr); err != nil {
		return &os.PathError{Op: "make read-only", Path: s.seen(), Err: err}
	}
	return nil
}

// close takes away all mounts, also those that a step could not. After an error something may still be mounted.
func (s stage) close() error {
	for _, dir := range []string{s.seen(), s.hidden()} {
		// Neither a directory nor a mount is there if the stage was not opened or not wholly.
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if err != nil && err != unix.EINVAL && err != unix.ENOENT {
			return &os.PathError{Op: "unmount", Path: dir, Err: err}
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// tree is the step's part of the stage.
func (s stage) tree(id string) *tree {
	return &tree{made: filepath.Join(s.made(), id), seen: filepath.Join(s.seen(), id), aside: filepath.Join(s.hidden(), "aside-"+id)}
}

// makeMountPoint makes an empty directory or file that is new.
func makeMountPoint(path string, dir bool) error {
	if dir {
		return os.Mkdir(path, 0o700)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// inside calls f in a thread whose root is dir, so that links in it lead nowhere else, also while a guest moves them about.
func inside(dir string, f func()) error {
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this function
		ended <- chrooted(dir, f)
	}()
	if err := <-ended; err != nil {
		return fmt.Errorf("working in %s: %w", dir, err)
	}
	return nil
}

func chrooted(dir string, f func()) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	// The way back is taken so that nothing keeps dir busy, whenever the thread ends.
	host, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer host.Close()
	if err := enterRoot(func() error { return unix.Chdir(dir) }); err != nil {
		return err
	}
	f()
	return enterRoot(func() error { return unix.Fchdir(int(host.Fd())) })
}

func enterRoot(chdir func() error) error {
	if err := chdir(); err != nil {
		return os.NewSyscallError("chdir", err)
	}
	return os.NewSyscallError("chroot", unix.Chroot("."))
}
