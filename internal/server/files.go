//go:build linux

package server

import (
	"context"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (s *machines) StatFile(ctx context.Context, req *connect.Request[atollv1.StatFileRequest]) (*connect.Response[atollv1.StatFileResponse], error) {
	st, err := s.Machines.StatFile(ctx, req.Msg.GetMachine(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.StatFileResponse{
		Name: st.GetName(), Mode: st.GetMode(), Size: st.GetSize(), ModifiedAt: timestamppb.New(time.Unix(0, st.GetModUnixNanos())), LinkTarget: st.GetLinkTarget(),
	}), nil
}

func (s *machines) GetFiles(ctx context.Context, req *connect.Request[atollv1.GetFilesRequest], out *connect.ServerStream[atollv1.GetFilesResponse]) error {
	return s.Machines.GetFiles(ctx, req.Msg.GetMachine(), req.Msg.GetPath(), req.Msg.GetFollow(), writerFunc(func(b []byte) (int, error) {
		if err := out.Send(&atollv1.GetFilesResponse{Data: b}); err != nil {
			return 0, err
		}
		return len(b), nil
	}))
}

func (s *machines) PutFiles(ctx context.Context, in *connect.ClientStream[atollv1.PutFilesRequest]) (*connect.Response[atollv1.PutFilesResponse], error) {
	if !in.Receive() {
		return nil, in.Err()
	}
	start := in.Msg().GetStart()
	if start == nil {
		return nil, fmt.Errorf("putting files: the first message is not start: %w", errdefs.ErrInvalidArgument)
	}
	err := s.Machines.PutFiles(ctx, start.GetMachine(), start.GetPath(), start.GetKeepOwners(), &received{next: func() ([]byte, error) {
		if !in.Receive() {
			if err := in.Err(); err != nil {
				return nil, err
			}
			return nil, io.EOF
		}
		return in.Msg().GetData(), nil
	}})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.PutFilesResponse{}), nil
}
