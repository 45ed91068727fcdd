// Package mounts is the guest's file systems: what the agent needs before it speaks, the root made of the read-only disk and the
// scratch disk, the switch to it, and the end. Only the agent, PID 1 in the initramfs, calls it, each function once and in order.
package mounts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// Early mounts what finding the host needs.
func Early() error {
	for _, m := range []struct {
		kind, on string
		flags    uintptr
	}{
		{"devtmpfs", "/dev", unix.MS_NOSUID}, // pages of /dev/zero may be executable, as in containers
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NOEXEC},
	} {
		os.Mkdir(m.on, 0o755)
		if err := unix.Mount(m.kind, m.on, m.kind, m.flags, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mounting %s: %w", m.on, err)
		}
	}
	return nil
}

// LoadModules loads the kernel modules of a directory in the order of their names. An absent directory has none.
func LoadModules(dir string) error {
	entries, err := os.ReadDir(dir) // sorted
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var failed error
	for _, e := range entries {
		if e.IsDir() { // modules on demand
			continue
		}
		if err := loadModule(filepath.Join(dir, e.Name())); err != nil {
			failed = errors.Join(failed, fmt.Errorf("loading module %s: %w", e.Name(), err))
		}
	}
	return failed
}

func loadModule(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.FinitModule(fd, "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// LoadedModules returns the names of the modules that the kernel has.
func LoadedModules() []string {
	data, _ := os.ReadFile("/proc/modules")
	var names []string
	for line := range strings.Lines(string(data)) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	return names
}

// ModuleDevices makes the devices whose opening loads their module, as kmod's static nodes are.
func ModuleDevices() {
	for _, d := range []struct {
		path  string
		mode  uint32
		minor uint32
	}{{"/dev/fuse", 0o666, 229}, {"/dev/net/tun", 0o666, 200}, {"/dev/loop-control", 0o660, 237}} {
		os.Mkdir(filepath.Dir(d.path), 0o755)
		if unix.Mknod(d.path, unix.S_IFCHR|d.mode, int(unix.Mkdev(10, d.minor))) == nil {
			os.Chmod(d.path, os.FileMode(d.mode))
		}
	}
}

// Root is the mounted root.
type Root struct {
	scratch int // its mount, which no path leads to after Switch; -1 when it is a tmpfs
}

const (
	newRoot = "/newroot"
	shm     = "/dev/shm"
)

// Mount joins the root disks and the scratch disk by overlayfs.
func Mount(r *agentv1.Root) (*Root, error) {
	const scratch = "/scratch"
	for _, d := range []string{scratch, newRoot} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	lower, like, err := mountLower(r.GetDisks())
	if err != nil {
		return nil, err
	}
	root := &Root{scratch: -1}
	if r.GetScratch() == "" {
		if err := unix.Mount("scratch", scratch, "tmpfs", unix.MS_NOATIME, "mode=0755"); err != nil {
			return nil, fmt.Errorf("mounting a scratch tmpfs: %w", err)
		}
	} else {
		if err := mountDisk(r.GetScratch(), scratch, r.GetScratchType(), unix.MS_NOATIME, "discard"); err != nil {
			return nil, fmt.Errorf("mounting the scratch disk %s: %w", r.GetScratch(), err)
		}
		fd, err := unix.Open(scratch, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		root.scratch = fd
	}
	if err := makeUpper(like, scratch); err != nil {
		return nil, fmt.Errorf("preparing the scratch disk: %w", err)
	}
	options := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + scratch + "/upper,workdir=" + scratch + "/work"
	if err := unix.Mount("overlay", newRoot, "overlay", unix.MS_NOATIME, options); err != nil {
		return nil, fmt.Errorf("joining root and scratch disk: %w", err)
	}
	return root, nil
}

// mountLower mounts the root disks, the topmost first. like is where the one is that says what the root directory is like.
func mountLower(disks []*agentv1.RootDisk) (lower []string, like string, err error) {
	if len(disks) == 0 {
		return nil, "", errors.New("the machine has no root disk")
	}
	for i, d := range disks {
		device := d.GetDevice()
		if v := d.GetVerity(); v != nil {
			if device, err = setUpVerity(i, device, v); err != nil {
				return nil, "", fmt.Errorf("setting up dm-verity for the root disk %s: %w", d.GetDevice(), err)
			}
		}
		on := fmt.Sprint("/lower", i)
		if err := os.Mkdir(on, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, "", err
		}
		if err := mountDisk(device, on, d.GetType(), unix.MS_RDONLY|unix.MS_NOATIME, ""); err != nil {
			return nil, "", fmt.Errorf("mounting the root disk %s: %w", d.GetDevice(), err)
		}
		lower = append(lower, on)
		if like == "" && d.GetHasRoot() {
			like = on
		}
	}
	if like == "" {
		like = lower[len(lower)-1]
	}
	return lower, like, nil
}

// makeUpper makes the overlay's own directories; the root directory's owner and mode are those of like.
func makeUpper(like, scratch string) error {
	if err := os.Mkdir(scratch+"/work", 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	upper := scratch + "/upper"
	if err := os.Mkdir(upper, 0o755); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(like, &st); err != nil {
		return err
	}
	if err := unix.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(upper, st.Mode&0o7777)
}

// mountDisk waits for the device, which the kernel may still be looking at.
func mountDisk(device, on, kind string, flags uintptr, options string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); ; <-tick.C {
		err := unix.Mount(device, on, kind, flags, options)
		if err != unix.ENOENT && err != unix.ENXIO || time.Now().After(deadline) {
			return err
		}
	}
}

// Switch makes the mounted root the root of all processes and frees the initramfs.
func Switch() error {
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := os.MkdirAll(newRoot+d, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(d, newRoot+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s: %w", d, err)
		}
	}
	os.Remove("/init")
	os.RemoveAll("/lib")
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// System mounts what processes expect beside their root. /run and /tmp stay as the image has them.
func System() error {
	const safe = unix.MS_NOSUID | unix.MS_NOEXEC
	for _, m := range []struct {
		kind, on string
		flags    uintptr
		options  string
	}{
		{"devpts", "/dev/pts", safe, "mode=0620,gid=5,ptmxmode=0666"},
		{"tmpfs", shm, safe | unix.MS_NODEV, "mode=1777"},
		{"mqueue", "/dev/mqueue", safe | unix.MS_NODEV, ""},
		{"cgroup2", "/sys/fs/cgroup", safe | unix.MS_NODEV, ""},
	} {
		if strings.HasPrefix(m.on, "/dev/") {
			os.Mkdir(m.on, 0o755)
		}
		err := unix.Mount(m.kind, m.on, m.kind, m.flags, m.options)
		if err == unix.ENODEV && m.kind == "mqueue" { // a kernel may lack it
			os.Remove(m.on)
			err = nil
		}
		if err != nil && err != unix.EBUSY {
			return fmt.Errorf("mounting %s: %w", m.on, err)
		}
	}
	for name, target := range map[string]string{
		"core": "/proc/kcore", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// Shares mounts directories of the host.
func Shares(shares []*agentv1.Share) error {
	for _, s := range shares {
		if err := os.MkdirAll(s.GetPath(), 0o755); err != nil {
			return err
		}
		var flags uintptr
		if s.GetReadOnly() {
			flags = unix.MS_RDONLY
		}
		if err := mountDisk(s.GetTag(), s.GetPath(), "virtiofs", flags, ""); err != nil {
			return fmt.Errorf("mounting share %q on %s: %w", s.GetTag(), s.GetPath(), err)
		}
	}
	return nil
}

// Console makes a terminal, open as fd, the /dev/console of all processes.
func Console(fd int) error {
	if err := unix.Mount(fdPath(fd), "/dev/console", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting the console: %w", err)
	}
	return nil
}

// Forget makes the kernel let go of every file that nobody uses: the host's virtiofsd holds those of a share open, and with them the
// host's mounts.
func Forget() {
	_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// MakeReadOnly forbids writing to the root; what else is mounted, also of the root's own file system, stays as it is.
func MakeReadOnly() error {
	return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

// Down brings all that was written to the disks and leaves the scratch disk clean. All other processes have ended.
func (r *Root) Down() error {
	unix.Sync()
	if r.scratch < 0 {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil { // the file system, wherever it is mounted
		return fmt.Errorf("making the root read-only: %w", err)
	}
	if err := unix.Mount("", fdPath(r.scratch), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("making the scratch disk read-only: %w", err)
	}
	return nil
}

func fdPath(fd int) string { return fmt.Sprint("/proc/self/fd/", fd) }
