package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

// staleIngest is the age at which GC gives up the data of an interrupted transfer.
const staleIngest = 24 * time.Hour

// Removed says what Remove did: references taken away, then the image and the blobs that were deleted with it. While a Hold is there
// nothing is deleted yet.
type Removed struct {
	Untagged []string
	Deleted  []digest.Digest
}

// Remove takes a reference away; with the last one the image goes. By ID it takes all of them, several only with force. An image in use
// keeps its last reference unless force is given, and even then it stays, untagged, until it is no longer used.
func (s *Store) Remove(ctx context.Context, name string, force bool) (Removed, error) {
	img, err := s.find(name)
	if err != nil {
		return Removed{}, err
	}
	keys := img.References
	if key, ok := s.keyOf(name, img); ok {
		keys = []string{key}
	} else if len(keys) > 1 && !force {
		return Removed{}, hint.With(fmt.Errorf("removing image %q: it has the references %s: %w", name, strings.Join(keys, ", "), errdefs.ErrFailedPrecondition),
			"remove it by reference, or all of them with --force")
	}
	if users := s.users(img.Digest); len(users) > 0 && len(keys) == len(img.References) && (!force || len(keys) == 0) {
		return Removed{}, hint.With(fmt.Errorf("removing image %q: in use by %s: %w", name, strings.Join(users, ", "), errdefs.ErrFailedPrecondition),
			"atoll rm %s", strings.Join(users, " "))
	}
	for _, key := range keys {
		if err := s.untag(key, img.Digest); err != nil {
			return Removed{}, fmt.Errorf("removing image %q: %w", name, err)
		}
	}
	deleted, err := s.collect(ctx, map[digest.Digest]struct{}{img.Digest: {}}, false, false)
	if err != nil {
		return Removed{}, fmt.Errorf("removing image %q: %w", name, err)
	}
	return Removed{Untagged: keys, Deleted: deleted}, nil
}

// keyOf returns the reference of img that name means, if it is not an ID.
func (s *Store) keyOf(name string, img Image) (string, bool) {
	r, err := ref.Parse(name)
	if err != nil {
		return "", false
	}
	if slices.Contains(img.References, r.String()) {
		return r.String(), true
	}
	r.Tag = "" // name:tag@digest was stored as name@digest
	return r.String(), slices.Contains(img.References, r.String())
}

func (s *Store) users(d digest.Digest) []string {
	s.mu.RLock()
	inUse := s.inUse
	s.mu.RUnlock()
	return inUse(d)
}

// untag takes one reference away from an image; after the last one it is an untagged image.
func (s *Store) untag(key string, d digest.Digest) error {
	s.change.Lock()
	defer s.change.Unlock()
	s.mu.RLock()
	rec, ok := s.refs[key]
	s.mu.RUnlock()
	if !ok || rec.Manifest.Digest != d {
		return fmt.Errorf("reference %s has changed meanwhile: %w", key, errdefs.ErrAborted)
	}
	if !s.isTagged(d, key) {
		if err := s.write(d.String(), rec); err != nil {
			return err
		}
	}
	if err := s.erase(key); err != nil {
		return err
	}
	s.publish("untag", d, key)
	return nil
}

// Hold keeps every blob in the store until release is called: while any hold is there, Remove and GC delete nothing. Take one before
// looking up an image that is about to be used and keep it until SetInUse's function knows the use.
func (s *Store) Hold() (release func()) {
	s.change.Lock()
	defer s.change.Unlock()
	s.holds++
	s.holdSeq++
	released := false
	return func() {
		s.change.Lock()
		if released {
			s.change.Unlock()
			return
		}
		released = true
		s.holds--
		due, all := s.deferred, s.gcDue
		run := s.holds == 0 && (all || s.sweepDue || len(due) > 0)
		if run {
			s.deferred, s.sweepDue, s.gcDue = map[digest.Digest]struct{}{}, false, false
		}
		s.change.Unlock()
		if !run {
			return
		}
		if _, err := s.collect(context.Background(), due, all, all); err != nil {
			s.log.Warn("deferred image garbage collection failed", "error", err)
		}
	}
}

// GC deletes untagged images that nobody uses, blobs that belong to no image, and transfers given up long ago. It returns the digests.
// While a hold is there it does nothing; it then runs at the last release.
func (s *Store) GC(ctx context.Context) ([]digest.Digest, error) {
	deleted, err := s.collect(ctx, nil, true, true)
	if err != nil {
		return deleted, fmt.Errorf("collecting image garbage: %w", err)
	}
	return deleted, nil
}

// sweep deletes the blobs of no image as soon as there is no hold: what a load that failed has left, say.
func (s *Store) sweep(ctx context.Context) error {
	_, err := s.collect(ctx, nil, false, false)
	return err
}

// collectStale is collect that also gives up the data of transfers that nobody goes on with.
func (s *Store) collectStale(ctx context.Context, candidates map[digest.Digest]struct{}) ([]digest.Digest, error) {
	return s.collect(ctx, candidates, false, true)
}

// collect deletes those of the candidates (all: every image) that are untagged and not in use, and then the blobs of no image.
func (s *Store) collect(ctx context.Context, candidates map[digest.Digest]struct{}, all, stale bool) ([]digest.Digest, error) {
	for {
		s.change.Lock()
		if s.holds > 0 {
			maps.Copy(s.deferred, candidates)
			s.sweepDue, s.gcDue = true, s.gcDue || all
			s.change.Unlock()
			return nil, nil
		}
		seq := s.holdSeq
		s.change.Unlock()

		// Asked without a lock, for the answer may come from someone who is just about to take a hold.
		var unused []digest.Digest
		for _, d := range s.untagged() {
			if _, ok := candidates[d]; (ok || all) && len(s.users(d)) == 0 {
				unused = append(unused, d)
			}
		}

		s.change.Lock()
		if s.holdSeq != seq {
			s.change.Unlock()
			continue // someone may have begun to use one of them
		}
		deleted, gone, err := s.sweepLocked(ctx, unused, stale)
		s.change.Unlock()
		s.mu.RLock()
		callbacks := slices.Clone(s.onDelete)
		s.mu.RUnlock()
		for _, d := range gone {
			s.publish("delete", d, "")
			for _, f := range callbacks {
				f(d)
			}
		}
		return deleted, err
	}
}

func (s *Store) untagged() []digest.Digest {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var ds []digest.Digest
	for key := range s.refs {
		if isUntagged(key) {
			ds = append(ds, digest.Digest(key))
		}
	}
	return ds
}

// sweepLocked forgets the unused images and deletes every blob of no image. It needs change, and no hold. It returns all that was
// deleted and, of these, the images.
func (s *Store) sweepLocked(ctx context.Context, unused []digest.Digest, stale bool) (deleted, gone []digest.Digest, err error) {
	for _, d := range unused {
		s.mu.RLock()
		_, still := s.refs[d.String()]
		s.mu.RUnlock()
		if !still {
			continue
		}
		if err := s.erase(d.String()); err != nil {
			return nil, gone, err
		}
		s.mu.Lock()
		delete(s.images, d)
		s.mu.Unlock()
		gone = append(gone, d)
	}
	live, dead, err := s.live(ctx, nil)
	if err != nil {
		return nil, gone, err
	}
	for _, key := range dead {
		if err := s.artifacts.Delete(key); err != nil {
			return nil, gone, err
		}
	}
	err = s.content.Walk(ctx, func(info content.Info) error {
		if !live[info.Digest] {
			deleted = append(deleted, info.Digest)
		}
		return nil
	})
	if err != nil {
		return nil, gone, err
	}
	var errs []error
	for _, d := range deleted {
		if err := s.content.Delete(ctx, d); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	if stale {
		errs = append(errs, s.dropStale(ctx))
	}
	return deleted, gone, errors.Join(errs...)
}

// live returns every digest that an image (but some) needs, and the artifacts that refer to none of them.
func (s *Store) live(ctx context.Context, but map[digest.Digest]struct{}) (live map[digest.Digest]bool, deadArtifacts []string, err error) {
	live = map[digest.Digest]bool{}
	var kept []ocispec.Descriptor
	s.mu.RLock()
	for _, r := range s.refs {
		if _, ok := but[r.Manifest.Digest]; ok {
			continue
		}
		img := s.images[r.Manifest.Digest]
		live[r.Manifest.Digest], live[r.Source.Digest], live[img.ConfigDesc.Digest] = true, true, true
		for _, l := range img.Layers {
			live[l.Digest] = true
		}
		kept = append(kept, r.Kept...)
	}
	s.mu.RUnlock()
	for _, d := range kept {
		if live[d.Digest] {
			continue
		}
		live[d.Digest] = true
		if images.IsIndexType(d.MediaType) {
			continue // what is here of it is kept by itself
		}
		doc, err := s.document(ctx, d)
		if errdefs.IsNotFound(err) {
			continue // someone took its file away
		}
		if err != nil {
			return nil, nil, err
		}
		if doc.Config == nil {
			continue
		}
		live[doc.Config.Digest] = true
		for _, l := range doc.Layers {
			live[l.Digest] = true
		}
	}
	deadArtifacts, err = s.liveArtifacts(live)
	return live, deadArtifacts, err
}

func (s *Store) dropStale(ctx context.Context) error {
	ingests, err := s.content.ListStatuses(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range ingests {
		if time.Since(i.UpdatedAt) > staleIngest {
			errs = append(errs, s.content.Abort(ctx, i.Ref))
		}
	}
	return errors.Join(errs...)
}
