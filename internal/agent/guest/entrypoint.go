package guest

import (
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"golang.org/x/sys/unix"
)

// entrypoint is the machine's main process.
type entrypoint struct {
	*process.Process
	stopSignal unix.Signal
	stdin      *stdinQueue
}

func spec(p *agentv1.Process, cgroup string) process.Spec {
	return process.Spec{
		Argv: p.GetArgv(), Env: p.GetEnv(), Dir: p.GetWorkingDir(), User: p.GetUser(), TTY: p.GetTty(), Stdin: p.GetStdin(),
		Rows: size(p.GetRows()), Cols: size(p.GetCols()), Limits: limits(p), Cgroup: process.CgroupRoot + "/" + cgroup,
	}
}

func limits(p *agentv1.Process) (all []process.Limit) {
	for _, l := range p.GetRlimits() {
		all = append(all, process.Limit{Name: l.GetName(), Soft: l.GetSoft(), Hard: l.GetHard()})
	}
	return all
}

func size(n uint32) uint16 { return uint16(min(n, 1<<16-1)) }

func (a *Agent) startEntrypoint(p *agentv1.Process) error {
	if p == nil {
		a.mu.Lock()
		a.waiting = true
		a.mu.Unlock()
		return nil
	}
	stop, err := parseSignal(p.GetStopSignal(), unix.SIGTERM)
	if err != nil {
		return err
	}
	s := spec(p, "entrypoint")
	s.MakeDir = true // as Docker does with WORKDIR
	s.LeaveMemory = true
	s.OnTerminal = mounts.Console
	proc, err := a.processes.Start(s)
	if err != nil {
		return err
	}
	e := &entrypoint{Process: proc, stopSignal: stop, stdin: newStdinQueue(proc)}
	a.mu.Lock()
	a.entrypoint = e
	a.mu.Unlock()
	a.events.add(&agentv1.Event{Kind: &agentv1.Event_Started{Started: &agentv1.EntrypointStarted{Pid: uint32(proc.PID)}}})
	go a.superviseEntrypoint(e)
	return nil
}

// superviseEntrypoint sees the entrypoint to its end, and the machine after it.
func (a *Agent) superviseEntrypoint(e *entrypoint) {
	var copying sync.WaitGroup
	copying.Go(func() {
		e.Copy(e.Stdout, make([]byte, outputPiece), func(p []byte) { a.output.add(agentv1.Stream_STREAM_STDOUT, p) })
	})
	if e.Stderr != nil {
		copying.Go(func() {
			e.Copy(e.Stderr, make([]byte, outputPiece), func(p []byte) { a.output.add(agentv1.Stream_STREAM_STDERR, p) })
		})
	}
	<-e.Done()
	exit := e.Exit()
	copying.Wait()
	a.output.end()
	a.mu.Lock()
	reason := a.reason
	a.mu.Unlock()
	switch reason {
	case agentv1.GoingDown_REASON_POWEROFF, agentv1.GoingDown_REASON_REBOOT:
		return // the entrypoint ended because the guest goes down, not the other way round
	case agentv1.GoingDown_REASON_UNSPECIFIED:
		reason = agentv1.GoingDown_REASON_EXITED
	}
	seq := a.events.add(&agentv1.Event{Kind: &agentv1.Event_Exited{Exited: exit}})
	a.events.waitAck(seq, 0)
	a.goDown(reason)
}

// signal sends a signal to the entrypoint.
func (a *Agent) signal(name string) error {
	sig, err := parseSignal(name, 0)
	if err != nil {
		return err
	}
	e := a.main()
	if e == nil {
		return errors.New("the entrypoint has not been started")
	}
	return e.Signal(sig)
}

func (a *Agent) main() *entrypoint {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.entrypoint
}

// stdin joins the host to the entrypoint's stdin and terminal.
func (a *Agent) stdin(s net.Conn) {
	if e := a.main(); e != nil {
		input := &input{stream: s, proc: e.Process, queue: e.stdin}
		input.run()
	}
}

// shutdown ends the entrypoint, politely first, and with it the machine. answer tells the host that this has begun.
func (a *Agent) shutdown(req *agentv1.Shutdown, answer func()) error {
	if a.init != nil {
		err := a.init.askDown(a, req.GetSignal())
		if err == nil {
			answer()
		}
		return err // the host ends a machine that does not go down
	}
	e := a.main()
	sig := unix.SIGTERM
	if e != nil {
		sig = e.stopSignal
	}
	sig, err := parseSignal(req.GetSignal(), sig)
	if err != nil {
		return err
	}
	a.mu.Lock()
	if a.reason == agentv1.GoingDown_REASON_UNSPECIFIED {
		a.reason = agentv1.GoingDown_REASON_SHUTDOWN
	}
	a.mu.Unlock()
	answer()
	if e == nil {
		go a.goDown(agentv1.GoingDown_REASON_SHUTDOWN)
		return nil
	}
	e.Signal(sig)
	go func() {
		select {
		case <-e.Done():
		case <-time.After(time.Duration(req.GetGraceNanos())):
			e.Kill()
		}
	}()
	return nil
}

// parseSignal takes SIGTERM, TERM or a number.
func parseSignal(name string, byDefault unix.Signal) (unix.Signal, error) {
	if name == "" && byDefault != 0 {
		return byDefault, nil
	}
	upper := strings.ToUpper(name)
	if n, err := strconv.Atoi(upper); err == nil && n > 0 && n <= 64 {
		return unix.Signal(n), nil
	}
	if !strings.HasPrefix(upper, "SIG") {
		upper = "SIG" + upper
	}
	if sig := unix.SignalNum(upper); sig != 0 {
		return sig, nil
	}
	// Real-time signals have no names in the table; STOPSIGNAL SIGRTMIN+3 is systemd's.
	if rest, ok := strings.CutPrefix(upper, "SIGRTMIN"); ok {
		if n, err := strconv.Atoi("0" + strings.TrimPrefix(rest, "+")); err == nil && n <= 30 {
			return unix.Signal(34 + n), nil
		}
	}
	return 0, &process.Error{Class: agentv1.FailureClass_FAILURE_CLASS_INVALID, Message: "unknown signal " + strconv.Quote(name)}
}
