//go:build linux

package server

import (
	"context"
	"strings"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/kernel"
)

type kernels struct{ Options }

func (s *kernels) List(context.Context, *connect.Request[atollv1.ListKernelsRequest]) (*connect.Response[atollv1.ListKernelsResponse], error) {
	all, err := s.Kernels.List()
	if err != nil {
		return nil, err
	}
	res := &atollv1.ListKernelsResponse{}
	for _, k := range all {
		res.Kernels = append(res.Kernels, kernelTo(k))
	}
	return connect.NewResponse(res), nil
}

func (s *kernels) Get(_ context.Context, req *connect.Request[atollv1.GetKernelRequest]) (*connect.Response[atollv1.GetKernelResponse], error) {
	k, err := s.Kernels.Get(req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.GetKernelResponse{Kernel: kernelTo(k)}), nil
}

func (s *kernels) Pull(ctx context.Context, req *connect.Request[atollv1.PullKernelRequest], out *connect.ServerStream[atollv1.PullKernelResponse]) error {
	p := &progress[atollv1.PullKernelResponse]{send: out.Send, wrap: func(t *atollv1.Transfer) *atollv1.PullKernelResponse {
		return &atollv1.PullKernelResponse{Kind: &atollv1.PullKernelResponse_Transfer{Transfer: t}}
	}}
	show := func(t kernel.Transfer) { p.report(t.ID, t.Status, t.Done, t.Total) }
	var k kernel.Kernel
	var err error
	if name := req.Msg.GetName(); strings.Contains(name, "/") {
		k, err = s.Kernels.PullFrom(ctx, s.Images, name, req.Msg.GetAs(), show)
	} else {
		k, err = s.Kernels.Pull(ctx, kernel.PullOptions{Name: name, Mirror: req.Msg.GetMirror(), Arch: req.Msg.GetArchitecture(), Progress: show})
	}
	if err != nil {
		return err
	}
	return out.Send(&atollv1.PullKernelResponse{Kind: &atollv1.PullKernelResponse_Kernel{Kernel: kernelTo(k)}})
}

func (s *kernels) Push(ctx context.Context, req *connect.Request[atollv1.PushKernelRequest], out *connect.ServerStream[atollv1.PushKernelResponse]) error {
	p := &progress[atollv1.PushKernelResponse]{send: out.Send, wrap: func(t *atollv1.Transfer) *atollv1.PushKernelResponse {
		return &atollv1.PushKernelResponse{Kind: &atollv1.PushKernelResponse_Transfer{Transfer: t}}
	}}
	d, err := s.Kernels.Push(ctx, s.Images, req.Msg.GetName(), req.Msg.GetReference(), func(t kernel.Transfer) { p.report(t.ID, t.Status, t.Done, t.Total) })
	if err != nil {
		return err
	}
	return out.Send(&atollv1.PushKernelResponse{Kind: &atollv1.PushKernelResponse_Pushed{Pushed: &atollv1.PushedKernel{Digest: d.String()}}})
}

func (s *kernels) Import(ctx context.Context, req *connect.Request[atollv1.ImportKernelRequest]) (*connect.Response[atollv1.ImportKernelResponse], error) {
	k, err := s.Kernels.Import(ctx, req.Msg.GetPath(), req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.ImportKernelResponse{Kernel: kernelTo(k)}), nil
}

func kernelTo(k kernel.Kernel) *atollv1.Kernel {
	return &atollv1.Kernel{
		Name: k.Name, Version: k.Version, Digest: k.Digest.String(), Architecture: k.Arch, Source: k.Source, Args: k.Args, SizeBytes: k.Size,
		Default: k.Default, CreatedAt: stamp(k.Created), Path: k.Path, Modules: k.Modules, ConfigDigest: k.ConfigDigest.String(),
	}
}
