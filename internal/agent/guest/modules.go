package guest

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

// Modules on demand: the image has no modules of the machine's kernel, and the initramfs has only what every machine uses. When the kernel
// needs another one, as for a bridge or a packet filter, it runs its modprobe, which is this program (kernel.modprobe): that asks the agent
// by a socket, the agent asks the host, and loads what comes. Nothing of it costs a machine that asks for nothing.

const (
	modprobePath   = "/proc/sys/kernel/modprobe"
	modprobeSocket = "@atoll/modules" // abstract: it needs no directory of the image, and is in the namespace that the kernel runs modprobe in
	// modulePatience bounds how long a question may keep whoever has the kernel waiting, also while no host is there to answer.
	modulePatience = 10 * time.Second
	maxModuleName  = 256
	maxModules     = 64 << 20 // bytes of one answer
)

// IsModprobe says whether these arguments are the kernel's for its modprobe (kernel/kmod.c), and for which module.
func IsModprobe(args []string) (module string, ok bool) {
	if len(args) != 4 || args[1] != "-q" || args[2] != "--" {
		return "", false
	}
	return args[3], true
}

// Modprobe asks the agent for a module, and returns once it is loaded.
func Modprobe(module string) error {
	c, err := net.DialTimeout("unix", modprobeSocket, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(modulePatience + time.Second))
	if _, err := io.WriteString(c, module+"\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(c, 1000))
	if err == nil && string(answer) != "ok" {
		err = errors.New(string(answer))
	}
	return err
}

// moduleQueue is the questions of this guest's kernel.
type moduleQueue struct {
	mu      sync.Mutex // guards what follows
	host    net.Conn   // nil: none is there
	changed chan struct{}
	last    uint64
	waiting map[uint64]*moduleAnswer
}

type moduleAnswer struct {
	modules [][]byte // whole ones
	part    []byte   // of the next
	size    int
	done    chan error
}

// modules takes a host that has modules.
func (a *Agent) modules(s net.Conn) {
	q := &a.moduleQueue
	if err := a.listenForModprobe(); err != nil {
		a.log("modules on demand: " + err.Error())
		return
	}
	q.mu.Lock()
	q.host = s
	q.waiting = map[uint64]*moduleAnswer{}
	if q.changed != nil {
		close(q.changed)
		q.changed = nil
	}
	q.mu.Unlock()
	var err error
	for err == nil {
		p := &agentv1.ModulePart{}
		if err = transport.ReadMsg(s, p); err == nil {
			q.take(p)
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.host != s {
		return // a newer session has come, and its questions with it
	}
	q.host = nil
	for _, w := range q.waiting {
		w.done <- errors.New("the host has gone")
	}
	q.waiting = nil
}

func (q *moduleQueue) take(p *agentv1.ModulePart) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := q.waiting[p.GetId()]
	if w == nil {
		return
	}
	if p.GetDone() {
		delete(q.waiting, p.GetId())
		var err error
		if p.GetError() != "" {
			err = errors.New(p.GetError())
		}
		w.done <- err
		return
	}
	if w.size += len(p.GetData()); w.size > maxModules {
		return
	}
	w.part = append(w.part, p.GetData()...)
	if p.GetLast() {
		w.modules, w.part = append(w.modules, w.part), nil
	}
}

// listenForModprobe makes this process the kernel's modprobe.
func (a *Agent) listenForModprobe() error {
	program := "/proc/1/exe" // the file itself is on no path of the image's root
	if os.Getpid() != 1 {
		program = besideProgram
		if err := showProgram(besideProgram); err != nil {
			return err
		}
	}
	if err := os.WriteFile(modprobePath, []byte(program), 0); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.modprobe != nil {
		return nil
	}
	mounts.ModuleDevices()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: modprobeSocket, Net: "unix"})
	if err != nil {
		return err
	}
	a.modprobe = l
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(modulePatience + time.Second))
				io.WriteString(c, a.load(c))
			}()
		}
	}()
	return nil
}

// besideProgram is this program's path once PID 1 is the image's init. Not by its process: that can be killed, and whoever gets its number
// would have the kernel run their program as root. In a file system of its own, as /dev may forbid execution; a copy, since a file that was
// removed, as the initramfs's is, cannot be bound to a name.
const besideProgram = "/dev/.atoll/agent"

// showProgram copies this program to a path whose directory is root's alone, unless it is there from an earlier life.
func showProgram(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=16m"); err != nil {
		return &os.PathError{Op: "mount", Path: dir, Err: err}
	}
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(path+".new", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o500)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close()); err != nil {
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	return os.Rename(path+".new", path)
}

// passModprobe has the kernel run another process's modprobe of this program, before this one becomes something else.
func (a *Agent) passModprobe() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.modprobe == nil {
		return nil
	}
	a.modprobe.Close()
	if err := showProgram(besideProgram); err != nil {
		return err
	}
	return os.WriteFile(modprobePath, []byte(besideProgram), 0)
}

// load answers one modprobe.
func (a *Agent) load(c *net.UnixConn) string {
	if !fromRoot(c) {
		return "only the kernel may ask"
	}
	name, err := bufio.NewReaderSize(io.LimitReader(c, maxModuleName), maxModuleName).ReadString('\n')
	if err != nil {
		return err.Error()
	}
	if err := a.moduleQueue.load(strings.TrimSuffix(name, "\n")); err != nil {
		return err.Error()
	}
	return "ok"
}

func fromRoot(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return err == nil && cred.Uid == 0
}

func (q *moduleQueue) load(name string) error {
	patience := time.After(modulePatience)
	w := &moduleAnswer{done: make(chan error, 1)}
	id, err := q.ask(name, w, patience)
	if err != nil {
		return err
	}
	select {
	case err = <-w.done:
	case <-patience:
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
		err = errors.New("the host does not answer")
	}
	if err != nil {
		return err
	}
	for _, m := range w.modules {
		if err := unix.InitModule(m, ""); err != nil && err != unix.EEXIST {
			return err
		}
	}
	return nil
}

// ask sends a question as soon as there is a host.
func (q *moduleQueue) ask(name string, w *moduleAnswer, patience <-chan time.Time) (id uint64, err error) {
	for {
		q.mu.Lock()
		if host := q.host; host != nil {
			q.last++
			id := q.last
			q.waiting[id] = w
			q.mu.Unlock()
			return id, transport.WriteMsg(host, &agentv1.ModuleWanted{Id: id, Name: name, Loaded: mounts.LoadedModules()})
		}
		if q.changed == nil {
			q.changed = make(chan struct{})
		}
		changed := q.changed
		q.mu.Unlock()
		select {
		case <-changed:
		case <-patience:
			return 0, errors.New("no host is there to ask")
		}
	}
}
