//go:build linux

package server

import (
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/machine"
)

type consoleStream = connect.BidiStream[atollv1.ConsoleRequest, atollv1.ConsoleResponse]

// Console ends well when the machine's run does.
func (s *machines) Console(ctx context.Context, stream *consoleStream) error {
	req, err := stream.Receive()
	if err != nil {
		return err
	}
	st := req.GetStart()
	if st == nil {
		return fmt.Errorf("console: the first message is not a start: %w", errdefs.ErrInvalidArgument)
	}
	c, err := s.Machines.Console(ctx, st.GetMachine())
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := stream.Send(&atollv1.ConsoleResponse{}); err != nil { // joined
		return err
	}
	go func() { cancel(consoleInput(stream, c)) }()
	for {
		data, err := c.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return causeOf(ctx, err)
		}
		if err := stream.Send(&atollv1.ConsoleResponse{Output: data}); err != nil {
			return err
		}
	}
}

// causeOf prefers why a context was ended to that it was.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// consoleInput returns when the client is gone, or may not type. A client that has no more to type is still there: it closes its side with
// the stream only.
func consoleInput(stream *consoleStream, c *machine.ConsoleSession) error {
	for {
		req, err := stream.Receive()
		if err != nil {
			return err
		}
		if in := req.GetInput(); len(in) > 0 {
			if _, err := c.Write(in); err != nil {
				return err
			}
		}
	}
}
