//go:build linux

package server

import (
	"cmp"
	"context"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/base"
	"github.com/atollvm/atoll/internal/ref"
)

type bases struct{ Options }

func (s *bases) List(ctx context.Context, _ *connect.Request[atollv1.ListBasesRequest]) (*connect.Response[atollv1.ListBasesResponse], error) {
	res := &atollv1.ListBasesResponse{}
	for _, b := range base.List() {
		res.Bases = append(res.Bases, s.baseTo(ctx, b))
	}
	return connect.NewResponse(res), nil
}

func (s *bases) baseTo(ctx context.Context, b base.Base) *atollv1.Base {
	out := &atollv1.Base{Name: b.Name, Description: b.Description, Aliases: b.Aliases}
	if i, err := s.Images.Resolve(ctx, b.Name, ""); err == nil {
		out.Digest, out.BuiltAt, out.SizeBytes = i.Digest.String(), stamp(i.Created), i.Size
	}
	return out
}

func (s *bases) Build(ctx context.Context, req *connect.Request[atollv1.BuildBaseRequest], out *connect.ServerStream[atollv1.BuildBaseResponse]) error {
	name := req.Msg.GetName()
	b, err := base.Find(name)
	if err != nil {
		return err
	}
	r, err := ref.Parse(cmp.Or(req.Msg.GetTag(), b.Name))
	if err != nil {
		return err
	}
	o := base.Options{Mirror: req.Msg.GetMirror(), Keyring: req.Msg.GetKeyring(), Packages: req.Msg.GetPackages(), Snapshot: req.Msg.GetSnapshot()}
	release := s.Images.Hold()
	defer release()
	manifest, err := s.Bases.Build(ctx, name, o, func(line string) {
		_ = out.Send(&atollv1.BuildBaseResponse{Kind: &atollv1.BuildBaseResponse_Line{Line: line}}) // a client that is gone ends ctx
	})
	if err != nil {
		return err
	}
	if _, err := s.Images.Put(ctx, r.String(), manifest); err != nil {
		return err
	}
	if _, err := s.Disks.Make(ctx, manifest.Digest, nil); err != nil {
		return err
	}
	built := s.baseTo(ctx, b)
	built.Digest = manifest.Digest.String() // which may have another name than the base
	return out.Send(&atollv1.BuildBaseResponse{Kind: &atollv1.BuildBaseResponse_Base{Base: built}})
}
