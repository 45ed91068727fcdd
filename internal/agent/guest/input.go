package guest

import (
	"bytes"
	"net"
	"sync"
	"sync/atomic"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/nonblock"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// stdinAhead is how much stdin the host may send beyond what the process took, see ExecOutput.stdin_taken.
const stdinAhead = 256 << 10

// tellTaken is how much the process takes before the host is told. What the host sends at once must fit into the rest of stdinAhead.
const tellTaken = 64 << 10

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
			q.write(i.data) // a process that reads no more lets the rest fall on the floor, as a shell's pipe does
		}
		i.taken()
	}
}

func (q *stdinQueue) write(p []byte) {
	if f, err := nonblock.New(q.proc.Stdin); err == nil {
		f.Write(p)
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
	told  uint64   // of taken
	free  [][]byte // memory for messages
}

// run takes messages until the host goes, breaks the protocol, or lets the process run on by itself.
func (i *input) run() (detached bool) {
	for {
		body, err := transport.ReadBody(i.stream, i.memory())
		if err != nil {
			return false
		}
		if data, ok := transport.OnlyBytes(body, stdinField); ok {
			if !i.admit(len(data)) {
				return false
			}
			if len(data) < keptFrom {
				data = bytes.Clone(data)
				i.recycle(body)
				body = nil
			}
			i.queue.put(stdinItem{data: data, taken: func() { i.took(len(data)); i.recycle(body) }})
			continue
		}
		m := &agentv1.ExecInput{}
		if proto.Unmarshal(body, m) != nil {
			return false
		}
		i.recycle(body)
		switch k := m.GetKind().(type) {
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

// keptFrom is from what size on stdin waits in the memory that its message was read into. So a queue of small pieces takes little.
const keptFrom = 16 << 10

// memory returns some for a message, or none.
func (i *input) memory() []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := len(i.free)
	if n == 0 {
		return nil
	}
	buf := i.free[n-1]
	i.free = i.free[:n-1]
	return buf
}

func (i *input) recycle(buf []byte) {
	if cap(buf) < keptFrom {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.free = append(i.free, buf)
}

func (i *input) took(n int) {
	i.mu.Lock()
	i.taken += uint64(n)
	taken := i.taken
	tell := taken-i.told >= tellTaken
	if tell {
		i.told = taken
	}
	i.mu.Unlock()
	if !tell {
		return
	}
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

func (i *input) sendPiece(p *transport.Piece, n int) error {
	if i.alone.Load() {
		return nil
	}
	i.sending.Lock()
	defer i.sending.Unlock()
	return p.Write(i.stream, n)
}
