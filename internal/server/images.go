//go:build linux

package server

import (
	"context"
	"sync"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/ref"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/containerd/platforms"
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
		Platform: req.Msg.GetPlatform(), Referrers: withTypes(req.Msg.GetReferrers(), req.Msg.GetWithDisk(), req.Msg.GetWithKernel()),
		Progress: func(t image.Transfer) { p.report(t.ID, t.Status, t.Done, t.Total) },
	})
	if err != nil {
		return err
	}
	if req.Msg.GetWithKernel() {
		if err := s.Kernels.Adopt(ctx, s.Images, img.Digest, req.Msg.GetReference()); err != nil {
			return err
		}
	}
	if req.Msg.GetWithDisk() {
		if err := s.Disks.Adopt(ctx, img.Digest); err != nil {
			return err
		}
	}
	if err := s.makeDisk(ctx, img, p.report); err != nil {
		return err
	}
	return out.Send(&atollv1.PullImageResponse{Kind: &atollv1.PullImageResponse_Image{Image: s.imageTo(img, nil)}})
}

// withTypes adds the types of our own artifacts that are wanted.
func withTypes(types []string, disk, kernels bool) []string {
	if disk {
		types = append(types, RootDiskArtifact)
	}
	if kernels {
		types = append(types, kernel.ArtifactType)
	}
	return types
}

// attach makes the artifacts that are to travel with an image.
func (s *images) attach(ctx context.Context, req *atollv1.PushImageRequest, report func(id, status string, done, total int64)) error {
	if !req.GetWithDisk() && req.GetWithKernel() == "" {
		return nil
	}
	img, err := s.Images.Resolve(ctx, req.GetReference(), req.GetPlatform())
	if err != nil {
		return err
	}
	if req.GetWithKernel() != "" {
		if err := s.Kernels.Attach(ctx, s.Images, req.GetWithKernel(), img.Digest); err != nil {
			return err
		}
	}
	if req.GetWithDisk() {
		report(rootDisk, "packing", 0, 0)
		if err := s.Disks.Attach(ctx, img.Digest); err != nil {
			return err
		}
		report(rootDisk, "done", 0, 0)
	}
	return nil
}

// makeDisk makes an image's root disk, so that the first run finds it.
func (s *images) makeDisk(ctx context.Context, img image.Image, report func(id, status string, done, total int64)) error {
	report(rootDisk, "converting", 0, 0)
	if _, err := s.Disks.Make(ctx, img.Digest, func(done int64) { report(rootDisk, "converting", done, 0) }); err != nil {
		return err
	}
	report(rootDisk, "done", 0, 0)
	return nil
}

func (s *images) Push(ctx context.Context, req *connect.Request[atollv1.PushImageRequest], out *connect.ServerStream[atollv1.PushImageResponse]) error {
	p := &progress[atollv1.PushImageResponse]{send: out.Send, wrap: func(t *atollv1.Transfer) *atollv1.PushImageResponse {
		return &atollv1.PushImageResponse{Kind: &atollv1.PushImageResponse_Transfer{Transfer: t}}
	}}
	release := s.Images.Hold()
	defer release()
	if err := s.attach(ctx, req.Msg, p.report); err != nil {
		return err
	}
	pushed, err := s.Images.Push(ctx, req.Msg.GetReference(), image.PushOptions{
		Platform: req.Msg.GetPlatform(), Referrers: withTypes(req.Msg.GetReferrers(), req.Msg.GetWithDisk(), req.Msg.GetWithKernel() != ""),
		Progress: func(t image.Transfer) { p.report(t.ID, t.Status, t.Done, t.Total) },
	})
	if err != nil {
		return err
	}
	return out.Send(&atollv1.PushImageResponse{Kind: &atollv1.PushImageResponse_Pushed{
		Pushed: &atollv1.PushedImage{Digest: pushed.Digest.String(), MissingPlatforms: pushed.Partial},
	}})
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

func (s *images) List(ctx context.Context, req *connect.Request[atollv1.ListImagesRequest]) (*connect.Response[atollv1.ListImagesResponse], error) {
	filters := req.Msg.GetFilters()
	all, err := s.Images.Filtered(ctx, filters)
	if err != nil {
		return nil, err
	}
	res := &atollv1.ListImagesResponse{}
	for _, i := range all {
		if i.References, err = image.References(i.References, filters); err != nil {
			return nil, err
		}
		res.Images = append(res.Images, s.imageTo(i, nil))
	}
	return connect.NewResponse(res), nil
}

func (s *images) Get(ctx context.Context, req *connect.Request[atollv1.GetImageRequest]) (*connect.Response[atollv1.GetImageResponse], error) {
	i, err := s.Images.Resolve(ctx, req.Msg.GetReference(), "")
	if err != nil {
		return nil, err
	}
	users, err := s.Disks.Users()
	if err != nil {
		return nil, err
	}
	out := s.imageTo(i, users)
	source, variants := s.Images.Variants(ctx, req.Msg.GetReference(), i)
	if source != i.Digest {
		out.IndexDigest = source.String()
		for _, v := range variants {
			out.Variants = append(out.Variants, &atollv1.ImageVariant{Digest: v.Digest.String(), Platform: platforms.Format(v.Platform), Here: v.Here})
		}
	}
	for _, subject := range []digest.Digest{i.Digest, source} {
		found, err := s.Images.Referrers(ctx, subject, "")
		if err != nil {
			return nil, err
		}
		for _, r := range found {
			out.Referrers = append(out.Referrers, &atollv1.ImageReferrer{Digest: r.Digest.String(), ArtifactType: r.ArtifactType, SizeBytes: r.Size})
		}
		if source == i.Digest {
			break
		}
	}
	return connect.NewResponse(&atollv1.GetImageResponse{Image: out}), nil
}

func (s *images) History(ctx context.Context, req *connect.Request[atollv1.ImageHistoryRequest]) (*connect.Response[atollv1.ImageHistoryResponse], error) {
	img, steps, err := s.Images.History(ctx, req.Msg.GetReference())
	if err != nil {
		return nil, err
	}
	res := &atollv1.ImageHistoryResponse{}
	for _, st := range steps {
		step := &atollv1.ImageStep{
			Id: st.ID.String(), Layer: st.Layer.String(), CreatedAt: stamp(st.Created), CreatedBy: st.CreatedBy, Comment: st.Comment, SizeBytes: st.Size,
		}
		if st.ID != "" {
			step.References = familiar(img.References)
		}
		res.Steps = append(res.Steps, step)
	}
	return connect.NewResponse(res), nil
}

func (s *images) Prune(ctx context.Context, req *connect.Request[atollv1.PruneImagesRequest]) (*connect.Response[atollv1.PruneImagesResponse], error) {
	disks, err := s.diskUse(ctx) // beforehand: root disks go with their last image
	if err != nil {
		return nil, err
	}
	pruned, err := s.Images.Prune(ctx, image.PruneOptions{All: req.Msg.GetAll(), Filters: req.Msg.GetFilters(), DryRun: req.Msg.GetDryRun()})
	if err != nil {
		return nil, err
	}
	res := &atollv1.PruneImagesResponse{Untagged: familiar(pruned.Untagged), ReclaimedBytes: pruned.Bytes, Later: pruned.Later}
	for _, d := range pruned.Images {
		res.Deleted = append(res.Deleted, d.String())
	}
	if !pruned.Later {
		res.ReclaimedBytes += disks.without(pruned.Images)
	}
	return connect.NewResponse(res), nil
}

func (s *images) Login(ctx context.Context, req *connect.Request[atollv1.LoginRequest]) (*connect.Response[atollv1.LoginResponse], error) {
	if err := s.Images.Login(ctx, req.Msg.GetRegistry(), req.Msg.GetUsername(), req.Msg.GetPassword()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.LoginResponse{}), nil
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
	res := &atollv1.RemoveImageResponse{Untagged: familiar(removed.Untagged)}
	for _, d := range removed.Deleted {
		res.Deleted = append(res.Deleted, d.String())
	}
	return connect.NewResponse(res), nil
}

// imageTo is an image on the wire. diskUsers, by the disks' keys, is for who asks what removing the image would free; else nil.
func (s *images) imageTo(i image.Image, diskUsers map[string]int) *atollv1.Image {
	out := &atollv1.Image{
		Digest: i.Digest.String(), References: familiar(i.References), CreatedAt: stamp(i.Created), SizeBytes: i.Size,
		RepoDigests: familiar(s.Images.RepoDigests(i)), Os: i.Platform.OS, Architecture: i.Platform.Architecture, Variant: i.Platform.Variant, ConfigJson: i.RawConfig,
	}
	for _, l := range i.Layers {
		out.Layers = append(out.Layers, &atollv1.Layer{Digest: l.Digest.String(), MediaType: l.MediaType, SizeBytes: l.Size})
	}
	if root, err := s.Disks.Get(i.Digest); err == nil {
		out.RootDisk, out.RootDiskBytes = root.Disks[0].Path, root.Size()
		for _, d := range root.Disks {
			disk := &atollv1.RootDisk{
				Path: d.Path, SizeBytes: d.Size, RootHash: d.Verity.RootHash, Salt: d.Verity.Salt, Images: uint32(diskUsers[d.Key]),
			}
			if diskUsers[d.Key] == 1 {
				out.RootDiskOwnBytes += d.Size
			}
			for _, l := range d.Layers {
				disk.Layers = append(disk.Layers, l.String())
			}
			out.RootDisks = append(out.RootDisks, disk)
		}
	}
	return out
}

// diskUse is what the root disks of all images take, and whose they are.
type diskUse struct {
	roots map[digest.Digest]rootdisk.Root
	users map[string]int
}

func (s *images) diskUse(ctx context.Context) (diskUse, error) {
	use := diskUse{roots: map[digest.Digest]rootdisk.Root{}}
	all, err := s.Images.List(ctx)
	if err != nil {
		return use, err
	}
	for _, i := range all {
		if root, err := s.Disks.Get(i.Digest); err == nil { // else it has none
			use.roots[i.Digest] = root
		}
	}
	use.users, err = s.Disks.Users()
	return use, err
}

// without is the bytes of the disks that no image uses when these are gone.
func (u diskUse) without(gone []digest.Digest) int64 {
	var freed int64
	for _, img := range gone {
		for _, d := range u.roots[img].Disks {
			if u.users[d.Key]--; u.users[d.Key] == 0 {
				freed += d.Size
			}
		}
	}
	return freed
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
