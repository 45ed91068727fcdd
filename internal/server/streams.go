//go:build linux

package server

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"github.com/containerd/errdefs"
)

type (
	execStream   = connect.BidiStream[atollv1.ExecRequest, atollv1.ExecResponse]
	attachStream = connect.BidiStream[atollv1.AttachRequest, atollv1.AttachResponse]
)

func (s *machines) Exec(ctx context.Context, stream *execStream) error {
	req, err := stream.Receive()
	if err != nil {
		return err
	}
	st := req.GetStart()
	if st == nil || len(st.GetArgv()) == 0 {
		return fmt.Errorf("exec: the first message is not a start with a command: %w", errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x, err := s.Machines.Exec(ctx, st.GetMachine(), machine.Process{
		Argv: st.GetArgv(), Env: st.GetEnv(), WorkingDir: st.GetWorkingDir(), User: st.GetUser(), TTY: st.GetTty(), Stdin: st.GetStdin(),
		Rows: st.GetSize().GetRows(), Cols: st.GetSize().GetCols(), Detach: st.GetDetach(),
	})
	if err != nil {
		return notStarted(stream, err)
	}
	defer x.Close()
	if err := stream.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Started{Started: &atollv1.ExecStarted{Pid: x.PID()}}}); err != nil {
		return err
	}
	if st.GetDetach() {
		return nil
	}
	left := make(chan error, 1)
	go s.execInput(stream, x, left)
	err = execOutput(stream, x)
	select {
	case detached := <-left:
		return detached
	default:
		return err
	}
}

// notStarted tells a command that is not there, or cannot be executed, by its exit code; other faults are errors of the call.
func notStarted(stream *execStream, err error) error {
	code, ok := machine.ExitCode(err)
	if !ok {
		return err
	}
	return errors.Join(
		stream.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Failure{Failure: err.Error()}}),
		stream.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_ExitCode{ExitCode: int32(code)}}),
	)
}

// execInput carries the client's input until either end goes; execOutput sees the end. left is told when the client leaves the
// command to itself, or why it cannot.
func (s *machines) execInput(stream *execStream, x *host.Exec, left chan<- error) {
	for {
		req, err := stream.Receive()
		if err != nil {
			return
		}
		switch k := req.GetKind().(type) {
		case *atollv1.ExecRequest_Stdin:
			_, err = x.Write(k.Stdin)
		case *atollv1.ExecRequest_CloseStdin:
			err = x.CloseStdin()
		case *atollv1.ExecRequest_Resize:
			err = x.Resize(k.Resize.GetRows(), k.Resize.GetCols())
		case *atollv1.ExecRequest_Signal:
			err = x.Signal(int32(machine.SignalNumber(k.Signal)))
		case *atollv1.ExecRequest_Detach:
			left <- x.Detach()
			x.Close() // wakes execOutput
			return
		}
		if err != nil {
			s.Log.Debug("input to a command", "err", err)
		}
	}
}

func execOutput(stream *execStream, x *host.Exec) error {
	for {
		o, err := x.Recv()
		if err != nil {
			return err
		}
		res := &atollv1.ExecResponse{}
		switch k := o.GetKind().(type) {
		case *agentv1.ExecOutput_Stdout:
			res.Kind = &atollv1.ExecResponse_Stdout{Stdout: k.Stdout}
		case *agentv1.ExecOutput_Stderr:
			res.Kind = &atollv1.ExecResponse_Stderr{Stderr: k.Stderr}
		case *agentv1.ExecOutput_Exit:
			return stream.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_ExitCode{ExitCode: k.Exit.GetCode()}})
		}
		if err := stream.Send(res); err != nil {
			return err
		}
	}
}

func (s *machines) Attach(ctx context.Context, stream *attachStream) error {
	req, err := stream.Receive()
	if err != nil {
		return err
	}
	st := req.GetStart()
	if st == nil {
		return fmt.Errorf("attach: the first message is not a start: %w", errdefs.ErrInvalidArgument)
	}
	a, err := s.Machines.Attach(st.GetMachine())
	if err != nil {
		return err
	}
	defer a.Close()
	if err := stream.Send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Attached{Attached: true}}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go s.attachInput(ctx, stream, a, st.GetSize())
	m, err := a.Output(ctx, func(r outlog.Record) error {
		if r.Stream == outlog.Stderr {
			return stream.Send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Stderr{Stderr: r.Data}})
		}
		return stream.Send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Stdout{Stdout: r.Data}})
	})
	if err != nil {
		return err
	}
	return stream.Send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Exit{Exit: exitTo(m)}})
}

// attachInput carries the client's input to the entrypoint. The way there is opened at the first message that needs it, which
// waits for a machine that does not run yet.
func (s *machines) attachInput(ctx context.Context, stream *attachStream, a *machine.Attachment, size *atollv1.Size) {
	var in *host.Stdin
	open := func() error {
		if in != nil {
			return nil
		}
		var err error
		in, err = a.Stdin(ctx)
		return err
	}
	resize := func(size *atollv1.Size) error {
		if err := open(); err != nil {
			return err
		}
		return in.Resize(size.GetRows(), size.GetCols())
	}
	if size != nil {
		if err := resize(size); err != nil {
			s.Log.Debug("sizing a terminal", "err", err)
		}
	}
	for {
		req, err := stream.Receive()
		if err != nil {
			break
		}
		switch k := req.GetKind().(type) {
		case *atollv1.AttachRequest_Stdin:
			if err = open(); err == nil {
				_, err = in.Write(k.Stdin)
			}
		case *atollv1.AttachRequest_CloseStdin:
			if err = open(); err == nil {
				err = in.CloseStdin()
			}
		case *atollv1.AttachRequest_Resize:
			err = resize(k.Resize)
		case *atollv1.AttachRequest_Signal:
			err = a.Signal(ctx, k.Signal)
		}
		if err != nil {
			s.Log.Debug("input to the entrypoint", "err", err)
		}
	}
	if in != nil {
		in.Close()
	}
}
