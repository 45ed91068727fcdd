// Package container makes places in the guest where processes have a root, mounts, processes, host name and IPC of their own, as the
// OCI runtimes give them on a host: /proc, /sys, /dev, and the capabilities that containers have by default. It starts no process:
// whoever does so, does it inside. Imported by the agent. A Container may be used from several goroutines.
package container

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/netconf"
	"golang.org/x/sys/unix"
)

// killPatience bounds the wait for killed processes and an ended thread.
const killPatience = 5 * time.Second

// Container is an entered place: a thread that lives in its namespaces, and the PID 1 of its processes.
type Container struct {
	files   string                       // the directory of what was written for it
	sockets map[uint32]*net.UnixListener // by the numbers of their mounts
	init    int
	ended   sync.Once // init
	tid     int
	calls   chan func()
	closed  chan struct{}
}

// Open makes a container.
func Open(c *agentv1.Container) (*Container, error) {
	files, err := os.MkdirTemp("/", "container-")
	if err != nil {
		return nil, err
	}
	k := &Container{files: files, sockets: map[uint32]*net.UnixListener{}, calls: make(chan func()), closed: make(chan struct{})}
	if err := k.listen(c.GetMounts()); err != nil {
		k.remove()
		return nil, err
	}
	entered := make(chan error, 1)
	go k.live(c, entered)
	if err := <-entered; err != nil {
		k.End()
		k.remove()
		return nil, err
	}
	return k, nil
}

// listen makes the sockets, each the source of its mount.
func (k *Container) listen(mounts []*agentv1.Mount) error {
	for i, m := range mounts {
		if !m.GetSocket() {
			continue
		}
		m.Source = filepath.Join(k.files, fmt.Sprint("socket-", i))
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: m.Source, Net: "unix"})
		if err != nil {
			return err
		}
		k.sockets[uint32(i)] = l
		if err := errors.Join(os.Chmod(m.Source, os.FileMode(m.GetMode()&0o777)), os.Chown(m.Source, int(m.GetUid()), int(m.GetGid()))); err != nil {
			return err
		}
	}
	return nil
}

// Accept waits for a process to connect to a socket, until Close.
func (k *Container) Accept(mount uint32) (*net.UnixConn, error) {
	l := k.sockets[mount]
	if l == nil {
		return nil, fmt.Errorf("mount %d is no socket", mount)
	}
	return l.AcceptUnix()
}

func (k *Container) remove() {
	for _, l := range k.sockets {
		l.Close()
	}
	os.RemoveAll(k.files)
}

// live is the thread's life. It is locked and never unlocked, so that Go ends the thread with the function. The main thread, which Go
// could not end, is another goroutine's: see cmd/atoll-agent.
func (k *Container) live(c *agentv1.Container, entered chan<- error) {
	runtime.LockOSThread()
	k.tid = unix.Gettid()
	var err error
	k.init, err = enter(c, k.files)
	entered <- err
	if err != nil {
		return
	}
	for {
		select {
		case f := <-k.calls:
			f()
		case <-k.closed:
			_ = unix.Unmount("/", unix.MNT_DETACH)
			return
		}
	}
}

// Do calls f inside: its paths, and the processes it starts, are the container's.
func (k *Container) Do(f func()) error {
	done := make(chan struct{})
	select {
	case k.calls <- func() { defer close(done); f() }:
		<-done
		return nil
	case <-k.closed:
		return errors.New("the container has ended")
	}
}

// End kills all processes inside and waits for their end.
func (k *Container) End() { k.ended.Do(func() { endInit(k.init) }) }

// Close ends what runs inside and takes the place apart; it returns when none of its mounts is left. It is called once.
func (k *Container) Close() {
	k.End()
	close(k.closed)
	defer k.remove()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(killPatience); time.Now().Before(deadline); <-tick.C {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", k.tid)); err != nil {
			return
		}
	}
}

// root is where a container's root is mounted while it is made, each in a mount namespace of its own.
const root = "/container"

// enter takes this thread into a new container and returns the container's PID 1, also with an error where there is one.
func enter(c *agentv1.Container, files string) (init int, err error) {
	flags := unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if c.GetNoNetwork() {
		flags |= unix.CLONE_NEWNET
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return 0, err
	}
	if err := unix.Unshare(flags); err != nil {
		return 0, os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("making the mounts private: %w", err)
	}
	over, err := sources(c, files)
	defer func() {
		for _, m := range over {
			m.close()
		}
	}()
	if err != nil {
		return 0, err
	}
	if err := switchTo(c.GetRoot()); err != nil {
		return 0, err
	}
	// From here on every path is the container's own, and its links lead nowhere else.
	if _, err := makeTarget("/proc", true); err != nil {
		return 0, err
	}
	if init, err = startInit(); err != nil {
		return init, err
	}
	return init, furnish(c, over)
}

// furnish mounts what lies over the root and sets what is the container's own.
func furnish(c *agentv1.Container, over []*overlay) error {
	if err := mountSystem(); err != nil {
		return err
	}
	for _, m := range over {
		if err := m.mount(); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	if name := c.GetHostname(); name != "" {
		if err := unix.Sethostname([]byte(name)); err != nil {
			return fmt.Errorf("setting host name %q: %w", name, err)
		}
	}
	if c.GetNoNetwork() {
		if err := netconf.Set(nil); err != nil {
			return err
		}
	}
	if c.GetReadOnly() {
		if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("making the root read-only: %w", err)
		}
	}
	return dropCapabilities()
}

// switchTo makes a directory the root of this thread.
func switchTo(dir string) error {
	if err := unix.Mount(dir, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mounting the root %s: %w", dir, err)
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	// The initramfs cannot be left by pivot_root.
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// overlay is something mounted over the root: a tree of the guest, or a tmpfs.
type overlay struct {
	target   string
	tree     int // -1: a tmpfs
	dir      bool
	readOnly bool
	options  string
}

// sources opens what will be mounted while the guest's own paths are there.
func sources(c *agentv1.Container, files string) ([]*overlay, error) {
	var all []*overlay
	for target, data := range map[string][]byte{"/etc/hosts": c.GetHosts(), "/etc/resolv.conf": c.GetResolvConf()} {
		source := filepath.Join(files, filepath.Base(target))
		if err := os.WriteFile(source, data, 0o644); err != nil {
			return all, err
		}
		o := &overlay{target: target, tree: -1, readOnly: true}
		all = append(all, o)
		if err := o.open(source); err != nil {
			return all, err
		}
	}
	for _, m := range c.GetMounts() {
		o := &overlay{target: m.GetTarget(), tree: -1, dir: true, readOnly: m.GetReadOnly(), options: m.GetOptions()}
		all = append(all, o)
		if m.GetSource() == "" {
			continue
		}
		if err := o.open(m.GetSource()); err != nil {
			return all, err
		}
	}
	return all, nil
}

func (o *overlay) open(source string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	o.dir = info.IsDir()
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: source, Err: err}
	}
	o.tree = fd
	if o.readOnly {
		err = unix.MountSetattr(o.tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		if err != nil {
			return &os.PathError{Op: "mount_setattr", Path: source, Err: err}
		}
	}
	return nil
}

func (o *overlay) close() {
	if o.tree >= 0 {
		unix.Close(o.tree)
	}
}

func (o *overlay) mount() error {
	target, err := makeTarget(filepath.Join("/", o.target), o.dir)
	if err != nil {
		return err
	}
	if o.tree < 0 {
		var flags uintptr = unix.MS_NOSUID | unix.MS_NODEV
		if o.readOnly {
			flags |= unix.MS_RDONLY
		}
		return unix.Mount("tmpfs", target, "tmpfs", flags, o.options)
	}
	return unix.MoveMount(o.tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// makeTarget makes a mount point, also where links lead to nothing, and returns its path without links.
func makeTarget(path string, dir bool) (string, error) {
	path, err := resolve(path)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	if dir {
		return path, os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return "", err
	}
	return path, f.Close()
}

// resolve follows the links in a path, of which any part may be missing.
func resolve(path string) (string, error) {
	const maxLinks = 40 // as the kernel's own
	done, rest := "/", strings.Split(path, "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			done = filepath.Dir(done)
			continue
		}
		next := filepath.Join(done, name)
		to, err := os.Readlink(next)
		if err != nil { // no link, or not there
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", &os.PathError{Op: "resolving", Path: path, Err: unix.ELOOP}
		}
		if filepath.IsAbs(to) {
			done = "/"
		}
		rest = append(strings.Split(to, "/"), rest...)
	}
	return done, nil
}

// mountSystem mounts what the OCI runtimes give every container, but /proc, which its init has mounted.
func mountSystem() error {
	const safe = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	for _, m := range []struct {
		kind, on string
		flags    uintptr
		options  string
	}{
		{"tmpfs", "/dev", unix.MS_NOSUID | unix.MS_STRICTATIME, "mode=755,size=65536k"},
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"tmpfs", "/dev/shm", safe, "mode=1777,size=65536k"},
		{"mqueue", "/dev/mqueue", safe, ""},
		{"sysfs", "/sys", safe | unix.MS_RDONLY, ""},
		{"cgroup2", "/sys/fs/cgroup", safe | unix.MS_RDONLY, ""},
	} {
		on, err := makeTarget(m.on, true)
		if err != nil {
			return err
		}
		err = unix.Mount(m.kind, on, m.kind, m.flags, m.options)
		if err == unix.ENODEV && m.kind == "mqueue" { // a kernel may lack it
			continue
		}
		if err != nil {
			return fmt.Errorf("mounting %s: %w", m.on, err)
		}
	}
	if err := makeDevices(); err != nil {
		return err
	}
	for _, path := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		err := unix.Mount(path, path, "", unix.MS_BIND, "")
		if err == nil {
			err = unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|safe, "")
		}
		if err != nil && err != unix.ENOENT {
			return fmt.Errorf("making %s read-only: %w", path, err)
		}
	}
	return nil
}

func makeDevices() error {
	for name, number := range map[string]uint64{
		"null": unix.Mkdev(1, 3), "zero": unix.Mkdev(1, 5), "full": unix.Mkdev(1, 7), "random": unix.Mkdev(1, 8),
		"urandom": unix.Mkdev(1, 9), "tty": unix.Mkdev(5, 0),
	} {
		path := "/dev/" + name
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(number)); err != nil {
			return &os.PathError{Op: "mknod", Path: path, Err: err}
		}
		if err := unix.Chmod(path, 0o666); err != nil { // past the umask
			return err
		}
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return err
		}
	}
	return nil
}

// kept are the capabilities of a container's root, as Docker, containerd and BuildKit have them.
var kept = [...]int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW, unix.CAP_SETGID,
	unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
}

// dropCapabilities keeps processes started here from the others. The thread itself keeps what it has: executing a program as root
// gives what the bounding set holds, and no more.
func dropCapabilities() error {
	keep := uint64(0)
	for _, c := range kept {
		keep |= 1 << c
	}
	for c := range 64 {
		if keep&(1<<c) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if err == unix.EINVAL { // past the last that this kernel knows
			return nil
		}
		if err != nil {
			return fmt.Errorf("dropping capability %d: %w", c, err)
		}
	}
	return nil
}
