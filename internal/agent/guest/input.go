package guest

import (
	"net"
	"sync"
	"sync/atomic"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

// stdinAhead is how much stdin the host may send beyond what the process took, see ExecOutput.stdin_taken.
const stdinAhead = 256 << 10

// stdinQueue writes to a process's stdin without holding up who gives it, so that a signal passes input that nobody reads.
type stdinQueue struct {
	proc *process.Process

	mu     sync.Mutex // guards what follows
	queue  []stdinItem
	moving bool // a goroutine writes
}

type stdinItem struct {
	data  []byte
	close bool
	taken func()
}

func newStdinQueue(p *process.Process) *stdinQueue { return &stdinQueue{proc: p} }

func (q *stdinQueue) put(i stdinItem) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.queue = append(q.queue, i)
	if !q.moving {
		q.moving = true
		go q.move()
	}
}

func (q *stdinQueue) move() {
	for {
		q.mu.Lock()
		if len(q.queue) == 0 {
			q.moving = false
			q.mu.Unlock()
			return
		}
		i := q.queue[0]
		q.queue = q.queue[1:]
		q.mu.Unlock()
		if i.close {
			q.proc.CloseStdin()
			continue
		}
		if q.proc.Stdin != nil {
			q.proc.Stdin.Write(i.data) // a process that reads no more lets the rest fall on the floor, as a shell's pipe does
		}
		i.taken()
	}
}

// input is the host's messages to one process.
type input struct {
	stream  net.Conn
	proc    *process.Process
	queue   *stdinQueue
	sending sync.Mutex  // one message at a time on stream
	alone   atomic.Bool // nobody is there to be sent anything

	mu    sync.Mutex // guards what follows
	sent  uint64
	taken uint64
}

// run takes messages until the host goes, breaks the protocol, or lets the process run on by itself.
func (i *input) run() (detached bool) {
	for {
		m := &agentv1.ExecInput{}
		if transport.ReadMsg(i.stream, m) != nil {
			return false
		}
		switch k := m.GetKind().(type) {
		case *agentv1.ExecInput_Stdin:
			if !i.admit(len(k.Stdin)) {
				return false
			}
			i.queue.put(stdinItem{data: k.Stdin, taken: func() { i.took(len(k.Stdin)) }})
		case *agentv1.ExecInput_CloseStdin:
			i.queue.put(stdinItem{close: true})
		case *agentv1.ExecInput_Resize:
			i.proc.Resize(size(k.Resize.GetRows()), size(k.Resize.GetCols()))
		case *agentv1.ExecInput_Signal:
			if k.Signal == int32(unix.SIGKILL) { // what it has started goes with it, as nobody could end that afterwards
				i.proc.Kill()
			} else if k.Signal > 0 && k.Signal <= 64 {
				i.proc.Signal(unix.Signal(k.Signal))
			}
		case *agentv1.ExecInput_Detach:
			i.alone.Store(true)
			i.stream.Close()
			return true
		}
	}
}

func (i *input) admit(n int) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.sent += uint64(n)
	return i.sent-i.taken <= stdinAhead
}

func (i *input) took(n int) {
	i.mu.Lock()
	i.taken += uint64(n)
	taken := i.taken
	i.mu.Unlock()
	i.send(&agentv1.ExecOutput{Kind: &agentv1.ExecOutput_StdinTaken{StdinTaken: taken}})
}

func (i *input) send(o *agentv1.ExecOutput) error {
	if i.alone.Load() {
		return nil
	}
	i.sending.Lock()
	defer i.sending.Unlock()
	return transport.WriteMsg(i.stream, o)
}
