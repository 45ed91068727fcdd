package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/api/atoll/v1/atollv1connect"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/rpcerr"
)

func TestNewChecksHost(t *testing.T) {
	for host, class := range map[string]error{
		"unix:///run/atoll.sock": nil,
		"unix://atoll.sock":      errdefs.ErrInvalidArgument,
		"https://host:1":         errdefs.ErrNotImplemented,
		"/run/atoll.sock":        errdefs.ErrInvalidArgument,
		"":                       errdefs.ErrInvalidArgument,
	} {
		if _, err := New(host); !errors.Is(err, class) {
			t.Errorf("New(%q) = %v, want %v", host, err, class)
		}
	}
}

var errHinted = hint.With(fmt.Errorf("machine %q: %w", "web", errdefs.ErrNotFound), "look elsewhere")

type server struct {
	atollv1connect.UnimplementedMachineServiceHandler
}

func (server) Get(context.Context, *connect.Request[atollv1.GetMachineRequest]) (*connect.Response[atollv1.GetMachineResponse], error) {
	return nil, rpcerr.ToConnect(errHinted)
}

func (server) Logs(_ context.Context, _ *connect.Request[atollv1.LogsRequest], s *connect.ServerStream[atollv1.LogsResponse]) error {
	s.Send(&atollv1.LogsResponse{Data: []byte("x")})
	return rpcerr.ToConnect(errHinted)
}

// Exec echoes stdin, one message for one, and fails at the input "fail".
func (server) Exec(_ context.Context, s *connect.BidiStream[atollv1.ExecRequest, atollv1.ExecResponse]) error {
	for {
		r, err := s.Receive()
		if err != nil {
			return nil
		}
		if string(r.GetStdin()) == "fail" {
			return rpcerr.ToConnect(errHinted)
		}
		s.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Stdout{Stdout: r.GetStdin()}})
	}
}

// Errors keep text, class and hint in calls of each kind, and both directions of a stream work at once.
func TestCalls(t *testing.T) {
	dir, err := os.MkdirTemp("", "atoll-client")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	c, err := New("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Ping(t.Context()); !errdefs.IsUnavailable(err) || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("without a daemon Ping = %v", err)
	}

	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(atollv1connect.NewMachineServiceHandler(server{}))
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: mux, Protocols: &p}
	go s.Serve(l)
	defer s.Close()

	check := func(what string, err error) {
		t.Helper()
		if !errdefs.IsNotFound(err) || err.Error() != errHinted.Error() || hint.Of(err) != "look elsewhere" {
			t.Errorf("%s: %v (hint %q), want %v", what, err, hint.Of(err), errHinted)
		}
	}
	_, err = c.Machines.Get(t.Context(), connect.NewRequest(&atollv1.GetMachineRequest{}))
	check("unary", err)

	logs, err := c.Machines.Logs(t.Context(), connect.NewRequest(&atollv1.LogsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if !logs.Receive() || string(logs.Msg().GetData()) != "x" || logs.Receive() {
		t.Error("want one message, then the error")
	}
	check("stream", logs.Err())

	say := func(text string) *atollv1.ExecRequest {
		return &atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Stdin{Stdin: []byte(text)}}
	}
	exec := c.Machines.Exec(t.Context())
	for _, text := range []string{"one", "two"} {
		if err := exec.Send(say(text)); err != nil {
			t.Fatal(err)
		}
		if r, err := exec.Receive(); err != nil || string(r.GetStdout()) != text {
			t.Fatalf("%v, %v", r, err)
		}
	}
	exec.Send(say("fail"))
	_, err = exec.Receive()
	check("both ways", err)

	exec = c.Machines.Exec(t.Context())
	exec.CloseRequest()
	if _, err := exec.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end of a stream: %v, want io.EOF", err)
	}
}
