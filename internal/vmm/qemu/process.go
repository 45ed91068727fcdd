package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// find returns the process that runs in dir: the one whose command line is the saved one, which names dir. A pid alone may have
// been given to a stranger since.
func find(dir string) (int, error) {
	argv, err := savedArgv(dir)
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(filepath.Join(dir, pidFile))
	switch {
	case err == nil:
		if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && runs(pid, argv) {
			return pid, nil
		}
	case errors.Is(err, os.ErrNotExist):
		// Whoever started it died before it could write the pid.
		if pid := search(argv); pid != 0 {
			return pid, nil
		}
	default:
		return 0, err
	}
	return 0, fmt.Errorf("%s: its process runs no longer: %w", dir, errdefs.ErrNotFound)
}

func runs(pid int, argv []string) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && string(text) == strings.Join(argv, "\x00")+"\x00"
}

func search(argv []string) int {
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range slices.Backward(names) {
		if pid, err := strconv.Atoi(filepath.Base(name)); err == nil && runs(pid, argv) {
			return pid
		}
	}
	return 0
}

// openPID returns a pidfd, which names this process for ever and can be waited for by anyone.
func openPID(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// waitPID returns nil when the process has ended, or an error when the file is closed before. It holds no thread.
func waitPID(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
}

func killPID(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if errors.Is(sent, unix.ESRCH) {
		sent = nil
	}
	return errors.Join(err, sent)
}

// startOnThread starts a process with a parent-death signal. The kernel means the thread that forked, not its process: so that one is
// kept for as long as the child runs.
func startOnThread(argv []string, attr *os.ProcAttr) (*os.Process, error) {
	type result struct {
		p   *os.Process
		err error
	}
	started := make(chan result)
	go func() {
		runtime.LockOSThread()
		p, err := os.StartProcess(argv[0], argv, attr)
		var pidfd *os.File
		if err == nil {
			if pidfd, err = openPID(p.Pid); err != nil {
				_ = p.Kill()
				_, _ = p.Wait()
			}
		}
		if started <- (result{p, err}); err == nil {
			_ = waitPID(pidfd)
			pidfd.Close()
		}
		runtime.UnlockOSThread()
	}()
	r := <-started
	return r.p, r.err
}
