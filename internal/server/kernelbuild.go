//go:build linux

package server

import (
	"context"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/kernel"
)

func (s *kernels) Build(ctx context.Context, req *connect.Request[atollv1.BuildKernelRequest], out *connect.ServerStream[atollv1.BuildKernelResponse]) error {
	m := req.Msg
	p := &progress[atollv1.BuildKernelResponse]{send: out.Send, wrap: func(t *atollv1.Transfer) *atollv1.BuildKernelResponse {
		return &atollv1.BuildKernelResponse{Kind: &atollv1.BuildKernelResponse_Transfer{Transfer: t}}
	}}
	k, err := s.Kernels.Build(ctx, kernel.BuildOptions{
		Name: m.GetName(), Version: m.GetVersion(), Source: m.GetSource(), SHA256: m.GetSha256(), Keyring: m.GetKeyring(), Mirror: m.GetMirror(),
		Config: m.GetConfig(), Arch: m.GetArchitecture(), Jobs: int(m.GetJobs()),
		Progress: func(t kernel.Transfer) { p.report(t.ID, t.Status, t.Done, t.Total) },
		Line: func(line string) {
			p.mu.Lock()
			defer p.mu.Unlock()
			_ = out.Send(&atollv1.BuildKernelResponse{Kind: &atollv1.BuildKernelResponse_Line{Line: line}}) // a client that is gone ends ctx
		},
	})
	if err != nil {
		return err
	}
	return out.Send(&atollv1.BuildKernelResponse{Kind: &atollv1.BuildKernelResponse_Kernel{Kernel: kernelTo(k)}})
}

func (s *kernels) Remove(ctx context.Context, req *connect.Request[atollv1.RemoveKernelRequest]) (*connect.Response[atollv1.RemoveKernelResponse], error) {
	if err := s.Kernels.Remove(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.RemoveKernelResponse{}), nil
}

func (s *kernels) SetDefault(ctx context.Context, req *connect.Request[atollv1.SetDefaultKernelRequest]) (*connect.Response[atollv1.SetDefaultKernelResponse], error) {
	if err := s.Kernels.SetDefault(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.SetDefaultKernelResponse{}), nil
}
