package guest

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/guest/timekeeping"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

// BesideName is the agent's name as a process beside the image's init. systemd's last broadcast before it switches the machine off
// spares processes of root whose name begins so (https://systemd.io/ROOT_STORAGE_DAEMONS), and the host is answered to the end.
const BesideName = "@atoll-agent"

// The files that the agent beside init finds open, after the usual three.
const (
	fdHandOver = 3 + iota // a Config, then the end of the file: PID 1 is the image's init
	fdMaster              // of the terminal that init has as its console
	fdSlave               // kept open, so that reading the master waits while nobody else has the console open
	fdPort                // the channel to the host; absent when that is vsock
)

// successor is the image's init, ready to take PID 1 over.
type successor struct {
	path   string
	argv   []string
	env    []string
	limits []process.Limit
	slave  int
	hand   *os.File // closed by the exec, which tells the agent beside that it is over
}

// prepareInit finds the image's init, gives it a console, and starts the agent's next process, which waits for the hand-over.
func (a *Agent) prepareInit(c *agentv1.Config) (*successor, error) {
	p := c.GetProcess()
	if _, err := parseSignal(p.GetStopSignal(), unix.SIGTERM); err != nil {
		return nil, err
	}
	path, env, err := process.LookUp(p.GetArgv(), p.GetEnv(), "/")
	if err != nil {
		return nil, err
	}
	master, slave, err := process.OpenTerminal(size(p.GetRows()), size(p.GetCols()))
	if err != nil {
		return nil, err
	}
	if err := mounts.Console(slave); err != nil {
		return nil, err
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	files := []uintptr{null.Fd(), 1, 2, fdHandOver: theirs.Fd(), fdMaster: uintptr(master), fdSlave: uintptr(slave)}
	if a.port != nil {
		conn, err := a.port.SyscallConn() // not Fd, which would make reads block
		if err != nil {
			return nil, err
		}
		if err := conn.Control(func(fd uintptr) { files = append(files, fd) }); err != nil {
			return nil, err
		}
	}
	attr := &syscall.ProcAttr{Dir: "/", Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	// A group of its own: systemd moves what it finds in the root group into its own scope. Groups that it did not make it lets be.
	group := process.CgroupRoot + "/agent"
	if err := os.Mkdir(group, 0o755); err == nil {
		if fd, err := unix.Open(group, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			defer unix.Close(fd)
			attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
		}
	}
	if _, err := syscall.ForkExec("/proc/self/exe", []string{BesideName}, attr); err != nil {
		return nil, err
	}
	if err := a.passModprobe(); err != nil {
		return nil, err
	}
	theirs.Close()
	null.Close()
	if err := transport.WriteMsg(ours, &agentv1.Config{Process: p, Hostname: c.GetHostname(), NtpServers: c.GetNtpServers(), Provision: &agentv1.Provision{Locale: c.GetProvision().GetLocale()}}); err != nil {
		return nil, err
	}
	return &successor{path: path, argv: p.GetArgv(), env: env, limits: limits(p), slave: slave, hand: ours}, nil
}

// become makes this process, PID 1, the image's init. last is the last thing to do as the agent: the host's next hello, which may
// follow at once, is for the agent beside. It returns only when the exec fails.
func (s *successor) become(p *port, last func()) error {
	if p != nil {
		p.leave()
	}
	last()
	if p != nil {
		p.mute()
	}
	if err := process.SetLimits(0, s.limits); err != nil {
		return err
	}
	for fd := range 3 {
		if err := unix.Dup3(s.slave, fd, 0); err != nil {
			return err
		}
	}
	return &os.PathError{Op: "exec", Path: s.path, Err: syscall.Exec(s.path, s.argv, s.env)}
}

// Beside is the agent's life in a process beside the image's init, with the arguments that it was started with. It returns only when it cannot
// reach the host.
func Beside(version string, args []string) error {
	hand := os.NewFile(fdHandOver, "hand-over")
	c := &agentv1.Config{}
	if err := transport.ReadMsg(hand, c); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, hand); err != nil {
		return err
	}
	hand.Close()
	life := 0
	if len(args) > 1 {
		life, _ = strconv.Atoi(args[1])
	}
	if life == 0 {
		return keep(c)
	}
	return beside(version, c, life)
}

// beside serves the host, for the first time or again after this process's predecessor was killed.
func beside(version string, c *agentv1.Config, life int) error {
	a := &Agent{version: version, started: uptime(), output: newRing(ringSize), log: console}
	a.output.seq = uint64(life-1) << 32 // above what a predecessor has sent
	ignoreEnd()
	closeOnExec(life == 1)
	a.processes = process.NewSupervisor()
	a.processes.Unprotected()
	init := a.processes.Adopt(1, os.NewFile(fdMaster, "console"))
	a.entrypoint = &entrypoint{Process: init, stdin: newStdinQueue(init)}
	a.init = &imageInit{stopSignal: c.GetProcess().GetStopSignal()}
	a.configured = true
	a.setLanguage(c)
	a.events.add(&agentv1.Event{Kind: &agentv1.Event_Started{Started: &agentv1.EntrypointStarted{Pid: 1}}})
	go a.copyConsole(init.Stdout)
	if servers := c.GetNtpServers(); len(servers) > 0 {
		go timekeeping.Follow(context.Background(), servers, a.log)
	}

	vsock := make(chan error, 1)
	go func() { vsock <- transport.ServeVsock(a.accept) }()
	var st unix.Stat_t
	if err := unix.Fstat(fdPort, &st); err == nil && life == 1 {
		p, err := newPort(fdPort, portName)
		if err != nil {
			return err
		}
		return transport.Serve(p, a.accept)
	}
	p, err := openPort() // the keeper has closed its own, so that the host sees this process die
	if err != nil {
		return errors.Join(err, <-vsock)
	}
	return transport.Serve(p, a.accept)
}

// copyConsole takes what is written to the console, for ever. A getty hangs the terminal up, with everybody who has it open: then the
// master says EIO until it is opened again.
func (a *Agent) copyConsole(master *os.File) {
	slave := fdSlave
	buf := make([]byte, 32<<10)
	for {
		n, err := master.Read(buf)
		if n > 0 {
			a.output.add(agentv1.Stream_STREAM_STDOUT, buf[:n])
		}
		if err == nil {
			continue
		}
		unix.Close(slave)
		slave, err = process.OpenSlave(master)
		if err != nil {
			a.log("reading the console: " + err.Error())
			return
		}
	}
}

// imageInit is the image's init as PID 1, seen from the agent beside it.
type imageInit struct{ stopSignal string }

// askDown asks init to switch the machine off, in its own language.
func (i *imageInit) askDown(a *Agent, name string) error {
	if name == "" {
		name = i.stopSignal
	}
	exe, _ := os.Readlink("/proc/1/exe")
	ask := func(signal string) error {
		sig, err := parseSignal(signal, 0)
		if err != nil {
			return err
		}
		return unix.Kill(1, sig)
	}
	halt := strings.EqualFold(strings.TrimPrefix(name, "SIG"), "RTMIN+3")
	switch base := filepath.Base(exe); {
	case base == "systemd" && (name == "" || halt): // containers' images say RTMIN+3, halt, which leaves a machine on
		return ask("SIGRTMIN+4")
	case name != "":
		return ask(name)
	case base == "busybox":
		return ask("SIGUSR2")
	}
	// sysvinit, runit, …: they have no signal in common, but the command. OpenRC's own has another, and Debian has both beside each other.
	command := []string{"poweroff"}
	if filepath.Base(exe) == "openrc-init" {
		command = []string{"openrc-shutdown", "--poweroff", "now"}
	}
	spareFromSendsigs()
	p, err := a.processes.Start(process.Spec{Argv: command, Dir: "/", Cgroup: process.CgroupRoot + "/poweroff"})
	if err != nil {
		return err
	}
	go carry(p, func([]byte) {}, func([]byte) {})
	return nil
}
