package process

import (
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Limit is a resource limit as setrlimit(2) has it.
type Limit struct {
	Name       string // as nofile
	Soft, Hard uint64 // unix.RLIM_INFINITY: none
}

// resource is the number of a limit, by the names of ulimit's and of Docker's.
func resource(name string) (number int, ok bool) {
	switch name {
	case "as":
		return unix.RLIMIT_AS, true
	case "core":
		return unix.RLIMIT_CORE, true
	case "cpu":
		return unix.RLIMIT_CPU, true
	case "data":
		return unix.RLIMIT_DATA, true
	case "fsize":
		return unix.RLIMIT_FSIZE, true
	case "locks":
		return unix.RLIMIT_LOCKS, true
	case "memlock":
		return unix.RLIMIT_MEMLOCK, true
	case "msgqueue":
		return unix.RLIMIT_MSGQUEUE, true
	case "nice":
		return unix.RLIMIT_NICE, true
	case "nofile":
		return unix.RLIMIT_NOFILE, true
	case "nproc":
		return unix.RLIMIT_NPROC, true
	case "rss":
		return unix.RLIMIT_RSS, true
	case "rtprio":
		return unix.RLIMIT_RTPRIO, true
	case "rttime":
		return unix.RLIMIT_RTTIME, true
	case "sigpending":
		return unix.RLIMIT_SIGPENDING, true
	case "stack":
		return unix.RLIMIT_STACK, true
	}
	return 0, false
}

// SetLimits limits a process that is there; 0 is the caller itself. The error is an *Error where a limit is not to be had.
func SetLimits(pid int, limits []Limit) error {
	for _, l := range limits {
		number, ok := resource(l.Name)
		if !ok {
			return invalid("ulimit " + strconv.Quote(l.Name) + ": there is no such limit")
		}
		if err := unix.Prlimit(pid, number, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}, nil); err != nil {
			return invalid(strings.Join([]string{"ulimit ", l.Name, "=", limitValue(l.Soft), ":", limitValue(l.Hard), ": ", reason(err)}, ""))
		}
	}
	return nil
}

func limitValue(n uint64) string {
	if n == unix.RLIM_INFINITY {
		return "-1"
	}
	return strconv.FormatUint(n, 10)
}

// forkLimited is syscall.ForkExec for a process with limits. The agent does not put them on for the moment of the fork: some of them
// would hit it. So it traces the process, which stops before its first instruction.
func forkLimited(path string, argv []string, attr *syscall.ProcAttr, limits []Limit) (pid int, err error) {
	runtime.LockOSThread() // the thread that forks is the one that traces
	defer runtime.UnlockOSThread()
	attr.Sys.Ptrace = true
	if pid, err = syscall.ForkExec(path, argv, attr); err != nil {
		return 0, err
	}
	if err = waitFor(pid); err == nil {
		err = SetLimits(pid, limits)
	}
	if err == nil {
		err = unix.PtraceDetach(pid)
	}
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
		waitFor(pid)
	}
	return pid, err
}

func waitFor(pid int) error {
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != unix.EINTR {
			return err
		}
	}
}
