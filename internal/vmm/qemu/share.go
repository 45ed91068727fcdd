package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/vmm"
)

// shareSocket is where QEMU finds the virtiofsd of the i-th share.
func shareSocket(dir string, i int) string { return filepath.Join(dir, fmt.Sprintf("share%d.sock", i)) }

// shareLog gets the words of all virtiofsd processes of an instance.
const shareLog = "virtiofsd.log"

// FindVirtiofsd returns the path of virtiofsd, which serves shares. No distribution has it in PATH.
func FindVirtiofsd() (string, error) {
	for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/libexec/qemu-kvm/virtiofsd"} {
		if unix.Access(path, unix.X_OK) == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath("virtiofsd")
	if err != nil {
		return "", hint.With(fmt.Errorf("finding virtiofsd, which shares directories with guests: %w: %w", err, errdefs.ErrNotFound),
			"install it: sudo apt install virtiofsd (Debian 12 and older: qemu-system-common)")
	}
	return path, nil
}

// startShares starts a virtiofsd for each share. Each ends by itself when its QEMU does; one whose QEMU never came has to be killed.
func startShares(spec vmm.Spec) (_ []*os.Process, err error) {
	if len(spec.Shares) == 0 {
		return nil, nil
	}
	binary, err := FindVirtiofsd()
	if err != nil {
		return nil, err
	}
	var started []*os.Process
	defer func() {
		if err != nil {
			endShares(started)
		}
	}()
	log, err := os.OpenFile(filepath.Join(spec.Dir, shareLog), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	for i, s := range spec.Shares {
		p, err := startShare(binary, spec, i, log)
		if err != nil {
			return started, fmt.Errorf("sharing %s: %w", s.Path, err)
		}
		started = append(started, p)
	}
	return started, nil
}

func startShare(binary string, spec vmm.Spec, i int, log *os.File) (*os.Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	socket, err := listen(shareSocket(spec.Dir, i))
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	files := []*os.File{null, log, log, socket}
	source := spec.Shares[i].Path
	if spec.Shares[i].ReadOnly {
		tree, err := readOnlyTree(source)
		if err != nil {
			return nil, fmt.Errorf("making it read-only: %w", err)
		}
		defer tree.Close()
		files, source = append(files, tree), "/proc/self/fd/4/." // virtiofsd takes no link
	}
	// The options are those of the C virtiofsd (QEMU 7), which its successor in Rust takes too. The sandbox is a chroot and not a mount
	// namespace, so that later mounts are seen. Nobody but this guest changes what it works on, so it may cache.
	argv := []string{binary, "--fd=3", "-f", "-o", "source=" + source, "-o", "sandbox=chroot", "-o", "cache=always", "-o", "xattr"}
	return startProcess(argv, files, spec.Tethered)
}

// readOnlyTree is a copy of the mounts at path that cannot be written through, whatever the guest does.
func readOnlyTree(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, os.NewSyscallError("open_tree", err)
	}
	tree := os.NewFile(uintptr(fd), path)
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err != nil {
		tree.Close()
		return nil, os.NewSyscallError("mount_setattr", err)
	}
	return tree, nil
}

func endShares(processes []*os.Process) {
	for _, p := range processes {
		if err := p.Kill(); err == nil || errors.Is(err, os.ErrProcessDone) {
			_, _ = p.Wait()
		}
	}
}

// startProcess starts a process in a session of its own. A tethered one gets SIGKILL when this process ends.
func startProcess(argv []string, files []*os.File, tethered bool) (*os.Process, error) {
	attr := &os.ProcAttr{Dir: "/", Env: []string{}, Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	if !tethered {
		return os.StartProcess(argv[0], argv, attr)
	}
	attr.Sys.Pdeathsig = unix.SIGKILL
	return startOnThread(argv, attr)
}
