//go:build linux

package server

import (
	"context"
	"sync"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/ref"
	"github.com/opencontainers/go-digest"
)

type images struct{ Options }

func (s *images) Pull(ctx context.Context, req *connect.Request[atollv1.PullImageRequest], out *connect.ServerStream[atollv1.PullImageResponse]) error {
	p := &progress[atollv1.PullImageResponse]{send: out.Send, wrap: func(t *atollv1.Transfer) *atollv1.PullImageResponse {
		return &atollv1.PullImageResponse{Kind: &atollv1.PullImageResponse_Transfer{Transfer: t}}
	}}
	release := s.Images.Hold()
	defer release()
	img, err := s.Images.Pull(ctx, req.Msg.GetReference(), image.PullOptions{
		Platform: req.Msg.GetPlatform(),
		Progress: func(t image.Transfer) { p.report(t.ID, t.Status, t.Done, t.Total) },
	})
	if err != nil {
		return err
	}
	p.report(rootDisk, "converting", 0, 0)
	if _, err := s.Disks.Make(ctx, img.Digest, func(done int64) { p.report(rootDisk, "converting", done, 0) }); err != nil {
		return err
	}
	p.report(rootDisk, "done", 0, 0)
	return out.Send(&atollv1.PullImageResponse{Kind: &atollv1.PullImageResponse_Image{Image: s.imageTo(img)}})
}

const rootDisk = "root disk" // the ID of its making among the transfers

// progress sends transfers from any goroutine. What cannot be sent is dropped: the call itself learns that its client is gone.
type progress[T any] struct {
	wrap func(*atollv1.Transfer) *T

	mu   sync.Mutex // a stream takes one message at a time
	send func(*T) error
}

func (p *progress[T]) report(id, status string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.send(p.wrap(&atollv1.Transfer{Id: id, Status: status, DoneBytes: done, TotalBytes: total}))
}

func (s *images) List(ctx context.Context, _ *connect.Request[atollv1.ListImagesRequest]) (*connect.Response[atollv1.ListImagesResponse], error) {
	all, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	res := &atollv1.ListImagesResponse{}
	for _, i := range all {
		res.Images = append(res.Images, s.imageTo(i))
	}
	return connect.NewResponse(res), nil
}

func (s *images) Get(ctx context.Context, req *connect.Request[atollv1.GetImageRequest]) (*connect.Response[atollv1.GetImageResponse], error) {
	i, err := s.Images.Resolve(ctx, req.Msg.GetReference(), "")
	if err != nil {
		return nil, err
	}
	img := s.imageTo(i)
	if err := s.addUsers(img, i.Digest); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.GetImageResponse{Image: img}), nil
}

func (s *images) Tag(ctx context.Context, req *connect.Request[atollv1.TagImageRequest]) (*connect.Response[atollv1.TagImageResponse], error) {
	if err := s.Images.Tag(ctx, req.Msg.GetSource(), req.Msg.GetTarget()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.TagImageResponse{}), nil
}

func (s *images) Remove(ctx context.Context, req *connect.Request[atollv1.RemoveImageRequest]) (*connect.Response[atollv1.RemoveImageResponse], error) {
	removed, err := s.Images.Remove(ctx, req.Msg.GetReference(), req.Msg.GetForce())
	if err != nil {
		return nil, err
	}
	res := &atollv1.RemoveImageResponse{Untagged: removed.Untagged}
	for _, d := range removed.Deleted {
		res.Deleted = append(res.Deleted, d.String())
	}
	return connect.NewResponse(res), nil
}

func (s *images) imageTo(i image.Image) *atollv1.Image {
	out := &atollv1.Image{
		Digest: i.Digest.String(), References: familiar(i.References), CreatedAt: stamp(i.Created), SizeBytes: i.Size,
		Os: i.Platform.OS, Architecture: i.Platform.Architecture, Variant: i.Platform.Variant, ConfigJson: i.RawConfig,
	}
	for _, l := range i.Layers {
		out.Layers = append(out.Layers, &atollv1.Layer{Digest: l.Digest.String(), MediaType: l.MediaType, SizeBytes: l.Size})
	}
	if root, err := s.Disks.Get(i.Digest); err == nil {
		out.RootDisk, out.RootDiskBytes = root.Disks[0].Path, root.Size()
		for _, d := range root.Disks {
			disk := &atollv1.RootDisk{Path: d.Path, SizeBytes: d.Size, RootHash: d.Verity.RootHash, Salt: d.Verity.Salt}
			for _, l := range d.Layers {
				disk.Layers = append(disk.Layers, l.String())
			}
			out.RootDisks = append(out.RootDisks, disk)
		}
	}
	return out
}

// addUsers tells how many images use each root disk: what removing the image would free.
func (s *images) addUsers(out *atollv1.Image, img digest.Digest) error {
	root, err := s.Disks.Get(img)
	if err != nil {
		return nil // no root disk, no users
	}
	users, err := s.Disks.Users()
	if err != nil {
		return err
	}
	for i, d := range root.Disks {
		if i < len(out.RootDisks) {
			out.RootDisks[i].Images = uint32(users[d.Key])
		}
		if users[d.Key] == 1 {
			out.RootDiskOwnBytes += d.Size
		}
	}
	return nil
}

func familiar(references []string) []string {
	var names []string
	for _, name := range references {
		if r, err := ref.Parse(name); err == nil {
			name = r.Familiar()
		}
		names = append(names, name)
	}
	return names
}
