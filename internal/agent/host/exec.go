package host

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/containerd/errdefs"
)

// stdinAhead is how much stdin may be on its way to a process that does not read, see ExecOutput.stdin_taken.
const stdinAhead = 256 << 10

type message = transport.Message

// stream is one stream of a session, closed when the context it was opened with ends.
type stream struct {
	ctx    context.Context
	conn   net.Conn
	client *Client
	stop   func() bool
}

func (s *stream) recv(m message) error {
	if err := transport.ReadStranger(s.conn, m); err != nil {
		return lost(s.ctx, err)
	}
	return nil
}

func (s *stream) send(m message) error {
	if err := transport.WriteMsg(s.conn, m); err != nil {
		return lost(s.ctx, err)
	}
	return nil
}

// hangUp also wakes a reader: yamux would have it wait for the guest's end of the stream.
func (s *stream) hangUp() {
	s.conn.SetReadDeadline(time.Unix(1, 0))
	s.conn.Close()
}

func (s *stream) Close() error {
	s.stop()
	s.hangUp()
	return nil
}

// input is the host's half of a stream to a process.
type input struct {
	*stream
	sending sync.Mutex // one message at a time; taken after mu

	mu    sync.Mutex // guards what follows
	moved *sync.Cond
	sent  uint64
	taken uint64
	err   error
}

func newInput(s *stream) *input {
	i := &input{stream: s}
	i.moved = sync.NewCond(&i.mu)
	return i
}

// Write sends stdin. It waits while the process does not read.
func (i *input) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		n := min(len(p), maxChunk)
		i.mu.Lock()
		for i.err == nil && i.sent-i.taken+uint64(n) > stdinAhead {
			i.moved.Wait()
		}
		err := i.err
		i.sent += uint64(n)
		i.mu.Unlock()
		if err == nil {
			err = i.put(&agentv1.ExecInput{Kind: &agentv1.ExecInput_Stdin{Stdin: p[:n]}})
		}
		if err != nil {
			return total, err
		}
		total += n
		p = p[n:]
	}
	return total, nil
}

// CloseStdin ends the process's stdin; on a terminal it is an end-of-file character.
func (i *input) CloseStdin() error {
	return i.put(&agentv1.ExecInput{Kind: &agentv1.ExecInput_CloseStdin{CloseStdin: true}})
}

// Resize sets the size of the process's terminal.
func (i *input) Resize(rows, cols uint32) error {
	return i.put(&agentv1.ExecInput{Kind: &agentv1.ExecInput_Resize{Resize: &agentv1.Resize{Rows: rows, Cols: cols}}})
}

// Signal sends a signal to the process, by its Linux number.
func (i *input) Signal(number int32) error {
	return i.put(&agentv1.ExecInput{Kind: &agentv1.ExecInput_Signal{Signal: number}})
}

// Detach lets the process run on when the stream ends.
func (i *input) Detach() error {
	if err := i.client.since2("detaching from a running process"); err != nil {
		return err // it would leave the order unread, and hang the process up
	}
	return i.put(&agentv1.ExecInput{Kind: &agentv1.ExecInput_Detach{Detach: true}})
}

func (i *input) put(m *agentv1.ExecInput) error {
	i.sending.Lock()
	defer i.sending.Unlock()
	return i.send(m)
}

// get reads the next message that is not about stdin.
func (i *input) get() (*agentv1.ExecOutput, error) {
	for {
		o := &agentv1.ExecOutput{}
		if err := i.recv(o); err != nil {
			i.finish(err)
			return nil, err
		}
		if len(o.GetStdout()) > maxChunk || len(o.GetStderr()) > maxChunk {
			err := i.client.violation()
			i.finish(err)
			return nil, err
		}
		taken, ok := o.GetKind().(*agentv1.ExecOutput_StdinTaken)
		if !ok {
			return o, nil
		}
		i.mu.Lock()
		if taken.StdinTaken <= i.sent {
			i.taken = taken.StdinTaken
		}
		i.moved.Broadcast()
		i.mu.Unlock()
	}
}

func (i *input) finish(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err == nil {
		i.err = err
	}
	i.moved.Broadcast()
}

// Close ends the stream and wakes whoever writes.
func (i *input) Close() error {
	i.finish(io.ErrClosedPipe)
	return i.stream.Close()
}

// Exec is a process beside the entrypoint, or in a container. Closing it while the process runs kills the process, unless it was detached,
// from the start or later.
// Write, CloseStdin, Resize and Signal may be called while another goroutine is in Recv; Write needs that one to go on.
type Exec struct {
	*input
	pid  uint32
	over bool
}

// Exec starts a process and waits for its start; a *Failure says why there was none. The stream ends with ctx.
func (c *Client) Exec(ctx context.Context, req *agentv1.Exec) (*Exec, error) {
	return c.start(ctx, &agentv1.Request{Kind: &agentv1.Request_Exec{Exec: req}})
}

// Container starts a process in a container of its own, as Exec. Its exit comes when the guest holds nothing of the container's root
// and mounts any more.
func (c *Client) Container(ctx context.Context, req *agentv1.Container) (*Exec, error) {
	return c.start(ctx, &agentv1.Request{Kind: &agentv1.Request_Container{Container: req}})
}

// Accept waits for a process to connect to a socket of a container, and returns the connection, which ends with ctx. The error says that
// no more will come.
func (c *Client) Accept(ctx context.Context, container string, mount int) (io.ReadWriteCloser, error) {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_Accept{Accept: &agentv1.Accept{Container: container, Mount: uint32(mount)}}})
	if err != nil {
		return nil, err
	}
	reply := &agentv1.AcceptReply{}
	err = s.recv(reply)
	if err == nil && reply.GetError() != "" {
		err = fmt.Errorf("%s: %w", printable(reply.GetError()), errdefs.ErrUnavailable)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("waiting for a connection to a socket of the guest: %w", err)
	}
	return &accepted{s.conn, s}, nil
}

// accepted is a connection from the guest.
type accepted struct {
	net.Conn
	stream *stream
}

func (a *accepted) Close() error { return a.stream.Close() }

// CloseWrite tells the guest that nothing more will come; what it sends can still be read.
func (a *accepted) CloseWrite() error { return a.Conn.Close() }

func (c *Client) start(ctx context.Context, req *agentv1.Request) (*Exec, error) {
	s, err := c.open(ctx, req)
	if err != nil {
		return nil, err
	}
	x := &Exec{input: newInput(s)}
	o, err := x.get()
	if err != nil {
		x.Close()
		return nil, err
	}
	switch k := o.GetKind().(type) {
	case *agentv1.ExecOutput_Started_:
		x.pid = k.Started.GetPid()
		return x, nil
	case *agentv1.ExecOutput_Error:
		x.Close()
		return nil, &Failure{Class: k.Error.GetFailure(), Message: printable(k.Error.GetMessage())}
	}
	x.Close()
	return nil, fmt.Errorf("starting a process: %w", c.violation())
}

// PID is the process's number in the guest.
func (x *Exec) PID() uint32 { return x.pid }

// Recv returns the next stdout, stderr or exit; exit is the last, after it comes io.EOF.
func (x *Exec) Recv() (*agentv1.ExecOutput, error) {
	if x.over {
		return nil, io.EOF
	}
	o, err := x.get()
	if err != nil {
		return nil, err
	}
	switch o.GetKind().(type) {
	case *agentv1.ExecOutput_Stdout, *agentv1.ExecOutput_Stderr:
	case *agentv1.ExecOutput_Exit:
		if code := o.GetExit().GetCode(); code < 0 || code > 255 { // 256 would be success once it is this host's exit code
			return nil, fmt.Errorf("reading from a process: exit code %d: %w", code, x.client.violation())
		}
		x.over = true
		x.finish(fmt.Errorf("the process has ended: %w", errdefs.ErrFailedPrecondition))
	default:
		return nil, fmt.Errorf("reading from a process: %w", x.client.violation())
	}
	return o, nil
}

// Stdin is the entrypoint's input. Closing it leaves the entrypoint's stdin open; CloseStdin ends that.
type Stdin struct{ *input }

// Stdin opens the entrypoint's input. It ends with ctx.
func (c *Client) Stdin(ctx context.Context) (*Stdin, error) {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_Stdin{Stdin: &agentv1.Stdin{}}})
	if err != nil {
		return nil, fmt.Errorf("opening the entrypoint's stdin: %w", err)
	}
	i := newInput(s)
	go func() {
		for {
			if _, err := i.get(); err != nil {
				return
			}
		}
	}()
	return &Stdin{i}, nil
}
