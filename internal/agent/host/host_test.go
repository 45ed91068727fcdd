package host

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/containerd/errdefs"
)

// guestWith is a client of a guest that takes each request and then does as it likes.
func guestWith(t *testing.T, do func(net.Conn, *agentv1.Request)) *Client {
	t.Helper()
	h, g := net.Pipe()
	server, err := transport.Server(g)
	if err != nil {
		t.Fatal(err)
	}
	session, err := transport.Client(h)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			s, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				defer s.Close()
				req := &agentv1.Request{}
				if transport.ReadMsg(s, req) == nil {
					do(s, req)
				}
			}()
		}
	}()
	c := New(session)
	t.Cleanup(func() {
		c.Close()
		server.Close()
	})
	return c
}

func exitWith(code int32) *agentv1.ExecOutput {
	return &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Exit{Exit: &agentv1.EntrypointExited{Code: code}}}
}

var started = &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Started_{Started: &agentv1.ExecOutput_Started{Pid: 5}}}

func TestHostileGuest(t *testing.T) {
	exec := func(c *Client) error {
		x, err := c.Exec(t.Context(), &agentv1.Exec{})
		if err != nil {
			return err
		}
		defer x.Close()
		_, err = x.Recv()
		return err
	}
	output := func(c *Client) error {
		return c.Output(t.Context(), 5, func(*agentv1.Output) error { return nil })
	}
	hello := func(c *Client) error {
		_, err := c.Hello(t.Context())
		return err
	}
	configure := func(c *Client) error {
		return c.Configure(t.Context(), &agentv1.Config{}, func(string) {})
	}
	for name, tc := range map[string]struct {
		do   func(s net.Conn, req *agentv1.Request)
		call func(*Client) error
		want error
	}{
		"no protocol":    {func(s net.Conn, _ *agentv1.Request) { transport.WriteMsg(s, &agentv1.HelloReply{}) }, hello, errdefs.ErrFailedPrecondition},
		"newer protocol": {func(s net.Conn, _ *agentv1.Request) { transport.WriteMsg(s, &agentv1.HelloReply{Protocol: 99}) }, hello, errdefs.ErrFailedPrecondition},
		"no answer":      {func(net.Conn, *agentv1.Request) {}, hello, errdefs.ErrUnavailable},
		"long frame":     {func(s net.Conn, _ *agentv1.Request) { s.Write([]byte{0xff, 0xff, 0xff, 0xff}) }, hello, errdefs.ErrUnavailable},
		"junk":           {func(s net.Conn, _ *agentv1.Request) { s.Write([]byte{0, 0, 0, 2, 0xff, 0xff}) }, hello, errdefs.ErrUnavailable},
		"long output": {func(s net.Conn, _ *agentv1.Request) {
			transport.WriteMsg(s, &agentv1.Output{Seq: 6, Data: make([]byte, 65<<10)})
		}, output, errdefs.ErrDataLoss},
		"old output":  {func(s net.Conn, _ *agentv1.Request) { transport.WriteMsg(s, &agentv1.Output{Seq: 5}) }, output, errdefs.ErrDataLoss},
		"not started": {func(s net.Conn, _ *agentv1.Request) { transport.WriteMsg(s, exitWith(1)) }, exec, errdefs.ErrDataLoss},
		"long stdout": {func(s net.Conn, _ *agentv1.Request) {
			transport.WriteMsg(s, started)
			transport.WriteMsg(s, &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Stdout{Stdout: make([]byte, 65<<10)}})
		}, exec, errdefs.ErrDataLoss},
		"started twice": {func(s net.Conn, _ *agentv1.Request) {
			transport.WriteMsg(s, started)
			transport.WriteMsg(s, started)
		}, exec, errdefs.ErrDataLoss},
		"progress for ever": {func(s net.Conn, _ *agentv1.Request) {
			for transport.WriteMsg(s, &agentv1.Progress{Step: "x"}) == nil {
			}
		}, configure, errdefs.ErrDataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			if err := tc.call(guestWith(t, tc.do)); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestFailuresAreClassedAndPrintable(t *testing.T) {
	c := guestWith(t, func(s net.Conn, _ *agentv1.Request) {
		transport.WriteMsg(s, &agentv1.Progress{Step: "clock"})
		transport.WriteMsg(s, &agentv1.Progress{Step: "entrypoint", Error: "\x1b[2Jno\n" + strings.Repeat("x", 5000), Failure: agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND})
	})
	var steps []string
	err := c.Configure(t.Context(), &agentv1.Config{}, func(step string) { steps = append(steps, step) })
	var f *Failure
	if !errors.As(err, &f) || !errdefs.IsNotFound(err) || f.Step != "entrypoint" || len(err.Error()) > 1100 || strings.ContainsAny(err.Error(), "\x1b\n") {
		t.Errorf("got %q", err)
	}
	if len(steps) != 1 || steps[0] != "clock" {
		t.Errorf("steps %q", steps)
	}
}

func TestStdinStopsWhenTheProcessDoesNotRead(t *testing.T) {
	got := make(chan int, 1)
	more := make(chan struct{})
	c := guestWith(t, func(s net.Conn, _ *agentv1.Request) {
		transport.WriteMsg(s, started)
		n := 0
		for n < stdinAhead {
			in := &agentv1.ExecInput{}
			if transport.ReadMsg(s, in) != nil {
				return
			}
			n += len(in.GetStdin())
		}
		got <- n
		<-more
		transport.WriteMsg(s, &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_StdinTaken{StdinTaken: uint64(n)}})
		for n < 2*stdinAhead {
			in := &agentv1.ExecInput{}
			if transport.ReadMsg(s, in) != nil {
				return
			}
			n += len(in.GetStdin())
		}
		transport.WriteMsg(s, exitWith(3))
	})
	x, err := c.Exec(t.Context(), &agentv1.Exec{})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	wrote := make(chan error, 1)
	go func() {
		_, err := x.Write(make([]byte, 2*stdinAhead))
		wrote <- err
	}()
	if n := <-got; n != stdinAhead {
		t.Fatalf("%d bytes ahead", n)
	}
	select {
	case err := <-wrote:
		t.Fatalf("wrote all: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(more)
	o, err := x.Recv()
	if err != nil || o.GetExit().GetCode() != 3 {
		t.Fatalf("got %v, %v", o, err)
	}
	if _, err := x.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("got %v after the exit", err)
	}
	<-wrote
	if _, err := x.Write([]byte("x")); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("writing after the end: %v", err)
	}
}

func TestContextEndsACall(t *testing.T) {
	c := guestWith(t, func(s net.Conn, _ *agentv1.Request) { io.Copy(io.Discard, s) })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Hello(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := c.Watch(ctx, func(*agentv1.Event) bool { return true }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	select {
	case <-c.Done():
		t.Error("the session ended with the call")
	default:
	}
}
