package image

import (
	"context"
	"fmt"
	"runtime"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/ref"
)

// tree is all the content below a manifest or an index, each once.
type tree struct {
	blobs     []ocispec.Descriptor // configs and layers
	manifests []ocispec.Descriptor // those below before those above; the root is the last
}

// tree returns what a manifest or an index stands for, and fails where any of it is not here.
func (s *Store) tree(ctx context.Context, root ocispec.Descriptor) (tree, error) {
	var t tree
	err := s.walk(ctx, root, 0, map[digest.Digest]bool{}, &t)
	return t, err
}

func (s *Store) walk(ctx context.Context, desc ocispec.Descriptor, depth int, seen map[digest.Digest]bool, t *tree) error {
	if seen[desc.Digest] {
		return nil
	}
	seen[desc.Digest] = true
	if depth > 0 && !isDocument(desc) {
		t.blobs = append(t.blobs, desc)
		return s.checkBlob(ctx, desc)
	}
	if depth > maxNesting {
		return errTooDeep
	}
	doc, err := s.document(ctx, desc)
	if err != nil {
		return err
	}
	below := doc.Manifests
	if doc.Config != nil {
		below = append([]ocispec.Descriptor{*doc.Config}, doc.Layers...)
	}
	for _, d := range below {
		if doc.Config != nil && isDocument(d) {
			return fmt.Errorf("manifest %s has a manifest for a layer: %w", desc.Digest, errdefs.ErrInvalidArgument)
		}
		if err := s.walk(ctx, d, depth+1, seen, t); err != nil {
			return err
		}
	}
	desc.MediaType = manifestType(doc, desc)
	t.manifests = append(t.manifests, desc)
	if len(t.manifests) > maxEntries {
		return fmt.Errorf("more than %d manifests: %w", maxEntries, errdefs.ErrInvalidArgument)
	}
	return nil
}

var errTooDeep = fmt.Errorf("more than %d indexes in one another: %w", maxNesting, errdefs.ErrInvalidArgument)

// isDocument says whether a descriptor is of a manifest or an index.
func isDocument(d ocispec.Descriptor) bool {
	return images.IsManifestType(d.MediaType) || images.IsIndexType(d.MediaType)
}

func (s *Store) checkBlob(ctx context.Context, desc ocispec.Descriptor) error {
	info, err := s.content.Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	if info.Size != desc.Size {
		return fmt.Errorf("blob %s has %d bytes, the manifest says %d: %w", desc.Digest, info.Size, desc.Size, errdefs.ErrDataLoss)
	}
	return nil
}

// complete returns the manifests below an index that are here with all they need, and the indexes between; and why the first of the
// others is not.
func (s *Store) complete(ctx context.Context, index ocispec.Descriptor) (have []ocispec.Descriptor, missing error) {
	doc, err := s.document(ctx, index)
	if err != nil {
		return nil, err
	}
	return s.completeBelow(ctx, doc, 1)
}

func (s *Store) completeBelow(ctx context.Context, doc document, depth int) (have []ocispec.Descriptor, missing error) {
	if depth > maxNesting {
		return nil, errTooDeep
	}
	for _, d := range doc.Manifests {
		var err error
		if !images.IsIndexType(d.MediaType) {
			if _, err = s.tree(ctx, d); err == nil {
				have = append(have, d)
			}
		} else if inner, innerErr := s.document(ctx, d); innerErr != nil {
			err = innerErr
		} else {
			var below []ocispec.Descriptor
			below, err = s.completeBelow(ctx, inner, depth+1)
			have = append(append(have, d), below...)
		}
		if missing == nil {
			missing = err
		}
	}
	return have, missing
}

// adopt makes a record of content that is here: of a manifest, or of an index with at least one image in it that is here whole.
func (s *Store) adopt(ctx context.Context, source ocispec.Descriptor) (record, *Image, error) {
	doc, err := s.document(ctx, source)
	if err != nil {
		return record{}, nil, err
	}
	source = ocispec.Descriptor{MediaType: manifestType(doc, source), Digest: source.Digest, Size: source.Size}
	if doc.Config != nil {
		img, err := s.decode(ctx, source)
		if err != nil {
			return record{}, nil, err
		}
		_, err = s.tree(ctx, source)
		return record{Manifest: img.ManifestDesc, Source: source}, img, err
	}
	have, missing := s.complete(ctx, source)
	var chosen *Image
	for _, d := range have {
		if images.IsIndexType(d.MediaType) || isAttestation(d) {
			continue
		}
		img, err := s.decode(ctx, d)
		if err != nil {
			return record{}, nil, err
		}
		host := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
		if chosen == nil || matches(host, img.Platform) && !matches(host, chosen.Platform) {
			chosen = img
		}
	}
	if chosen == nil {
		if missing == nil {
			missing = fmt.Errorf("it has no image: %w", errdefs.ErrInvalidArgument)
		}
		return record{}, nil, fmt.Errorf("index %s: %w", source.Digest, missing)
	}
	return record{Manifest: chosen.ManifestDesc, Source: source, Kept: without(have, chosen.Digest)}, chosen, nil
}

// isAttestation tells what BuildKit says of an image from an image.
func isAttestation(d ocispec.Descriptor) bool {
	return d.Platform != nil && d.Platform.OS == "unknown"
}

func without(descs []ocispec.Descriptor, d digest.Digest) []ocispec.Descriptor {
	return slices.DeleteFunc(slices.Clone(descs), func(o ocispec.Descriptor) bool { return o.Digest == d })
}

// recordFor returns the record that name means, which has found img.
func (s *Store) recordFor(name string, img Image) record {
	if r, err := ref.Parse(name); err == nil {
		s.mu.RLock()
		rec, ok := s.lookupLocked(r)
		s.mu.RUnlock()
		if ok && rec.Manifest.Digest == img.Digest {
			return rec
		}
	}
	return s.recordOf(img)
}

// Variant is one manifest of the index that an image came from.
type Variant struct {
	Digest   digest.Digest
	Platform ocispec.Platform
	Here     bool // with all its content
}

// Variants returns what the name's registry had for it: the digest, and for an index the images in it. An image that came without an
// index is its own only variant.
func (s *Store) Variants(ctx context.Context, name string, img Image) (digest.Digest, []Variant) {
	return s.variantsOf(ctx, s.recordFor(name, img))
}

func (s *Store) variantsOf(ctx context.Context, rec record) (digest.Digest, []Variant) {
	if rec.Source.Digest == rec.Manifest.Digest {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return rec.Source.Digest, []Variant{{Digest: rec.Manifest.Digest, Platform: s.images[rec.Manifest.Digest].Platform, Here: true}}
	}
	var all []Variant
	have, _ := s.complete(ctx, rec.Source) // what is missing is told by Here
	s.variants(ctx, rec.Source, 1, have, &all)
	return rec.Source.Digest, all
}

func (s *Store) variants(ctx context.Context, index ocispec.Descriptor, depth int, have []ocispec.Descriptor, all *[]Variant) {
	doc, err := s.document(ctx, index)
	if err != nil || depth > maxNesting {
		return
	}
	for _, d := range doc.Manifests {
		switch {
		case images.IsIndexType(d.MediaType):
			s.variants(ctx, d, depth+1, have, all)
		case d.Platform != nil && !isAttestation(d):
			here := slices.ContainsFunc(have, func(o ocispec.Descriptor) bool { return o.Digest == d.Digest })
			*all = append(*all, Variant{Digest: d.Digest, Platform: *d.Platform, Here: here})
		}
	}
}

// RepoDigests returns name@digest for each name of an image, as its registry has it where it came from one.
func (s *Store) RepoDigests(img Image) []string {
	var all []string
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, key := range img.References {
		if rec, ok := s.refs[key]; ok {
			all = append(all, nameOf(key)+"@"+rec.Source.Digest.String())
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}
