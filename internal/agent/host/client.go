// Package host is the daemon's side of the agent protocol: one client per session with a guest's agent.
// What comes from the guest is hostile: every length is checked, and a guest that breaks the protocol loses its session, no more.
// It dials nothing; transport makes the session. A Client may be used from several goroutines.
package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/containerd/errdefs"
)

// maxChunk bounds one piece of output or input, in bytes.
const maxChunk = 64 << 10

// Client speaks to one agent.
type Client struct {
	session  *transport.Session
	protocol atomic.Uint32 // what the agent speaks
}

// New takes the session over; Close ends it. The agent is taken to speak this build's protocol until Hello has asked.
func New(s *transport.Session) *Client {
	c := &Client{session: s}
	c.protocol.Store(transport.Protocol)
	return c
}

// Done is closed when the session has ended.
func (c *Client) Done() <-chan struct{} { return c.session.Done() }

// Close ends the session and all that goes on in it.
func (c *Client) Close() error { return c.session.Close() }

// Failure is why the agent could not configure the guest or start a process.
type Failure struct {
	Step    string // of the configuration; empty for Exec
	Class   agentv1.FailureClass
	Message string
	// ExitCode is that of a command of the configuration that failed.
	ExitCode *int
}

func (f *Failure) Error() string {
	if f.Step == "" {
		return f.Message
	}
	return f.Step + ": " + f.Message
}

// Unwrap gives the class of the error.
func (f *Failure) Unwrap() error {
	switch f.Class {
	case agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND:
		return errdefs.ErrNotFound
	case agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE, agentv1.FailureClass_FAILURE_CLASS_INVALID:
		return errdefs.ErrInvalidArgument
	}
	return errdefs.ErrUnknown
}

// Hello asks the agent for its version and state. errdefs.ErrFailedPrecondition: its version is not one that can be worked with. What an
// older agent that can be does not know is refused from then on, with the same class.
func (c *Client) Hello(ctx context.Context) (*agentv1.HelloReply, error) {
	reply := &agentv1.HelloReply{}
	err := c.ask(ctx, &agentv1.Request{Kind: &agentv1.Request_Hello{Hello: &agentv1.Hello{Protocol: transport.Protocol}}}, reply)
	if err == nil {
		err = checkProtocol(reply.GetProtocol())
	}
	if err != nil {
		return nil, fmt.Errorf("greeting the guest's agent: %w", err)
	}
	c.protocol.Store(reply.GetProtocol())
	reply.AgentVersion, reply.BootId = printable(reply.AgentVersion), printable(reply.BootId)
	return reply, nil
}

// Content is what a streamed piece of a configuration holds.
type Content struct {
	Size int64
	Open func() (io.ReadCloser, error)
}

// Configuring is what a guest tells while it is being configured. Its functions are called one at a time.
type Configuring struct {
	Step   func(name string) // each step as it begins
	Output func([]byte)      // what commands and the package manager write in that step; it may hold anything
}

// Configure hands the guest its whole configuration and starts the entrypoint; progress gets each step as it begins.
// The error is a *Failure where the guest says what went wrong.
func (c *Client) Configure(ctx context.Context, config *agentv1.Config, progress func(step string)) error {
	return c.ConfigureWith(ctx, config, nil, Configuring{Step: progress, Output: func([]byte) {}})
}

// ConfigureWith is Configure with the contents of the streamed pieces, and with what the guest's commands write.
func (c *Client) ConfigureWith(ctx context.Context, config *agentv1.Config, contents []Content, tell Configuring) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_Configure{Configure: config}})
	if err != nil {
		return fmt.Errorf("configuring the guest: %w", err)
	}
	defer s.Close()
	if len(contents) > 0 {
		var sending sync.WaitGroup
		defer sending.Wait()
		defer cancel(nil) // what a guest that failed does not take is not sent
		sending.Go(func() {
			if err := s.sendContents(contents); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
				cancel(fmt.Errorf("configuring the guest: sending files: %w", err)) // not the guest's fault: the host's disk
			}
		})
	}
	const maxSteps = 1000
	step := ""
	for steps := 0; steps < maxSteps; {
		p := &agentv1.Progress{}
		if err := s.recv(p); err != nil {
			return fmt.Errorf("configuring the guest: after step %q: %w", step, err)
		}
		if len(p.GetOutput()) > maxChunk {
			return fmt.Errorf("configuring the guest: output of %d bytes: %w", len(p.GetOutput()), c.violation())
		}
		name := printable(p.GetStep())
		switch {
		case p.GetError() != "":
			f := &Failure{Step: cmp.Or(name, step), Class: p.GetFailure(), Message: printable(p.GetError())}
			if p.ExitCode != nil {
				code := int(p.GetExitCode()) & 0xff
				f.ExitCode = &code
			}
			return f
		case p.GetDone():
			return nil
		case len(p.GetOutput()) > 0:
			tell.Output(p.GetOutput())
			continue
		}
		step = name
		steps++
		tell.Step(step)
	}
	return fmt.Errorf("configuring the guest: more than %d steps: %w", maxSteps, c.violation())
}

// sendContents sends the contents one after the other, each with its end marked.
func (s *stream) sendContents(contents []Content) error {
	for _, c := range contents {
		if err := s.sendContent(c); err != nil {
			return err
		}
	}
	return nil
}

func (s *stream) sendContent(c Content) error {
	r, err := c.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	buf := make([]byte, maxChunk)
	for left := c.Size; ; {
		n, err := io.ReadFull(r, buf[:min(left, maxChunk)])
		if err != nil && left > 0 {
			return fmt.Errorf("content of %d bytes ends %d bytes early: %w", c.Size, left-int64(n), err)
		}
		left -= int64(n)
		if err := s.send(&agentv1.Content{Data: buf[:n], End: left == 0}); err != nil {
			return err
		}
		if left == 0 {
			return nil
		}
	}
}

// Output hands over the entrypoint's output after the given sequence number, and acknowledges each piece that do took, so that
// the guest may forget it. It returns when do fails, ctx ends or the session does.
func (c *Client) Output(ctx context.Context, after uint64, do func(*agentv1.Output) error) error {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_Output{Output: &agentv1.OutputRequest{After: after}}})
	if err != nil {
		return fmt.Errorf("reading the entrypoint's output: %w", err)
	}
	defer s.Close()
	for {
		o := &agentv1.Output{}
		if err := s.recv(o); err != nil {
			return fmt.Errorf("reading the entrypoint's output: %w", err)
		}
		if len(o.GetData()) > maxChunk || o.GetSeq() <= after {
			return fmt.Errorf("reading the entrypoint's output: record %d of %d bytes after %d: %w", o.GetSeq(), len(o.GetData()), after, c.violation())
		}
		after = o.GetSeq()
		if err := do(o); err != nil {
			return err
		}
		if err := s.send(&agentv1.OutputAck{Seq: after}); err != nil {
			return fmt.Errorf("reading the entrypoint's output: %w", err)
		}
	}
}

// Watch hands over the guest's events, from the first since it was configured, and acknowledges each that do returns true for.
// Once EntrypointExited is acknowledged the guest goes down. It returns when ctx or the session ends.
func (c *Client) Watch(ctx context.Context, do func(*agentv1.Event) (ack bool)) error {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_Watch{Watch: &agentv1.WatchRequest{}}})
	if err != nil {
		return fmt.Errorf("watching the guest: %w", err)
	}
	defer s.Close()
	for {
		e := &agentv1.Event{}
		if err := s.recv(e); err != nil {
			return fmt.Errorf("watching the guest: %w", err)
		}
		if !do(e) {
			continue
		}
		if err := s.send(&agentv1.EventAck{Seq: e.GetSeq()}); err != nil {
			return fmt.Errorf("watching the guest: %w", err)
		}
	}
}

// Signal sends a signal, by name or number, to the entrypoint.
func (c *Client) Signal(ctx context.Context, name string) error {
	reply := &agentv1.SignalReply{}
	err := c.ask(ctx, &agentv1.Request{Kind: &agentv1.Request_Signal{Signal: &agentv1.Signal{Name: name}}}, reply)
	if err == nil && reply.GetError() != "" {
		err = fmt.Errorf("%s: %w", printable(reply.GetError()), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("sending signal %s: %w", name, err)
	}
	return nil
}

// Shutdown asks the guest to stop: signal (by default its stop signal) to the entrypoint, SIGKILL after the grace period, then
// power off. It returns when the guest has taken the order; Watch and the VMM tell the rest.
func (c *Client) Shutdown(ctx context.Context, signal string, grace time.Duration) error {
	reply := &agentv1.ShutdownReply{}
	req := &agentv1.Shutdown{Signal: signal, GraceNanos: int64(grace)}
	err := c.ask(ctx, &agentv1.Request{Kind: &agentv1.Request_Shutdown{Shutdown: req}}, reply)
	if err == nil && reply.GetError() != "" {
		err = fmt.Errorf("%s: %w", printable(reply.GetError()), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("shutting the guest down: %w", err)
	}
	return nil
}

// SyncTime brings the guest's clock to the host's and returns how far it was ahead. What is less than the time that an answer takes, or
// than precise, is left alone.
func (c *Client) SyncTime(ctx context.Context, precise time.Duration) (ahead time.Duration, err error) {
	const tries = 3
	ask := func(req *agentv1.SyncTime) (*agentv1.SyncTimeReply, error) {
		reply := &agentv1.SyncTimeReply{}
		err := c.ask(ctx, &agentv1.Request{Kind: &agentv1.Request_SyncTime{SyncTime: req}}, reply)
		if err == nil && reply.GetError() != "" {
			err = errors.New(printable(reply.GetError()))
		}
		if err != nil {
			err = fmt.Errorf("setting the guest's clock: %w", err)
		}
		return reply, err
	}
	doubt := time.Duration(math.MaxInt64)
	for range tries {
		sent := time.Now()
		reply, err := ask(&agentv1.SyncTime{UnixNanos: sent.UnixNano()})
		if err != nil {
			return 0, err
		}
		// It was read somewhere between the two: in the middle, give or take as much.
		half := time.Since(sent) / 2
		if half < doubt {
			doubt, ahead = half, time.Duration(reply.GetOffsetNanos())-half
		}
		if doubt < precise {
			break
		}
	}
	if ahead.Abs() <= max(doubt, precise) {
		return ahead, nil
	}
	_, err = ask(&agentv1.SyncTime{UnixNanos: time.Now().UnixNano(), CorrectNanos: int64(-ahead)})
	return ahead, err
}

// violation ends the session of a guest that breaks the protocol.
func (c *Client) violation() error {
	c.session.Close()
	return fmt.Errorf("the guest's agent breaks the protocol: %w", errdefs.ErrDataLoss)
}

func (c *Client) ask(ctx context.Context, req *agentv1.Request, reply message) error {
	s, err := c.open(ctx, req)
	if err != nil {
		return err
	}
	defer s.Close()
	return s.recv(reply)
}

// open starts a stream that ends with ctx.
func (c *Client) open(ctx context.Context, req *agentv1.Request) (*stream, error) {
	if err := c.understood(req); err != nil {
		return nil, err
	}
	conn, err := c.session.Open(ctx)
	if err != nil {
		return nil, lost(ctx, err)
	}
	s := &stream{ctx: ctx, conn: conn, client: c}
	s.stop = context.AfterFunc(ctx, s.hangUp)
	if err := s.send(req); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// lost says that the channel is gone, or why the caller gave up.
func lost(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the stream ended")
	}
	return fmt.Errorf("the guest's agent does not answer: %w: %w", err, errdefs.ErrUnavailable)
}

// printable makes words of a guest safe and short enough for logs and terminals.
func printable(s string) string {
	const most = 1000
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) { // with U+0080 to U+009F, which a terminal obeys as well
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
