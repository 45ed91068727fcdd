package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// PruneOptions choose what is pruned.
type PruneOptions struct {
	All     bool     // images with references too, not only untagged ones
	Filters []string // label=, label!=, until=
	DryRun  bool     // say what would go
}

// Pruned says what has gone, or would go.
type Pruned struct {
	Untagged []string
	Images   []digest.Digest
	Blobs    int
	Bytes    int64 // of blobs
	Later    bool  // somebody is at work with images: the images go when that ends
}

// Prune removes images that nobody uses, and content that belongs to no image. An image in use stays, by all of its references.
func (s *Store) Prune(ctx context.Context, o PruneOptions) (Pruned, error) {
	p, err := s.prune(ctx, o)
	if err != nil {
		return p, fmt.Errorf("pruning images: %w", err)
	}
	return p, nil
}

func (s *Store) prune(ctx context.Context, o PruneOptions) (Pruned, error) {
	keep, err := s.filter(ctx, o.Filters, pruneFilters)
	if err != nil {
		return Pruned{}, err
	}
	all, err := s.List(ctx)
	if err != nil {
		return Pruned{}, err
	}
	var p Pruned
	doomed := map[digest.Digest]struct{}{}
	for _, img := range all {
		if len(img.References) > 0 && !o.All || !keep(img) || len(s.users(img.Digest)) > 0 {
			continue
		}
		doomed[img.Digest] = struct{}{}
		p.Images = append(p.Images, img.Digest)
		p.Untagged = append(p.Untagged, img.References...)
	}
	if p.Blobs, p.Bytes, err = s.garbage(ctx, doomed); err != nil || o.DryRun {
		return p, err
	}
	before := p.Images
	p.Images = nil
	var errs []error
	for _, img := range all {
		if _, ok := doomed[img.Digest]; !ok {
			continue
		}
		for _, key := range img.References {
			if err := s.untag(key, img.Digest); err != nil && !errdefs.IsAborted(err) {
				errs = append(errs, err)
			}
		}
	}
	deleted, err := s.collectStale(ctx, doomed)
	gone := map[digest.Digest]bool{}
	for _, d := range deleted {
		gone[d] = true
	}
	for _, d := range before {
		if gone[d] {
			p.Images = append(p.Images, d)
		}
	}
	if deleted == nil && err == nil && p.Blobs > 0 { // a hold: nothing has gone yet
		p.Later, p.Images, p.Blobs, p.Bytes = true, before, 0, 0
	}
	return p, errors.Join(append(errs, err)...)
}

// garbage counts the blobs that belong to no image, when the doomed ones are gone.
func (s *Store) garbage(ctx context.Context, doomed map[digest.Digest]struct{}) (n int, bytes int64, err error) {
	live, _, err := s.live(ctx, doomed)
	if err != nil {
		return 0, 0, err
	}
	err = s.content.Walk(ctx, func(info content.Info) error {
		if !live[info.Digest] {
			n++
			bytes += info.Size
		}
		return nil
	})
	return n, bytes, err
}
