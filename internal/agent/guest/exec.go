package guest

import (
	"errors"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

type counter struct{ atomic.Uint64 }

// hangUpGrace is how long a process whose host has gone may take to end by itself.
const hangUpGrace = time.Second

// exec runs a process beside the entrypoint. Nobody could read from or write to it once the host's stream is gone: then it gets
// SIGHUP, and SIGKILL a second later. A detached one runs on.
func (a *Agent) exec(s net.Conn, req *agentv1.Exec) {
	in := &input{stream: s}
	if !a.ready() {
		in.send(execError(errNotReady))
		return
	}
	sp := spec(req.GetProcess(), "exec-"+strconv.FormatUint(a.execs.Add(1), 10))
	sp.Stdin = sp.Stdin && !req.GetDetach()
	start := a.processes.Start
	if id := req.GetContainer(); id == "" {
		sp.Env = a.withLanguage(sp.Env)
	} else {
		start = func(sp process.Spec) (*process.Process, error) { return a.startInside(id, sp) }
	}
	p, err := start(sp)
	if err != nil {
		in.send(execError(err))
		return
	}
	if !req.GetDetach() {
		in.send(attend(in, p))
		p.Release()
		return
	}
	in.send(started(p))
	go func() {
		carry(p, func([]byte) {}, func([]byte) {})
		p.Release()
	}()
}

var errNotReady = errors.New("the machine has not been configured")

func started(p *process.Process) *agentv1.ExecOutput {
	return &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Started_{Started: &agentv1.ExecOutput_Started{Pid: uint32(p.PID)}}}
}

// attend carries between a process and its host until the process has ended, and returns the last message.
func attend(in *input, p *process.Process) *agentv1.ExecOutput {
	if in.send(started(p)) != nil {
		hangUp(p)
	}
	in.proc, in.queue = p, newStdinQueue(p)
	go func() {
		if !in.run() {
			hangUp(p)
		}
	}()
	stdout, stderr := transport.NewPiece(stdoutField, streamPiece), transport.NewPiece(stderrField, outputPiece)
	carryBy(p, stdout.Data(), stderr.Data(),
		func(b []byte) { in.sendPiece(stdout, len(b)) },
		func(b []byte) { in.sendPiece(stderr, len(b)) })
	if p.Stdin != nil {
		p.Stdin.Close()
	}
	return &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Exit{Exit: p.Exit()}}
}

const (
	// outputPiece is how much of an output is read at once.
	outputPiece = 32 << 10
	// streamPiece is that of a command's stdout. With the heads before it, it is what the port takes in two writes; the host takes
	// pieces of 64 KiB at most.
	streamPiece = 64<<10 - 64
)

// The fields of ExecOutput and ExecInput that hold bytes.
const (
	stdoutField = 2
	stderrField = 3
	stdinField  = 1
)

// carry copies both outputs and returns when the process has ended and all it wrote was given.
func carry(p *process.Process, stdout, stderr func([]byte)) {
	carryBy(p, make([]byte, outputPiece), make([]byte, outputPiece), stdout, stderr)
}

// carryBy is carry by way of these buffers.
func carryBy(p *process.Process, outBuf, errBuf []byte, stdout, stderr func([]byte)) {
	var copying sync.WaitGroup
	if p.Stderr != nil {
		copying.Go(func() { p.Copy(p.Stderr, errBuf, stderr) })
	}
	p.Copy(p.Stdout, outBuf, stdout)
	copying.Wait()
	<-p.Done()
}

func hangUp(p *process.Process) {
	select {
	case <-p.Done():
		return
	default:
	}
	p.Signal(unix.SIGHUP)
	select {
	case <-p.Done():
	case <-time.After(hangUpGrace):
		p.Kill()
	}
}

func execError(err error) *agentv1.ExecOutput {
	e := &agentv1.ExecError{Message: err.Error()}
	var pe *process.Error
	if errors.As(err, &pe) {
		e.Failure = pe.Class
	}
	return &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Error{Error: e}}
}
