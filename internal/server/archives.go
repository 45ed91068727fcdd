//go:build linux

package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/image"
	"github.com/containerd/errdefs"
)

// chunk is how much of a file goes into one message.
const chunk = 256 << 10

func (s *images) Save(ctx context.Context, req *connect.Request[atollv1.SaveImagesRequest], out *connect.ServerStream[atollv1.SaveImagesResponse]) error {
	w := bufio.NewWriterSize(writerFunc(func(b []byte) (int, error) {
		if err := out.Send(&atollv1.SaveImagesResponse{Data: b}); err != nil {
			return 0, err
		}
		return len(b), nil
	}), chunk)
	err := s.Images.Save(ctx, w, req.Msg.GetReferences(), image.SaveOptions{Format: req.Msg.GetFormat(), Platform: req.Msg.GetPlatform()})
	if err != nil {
		return err
	}
	return w.Flush()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func (s *images) Load(ctx context.Context, in *connect.BidiStream[atollv1.LoadImagesRequest, atollv1.LoadImagesResponse]) error {
	p := &progress[atollv1.LoadImagesResponse]{send: in.Send, wrap: func(t *atollv1.Transfer) *atollv1.LoadImagesResponse {
		return &atollv1.LoadImagesResponse{Kind: &atollv1.LoadImagesResponse_Transfer{Transfer: t}}
	}}
	release := s.Images.Hold()
	defer release()
	loaded, err := s.Images.Load(ctx, &received{next: func() ([]byte, error) {
		m, err := in.Receive()
		return m.GetData(), err
	}})
	if err != nil {
		return err
	}
	for _, l := range loaded {
		if err := s.makeDisk(ctx, l.Image, p.report); err != nil {
			return err
		}
		err := in.Send(&atollv1.LoadImagesResponse{Kind: &atollv1.LoadImagesResponse_Loaded{
			Loaded: &atollv1.LoadedImage{Digest: l.Image.Digest.String(), Reference: l.Reference},
		}})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *images) Import(ctx context.Context, in *connect.BidiStream[atollv1.ImportImageRequest, atollv1.ImportImageResponse]) error {
	first, err := in.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return fmt.Errorf("importing an image: the first message is not start: %w", errdefs.ErrInvalidArgument)
	}
	config, err := build.Changes(start.GetChanges())
	if err != nil {
		return err
	}
	p := &progress[atollv1.ImportImageResponse]{send: in.Send, wrap: func(t *atollv1.Transfer) *atollv1.ImportImageResponse {
		return &atollv1.ImportImageResponse{Kind: &atollv1.ImportImageResponse_Transfer{Transfer: t}}
	}}
	release := s.Images.Hold()
	defer release()
	img, err := s.Images.Import(ctx, &received{next: func() ([]byte, error) {
		m, err := in.Receive()
		return m.GetData(), err
	}}, image.ImportOptions{
		Reference: start.GetReference(), Platform: start.GetPlatform(), Message: start.GetMessage(), Config: config, Created: time.Now().UTC(),
	})
	if err != nil {
		return err
	}
	if err := s.makeDisk(ctx, img, p.report); err != nil {
		return err
	}
	return in.Send(&atollv1.ImportImageResponse{Kind: &atollv1.ImportImageResponse_Image{Image: s.imageTo(img, nil)}})
}

// received reads the data that a client sends, message by message: no more of it is in memory than one.
type received struct {
	next func() ([]byte, error)
	rest []byte
}

func (r *received) Read(b []byte) (int, error) {
	for len(r.rest) == 0 {
		data, err := r.next()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
		r.rest = data
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
