package container

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// startInit starts the PID 1 of this thread's new PID namespace, which mounts its /proc: only a process that is in the namespace can.
// It reaps what is orphaned there, and all there ends with it.
//
// It is a copy of the agent that never leaves initMain. To start the agent's program anew instead would cost a start of Go's runtime
// for each container.
func startInit() (pid int, err error) {
	var ready [2]int
	if err := unix.Pipe2(ready[:], unix.O_CLOEXEC); err != nil {
		return 0, os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(ready[0])
	args := initArgs{kind: [5]byte{'p', 'r', 'o', 'c'}, on: [6]byte{'/', 'p', 'r', 'o', 'c'}, ready: uintptr(ready[1]), ignore: sigaction{handler: sigIgn}}
	all, old := ^uint64(0), uint64(0)
	syscall.ForkLock.Lock()
	// The copy must not run Go's signal handlers.
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), unsafe.Sizeof(all), 0, 0)
	child, errno := forkInit(&args)
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, unsafe.Sizeof(old), 0, 0)
	syscall.ForkLock.Unlock()
	unix.Close(ready[1])
	if errno != 0 {
		return 0, os.NewSyscallError("fork", errno)
	}
	var answer [1]byte
	for {
		n, err := unix.Read(ready[0], answer[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, errors.New("the container's init ended at once")
		case answer[0] != 0:
			return 0, fmt.Errorf("mounting /proc: %w", syscall.Errno(answer[0]))
		}
		return int(child), nil
	}
}

// initArgs is all that the copy touches: it must not allocate.
type initArgs struct {
	kind   [5]byte
	on     [6]byte
	answer [1]byte
	ready  uintptr
	ignore sigaction
}

// sigaction is the kernel's own struct sigaction.
type sigaction struct{ handler, flags, restorer, mask uint64 }

const sigIgn = 1

// forkInit forks. In the child there is one thread and no Go runtime to speak of: raw system calls only, no growing stack.
//
//go:noinline
//go:norace
//go:nosplit
func forkInit(a *initArgs) (pid uintptr, errno syscall.Errno) {
	pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return pid, errno
	}
	const lastFD = 1<<31 - 1
	const flags = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	_, _, errno = syscall.RawSyscall6(unix.SYS_MOUNT, uintptr(unsafe.Pointer(&a.kind)), uintptr(unsafe.Pointer(&a.on)), uintptr(unsafe.Pointer(&a.kind)), flags, 0, 0)
	// Children of a parent that ignores their end need nobody to reap them.
	syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGCHLD), uintptr(unsafe.Pointer(&a.ignore)), 0, unsafe.Sizeof(a.ignore.mask), 0, 0)
	a.answer[0] = byte(errno)
	syscall.RawSyscall(unix.SYS_WRITE, a.ready, uintptr(unsafe.Pointer(&a.answer)), 1)
	syscall.RawSyscall(unix.SYS_CLOSE_RANGE, 0, lastFD, 0) // others wait for the end of what the agent has open
	for errno == 0 {
		syscall.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
	}
	syscall.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	return 0, 0
}

// endInit kills a namespace's PID 1 and with it all processes there, and waits until they have ended.
func endInit(pid int) {
	if pid == 0 || unix.Kill(pid, unix.SIGKILL) != nil {
		return
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(killPatience); time.Now().Before(deadline) && unix.Kill(pid, 0) == nil; <-tick.C {
	}
}
