// Package guest is the agent: PID 1 of the guest from its initramfs on. It finds the channel to the host, takes the machine's
// configuration from there in one message, makes the root, runs the entrypoint and further processes, and brings the machine down.
// Where PID 1 is to be the image's own init, it hands that over and goes on in a process beside it.
// Imported by cmd/atoll-agent only. Run is called once, in PID 1; Beside, where it is, in the process that follows.
//
// Who locks: Agent.mu guards the agent's state and is never held while something is waited for; the ring and the supervisor have
// locks of their own, taken after it.
package guest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/container"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

const moduleDir = "/lib/modules/atoll"

// Agent is the state of the guest.
type Agent struct {
	version   string
	started   time.Duration // the guest's uptime when Run began
	processes *process.Supervisor
	output    *ring
	log       func(string) // a line on the console
	down      sync.Once
	execs     counter
	port      *port      // nil: the host comes by vsock
	init      *imageInit // not nil: PID 1 is the image's init and this process stands beside it

	moduleQueue moduleQueue

	mu         sync.Mutex // guards what follows
	configured bool
	waiting    bool                            // configured without an entrypoint: for Exec and Container
	containers map[string]*container.Container // by their ids, while they run
	root       *mounts.Root
	language   string // a locale, or empty
	entrypoint *entrypoint
	reason     agentv1.GoingDown_Reason // why the machine will go down, once that is known
	events     events
	modprobe   net.Listener // where the kernel's modprobe asks; nil until a host has modules
}

// Run is the agent's life. It returns only when the agent cannot reach the host.
func Run(version string) error {
	a := &Agent{version: version, started: uptime(), output: newRing(ringSize), log: console}
	if err := mounts.Early(); err != nil {
		return err
	}
	// Should the agent panic, so does the kernel; then the machine must end, not hang.
	os.WriteFile("/proc/sys/kernel/panic", []byte("-1"), 0)
	if err := mounts.LoadModules(moduleDir); err != nil {
		console(err.Error()) // the host may be reached all the same
	}
	syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1024, Max: 512 << 10})                    // as systemd gives its services
	syscall.Setrlimit(unix.RLIMIT_NPROC, &syscall.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}) // as Docker has it; the kernel's is by memory
	a.processes = process.NewSupervisor()
	go a.obey()

	vsock := make(chan error, 1)
	go func() { vsock <- transport.ServeVsock(a.accept) }()
	port, err := openPort()
	if err != nil {
		if verr := <-vsock; !errors.Is(verr, os.ErrNotExist) {
			err = errors.Join(err, verr)
		}
		return err
	}
	a.port = port
	return transport.Serve(port, a.accept)
}

// console writes a line where a person looks after the worst.
func console(line string) { fmt.Fprintln(os.Stderr, "atoll-agent: "+line) }

func uptime() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

// obey takes the signals by which the guest's own poweroff, halt and reboot commands speak to PID 1 (busybox, sysvinit).
func (a *Agent) obey() {
	unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) // ctrl-alt-del becomes SIGINT
	// Go's default for these is to exit, which as PID 1 is a kernel panic. Caught, not ignored: children would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGTRAP, syscall.SIGSYS, syscall.SIGXCPU,
		syscall.SIGXFSZ, syscall.SIGSTKFLT, syscall.SIGALRM, syscall.SIGVTALRM, syscall.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGUSR2)
	for s := range signals {
		reason := agentv1.GoingDown_REASON_REBOOT
		if s == syscall.SIGUSR1 || s == syscall.SIGUSR2 {
			reason = agentv1.GoingDown_REASON_POWEROFF
		}
		go a.goDown(reason)
	}
}

func (a *Agent) accept(s *transport.Session) {
	go func() {
		for {
			stream, err := s.Accept()
			if err != nil {
				return
			}
			go func() {
				defer stream.Close()
				a.serve(stream)
			}()
		}
	}()
}

// serve answers one stream. Its errors are the host's to see: a stream that ends early.
func (a *Agent) serve(s net.Conn) {
	req := &agentv1.Request{}
	if transport.ReadMsg(s, req) != nil {
		return
	}
	switch k := req.GetKind().(type) {
	case *agentv1.Request_Hello:
		transport.WriteMsg(s, a.hello())
	case *agentv1.Request_Configure:
		a.configure(s, k.Configure)
	case *agentv1.Request_Output:
		a.sendOutput(s, k.Output.GetAfter())
	case *agentv1.Request_Watch:
		a.watch(s)
	case *agentv1.Request_Exec:
		a.exec(s, k.Exec)
	case *agentv1.Request_Container:
		a.container(s, k.Container)
	case *agentv1.Request_Accept:
		a.acceptIn(s, k.Accept)
	case *agentv1.Request_Modules:
		a.modules(s)
	case *agentv1.Request_Stdin:
		a.stdin(s)
	case *agentv1.Request_StatFile:
		a.statFile(s, k.StatFile)
	case *agentv1.Request_GetFiles:
		a.getFiles(s, k.GetFiles)
	case *agentv1.Request_PutFiles:
		a.putFiles(s, k.PutFiles)
	case *agentv1.Request_Signal:
		transport.WriteMsg(s, &agentv1.SignalReply{Error: words(a.signal(k.Signal.GetName()))})
	case *agentv1.Request_SyncTime:
		transport.WriteMsg(s, syncTime(k.SyncTime))
	case *agentv1.Request_Shutdown:
		err := a.shutdown(k.Shutdown, func() { transport.WriteMsg(s, &agentv1.ShutdownReply{}) })
		if err != nil {
			transport.WriteMsg(s, &agentv1.ShutdownReply{Error: err.Error()})
		}
	}
}

func words(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func (a *Agent) hello() *agentv1.HelloReply {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	a.mu.Lock()
	defer a.mu.Unlock()
	return &agentv1.HelloReply{
		Protocol: transport.Protocol, AgentVersion: a.version, Configured: a.configured, State: a.events.last(),
		BootId: strings.TrimSpace(string(boot)), StartUptimeNanos: int64(a.started), UptimeNanos: int64(uptime()),
	}
}

// sendOutput sends what the entrypoint writes until the host goes.
func (a *Agent) sendOutput(s net.Conn, after uint64) {
	reader := a.output.attach(after)
	defer reader.detach()
	go func() {
		defer reader.detach() // wakes next
		for {
			ack := &agentv1.OutputAck{}
			if transport.ReadMsg(s, ack) != nil {
				return
			}
			a.output.forget(ack.GetSeq())
		}
	}()
	for {
		o := reader.next()
		if o == nil || transport.WriteMsg(s, o) != nil {
			return
		}
	}
}

// watch sends the events and takes their acknowledgements until the host goes.
func (a *Agent) watch(s net.Conn) {
	gone := make(chan struct{})
	a.events.watching(+1)
	defer a.events.watching(-1)
	go func() {
		defer close(gone)
		for {
			ack := &agentv1.EventAck{}
			if transport.ReadMsg(s, ack) != nil {
				return
			}
			a.events.ack(ack.GetSeq())
		}
	}()
	for seq := uint64(0); ; {
		pending, changed := a.events.after(seq)
		for _, e := range pending {
			if transport.WriteMsg(s, e) != nil {
				return
			}
			seq = e.GetSeq()
		}
		select {
		case <-changed:
		case <-gone:
			return
		}
	}
}
