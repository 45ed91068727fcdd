// Package process runs the guest's processes: exactly the words, environment, directory and user asked for, in a control group of
// their own, on pipes or a terminal. It also reaps every orphan, as PID 1 must, without losing an exit code.
// It works on the root it runs in and knows nothing of the agent protocol but the classes of failure.
// A Supervisor and a Process may be used from several goroutines.
package process

import (
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// Spec is a process to start.
type Spec struct {
	Argv       []string
	Env        []string
	Dir        string
	MakeDir    bool   // Dir is made when it is not there
	User       string // name|uid[:group|gid]
	TTY        bool
	Stdin      bool
	Rows, Cols uint16
	Limits     []Limit
	OnTerminal func(slave int) error // called with the process's terminal before it starts; nil: nothing is to be done
	Cgroup     string                // a directory, made when absent; empty: the agent's own
	// CgroupFile is that directory, where its path does not lead to it from the root that Start is called in; else nil.
	CgroupFile  *os.File
	LeaveMemory bool // the group Cgroup gets less than all the memory there is
}

// Process is a started process. Its owner reads Stdout and Stderr to their end and closes all three.
type Process struct {
	PID    int
	Stdin  *os.File // nil without stdin
	Stdout *os.File // of a terminal: both directions, the same file as Stdin where that is not nil
	Stderr *os.File // nil with a terminal

	tty    bool
	cgroup string
	killed atomic.Bool // by Kill
	owner  *Supervisor
	done   chan struct{}
	status unix.WaitStatus // valid after done
}

// Supervisor starts processes and waits for all children. There is one, in PID 1.
type Supervisor struct {
	unprotected bool       // children are put back among those that the kernel may kill for want of memory
	mu          sync.Mutex // guards what follows; held from fork to registration, so that no exit is taken before
	children    map[int]*Process
	empty       chan struct{}       // not nil: closed once there are no children
	groups      map[string]struct{} // control groups of ended processes that other processes were left in
}

// NewSupervisor begins to reap.
func NewSupervisor() *Supervisor {
	s := &Supervisor{children: map[int]*Process{}, groups: map[string]struct{}{}}
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	go func() {
		for range died {
			s.reap()
		}
	}()
	return s
}

// Unprotected is for an agent that the kernel must not kill for want of memory: its children inherit that, and must not. It is called before
// the first Start.
func (s *Supervisor) Unprotected() { s.unprotected = true }

func (s *Supervisor) reap() {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.sweepLocked()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ECHILD:
			if s.empty != nil {
				close(s.empty)
				s.empty = nil
			}
			return
		case err != nil || pid == 0:
			return
		}
		if p := s.children[pid]; p != nil && (status.Exited() || status.Signaled()) {
			delete(s.children, pid)
			p.status = status
			close(p.done)
		}
	}
}

// sweepLocked removes the control groups that the last process has left meanwhile.
func (s *Supervisor) sweepLocked() {
	for dir := range s.groups {
		if err := os.Remove(dir); !errors.Is(err, unix.EBUSY) {
			delete(s.groups, dir)
		}
	}
}

// WaitEmpty waits until no process is left but the agent, or the timeout, and says which.
func (s *Supervisor) WaitEmpty(timeout time.Duration) bool {
	s.mu.Lock()
	if s.empty == nil {
		s.empty = make(chan struct{})
	}
	empty := s.empty
	s.mu.Unlock()
	s.reap()
	select {
	case <-empty:
		return true
	case <-time.After(timeout):
	}
	select {
	case <-empty:
		return true
	default:
		return false
	}
}

// Start starts a process. The error is an *Error where the fault is the caller's.
func (s *Supervisor) Start(spec Spec) (p *Process, err error) {
	if len(spec.Argv) == 0 || spec.Argv[0] == "" {
		return nil, invalid("no command")
	}
	user, err := lookUpUser(spec.User)
	if err != nil {
		return nil, err
	}
	env := withDefaults(spec.Env, user.home)
	dir := spec.Dir
	if dir == "" {
		dir = "/"
	}
	if spec.MakeDir {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, invalid("working directory " + dir + ": " + reason(err))
		}
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	path, err := lookUpCommand(spec.Argv[0], env, dir)
	if err != nil {
		return nil, err
	}

	p = &Process{tty: spec.TTY, cgroup: spec.Cgroup, owner: s, done: make(chan struct{})}
	attr := &syscall.ProcAttr{Env: env, Sys: &syscall.SysProcAttr{
		Setsid:     true,
		Setctty:    spec.TTY,
		Credential: &syscall.Credential{Uid: user.uid, Gid: user.gid, Groups: user.allGroups()},
	}}
	theirs, err := p.openStreams(spec, user)
	defer closeAll(theirs)
	if err != nil {
		p.closeStreams()
		return nil, err
	}
	if spec.TTY && spec.OnTerminal != nil {
		if err := spec.OnTerminal(theirs[0]); err != nil {
			p.closeStreams()
			return nil, err
		}
	}
	for _, fd := range theirs {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	group := spec.CgroupFile
	if group == nil && spec.Cgroup != "" {
		if group, err = OpenCgroup(spec.Cgroup); err == nil {
			defer group.Close()
		}
	}
	if spec.LeaveMemory {
		leaveMemory(spec.Cgroup)
	}
	if group != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(group.Fd())
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	// As root, and not in the child as its user: images have a WORKDIR that their USER may not enter, and Docker starts there.
	if err = syscall.Chdir(dir); err != nil {
		err = invalid("working directory " + dir + ": " + reason(err))
	} else {
		defer syscall.Chdir("/")
		p.PID, err = fork(path, spec.Argv, attr, spec.Limits)
	}
	if err != nil {
		p.closeStreams()
		os.Remove(spec.Cgroup)
		return nil, startError(spec.Argv[0], err)
	}
	s.children[p.PID] = p
	if s.unprotected {
		os.WriteFile("/proc/"+strconv.Itoa(p.PID)+"/oom_score_adj", []byte("0"), 0)
	}
	return p, nil
}

// checkDir classes a working directory that cannot be one as Docker does, by whether it is there.
func checkDir(dir string) error {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return &Error{agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND, "working directory " + dir + ": " + reason(err)}
	case err == nil && !st.IsDir():
		err = syscall.ENOTDIR
	}
	if err != nil {
		return &Error{agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE, "working directory " + dir + ": " + reason(err)}
	}
	return nil
}

// LookUp finds what Start would run for a command of root, and with which environment. The error is an *Error where the fault is the
// caller's.
func LookUp(argv, env []string, dir string) (path string, full []string, err error) {
	if len(argv) == 0 || argv[0] == "" {
		return "", nil, invalid("no command")
	}
	root, err := lookUpUser("")
	if err != nil {
		return "", nil, err
	}
	full = withDefaults(env, root.home)
	path, err = lookUpCommand(argv[0], full, dir)
	return path, full, err
}

// Adopt makes a Process of one that is not the agent's child and never ends, with the master of its terminal.
func (s *Supervisor) Adopt(pid int, terminal *os.File) *Process {
	return &Process{PID: pid, Stdin: terminal, Stdout: terminal, tty: true, owner: s, done: make(chan struct{})}
}

func closeAll(fds []int) {
	for i, fd := range fds {
		if i == 0 || fd != fds[i-1] { // a terminal is there three times
			unix.Close(fd)
		}
	}
}

func (p *Process) closeStreams() {
	for _, f := range []*os.File{p.Stdin, p.Stdout, p.Stderr} {
		if f != nil {
			f.Close()
		}
	}
}

func fork(path string, argv []string, attr *syscall.ProcAttr, limits []Limit) (pid int, err error) {
	if len(limits) > 0 {
		return forkLimited(path, argv, attr, limits)
	}
	return syscall.ForkExec(path, argv, attr)
}

func startError(name string, err error) error {
	var known *Error
	if errors.As(err, &known) {
		return err
	}
	class := agentv1.FailureClass_FAILURE_CLASS_UNSPECIFIED
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR: // also a script whose interpreter is missing
		class = agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND
	case syscall.EACCES, syscall.ENOEXEC, syscall.EISDIR, syscall.EPERM, syscall.ELOOP, syscall.ETXTBSY, syscall.ELIBBAD:
		class = agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE
	case syscall.E2BIG, syscall.EINVAL:
		class = agentv1.FailureClass_FAILURE_CLASS_INVALID
	}
	return &Error{class, "exec: " + strconv.Quote(name) + ": " + err.Error()}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how it ended, once Done is closed.
func (p *Process) Exit() *agentv1.EntrypointExited {
	x := &agentv1.EntrypointExited{Code: int32(p.status.ExitStatus()), OomKilled: oomKilled(p.cgroup)}
	if p.status.Signaled() {
		x.Signal = int32(p.status.Signal())
		x.Code = 128 + x.Signal
	}
	return x
}

// Signal sends a signal to the process alone. It is no error when it has ended.
func (p *Process) Signal(sig unix.Signal) error {
	p.owner.mu.Lock() // the pid is not given to another process while it has not been reaped
	defer p.owner.mu.Unlock()
	select {
	case <-p.done:
		return nil
	default:
		return unix.Kill(p.PID, sig)
	}
}

// Kill ends the process and all in its control group at once.
func (p *Process) Kill() {
	p.killed.Store(true)
	if p.cgroup == "" || os.WriteFile(filepath.Join(p.cgroup, "cgroup.kill"), []byte("1"), 0) != nil {
		p.Signal(unix.SIGKILL)
	}
}

// Release removes the control group of an ended process. One with processes left in it goes when the last of them does. Those that Kill has
// ended may take a moment to be gone.
func (p *Process) Release() {
	if p.cgroup == "" {
		return
	}
	err := os.Remove(p.cgroup)
	for pause := time.Millisecond; errors.Is(err, unix.EBUSY) && p.killed.Load() && pause < time.Second; pause *= 2 {
		time.Sleep(pause)
		err = os.Remove(p.cgroup)
	}
	if errors.Is(err, unix.EBUSY) {
		p.owner.mu.Lock()
		defer p.owner.mu.Unlock()
		p.owner.groups[p.cgroup] = struct{}{}
		p.owner.sweepLocked() // the last may have gone in between
	}
}
