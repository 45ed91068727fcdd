//go:build linux

package server

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/ref"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"
)

type builds struct{ Options }

func (s *builds) Build(ctx context.Context, req *connect.Request[atollv1.BuildRequest], out *connect.ServerStream[atollv1.BuildResponse]) error {
	r := req.Msg
	if !filepath.IsAbs(r.GetContextDir()) || r.GetDockerfile() != "" && !filepath.IsAbs(r.GetDockerfile()) {
		return fmt.Errorf("building %q: context and Dockerfile are given by absolute paths: %w", r.GetContextDir(), errdefs.ErrInvalidArgument)
	}
	tags, err := parseTags(r.GetTags())
	if err != nil {
		return err
	}
	// Until the image has its name, this hold keeps its blobs.
	release := s.Images.Hold()
	defer release()
	res, err := s.Builds.Build(ctx, build.Request{
		ContextDir: r.GetContextDir(), Dockerfile: r.GetDockerfile(), Target: r.GetTarget(), BuildArgs: r.GetBuildArgs(), Labels: r.GetLabels(),
		NoCache: r.GetNoCache(), Pull: r.GetPull(), Platform: r.GetPlatform(),
		Isolation: cmp.Or(r.GetIsolation(), s.Isolation),
	}, func(status *build.Status) {
		data, err := json.Marshal(status)
		if err == nil {
			_ = out.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Status{Status: data}}) // a client that is gone ends ctx
		}
	})
	if err != nil {
		return err
	}
	return s.keep(ctx, out, res, tags)
}

func parseTags(tags []string) ([]ref.Ref, error) {
	var refs []ref.Ref
	for _, t := range tags {
		r, err := ref.Parse(t)
		if err != nil {
			return nil, fmt.Errorf("tag %q: %w", t, err)
		}
		refs = append(refs, r)
	}
	return refs, nil
}

// keep names the image and makes its root disk, so that the first run finds it.
func (s *builds) keep(ctx context.Context, out *connect.ServerStream[atollv1.BuildResponse], res build.Result, tags []ref.Ref) error {
	names := []string{""} // without a tag the image is kept by its digest
	if len(tags) > 0 {
		names = nil
	}
	result := &atollv1.BuildResult{Solve: durationpb.New(res.Solve)}
	for _, t := range tags {
		names = append(names, t.String())
		result.References = append(result.References, t.Familiar())
	}
	for _, name := range names {
		if _, err := s.Images.Put(ctx, name, res.Manifest); err != nil {
			return fmt.Errorf("keeping the image built: %w", err)
		}
	}
	began := time.Now()
	if _, err := s.Disks.Make(ctx, res.Manifest.Digest, nil); err != nil {
		return err
	}
	result.Digest, result.RootDisk = res.Manifest.Digest.String(), durationpb.New(time.Since(began))
	s.Events.Publish(event.Event{Type: event.Build, Action: "build", ID: result.Digest, Attributes: map[string]string{"name": first(result.References)}})
	return out.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Result{Result: result}})
}

func first(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return names[0]
}
