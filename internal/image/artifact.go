package image

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// AnyArtifact among artifact types stands for all of them.
const AnyArtifact = "*"

// artifact is a manifest that refers to an image or to another artifact: its subject. It is kept as long as its subject is.
type artifact struct {
	Manifest ocispec.Descriptor // with ArtifactType and Annotations, as a registry lists it
	Subject  digest.Digest
	Blobs    []digest.Digest
}

// Artifact is what Attach and PutArtifact make a manifest of.
type Artifact struct {
	Type        string               // of the whole, as application/vnd.atoll.rootdisk.v1+erofs
	Config      []byte               // JSON of the type's own; nil: none
	ConfigType  string               // its media type, where there is one
	Blobs       []ocispec.Descriptor // in the store already, under a Hold
	Annotations map[string]string
}

// Attach makes an artifact that refers to a manifest of the store (an image's, an index's or an artifact's) and is kept as long as that
// is. Attaching the same again changes nothing.
func (s *Store) Attach(ctx context.Context, subject digest.Digest, a Artifact) (ocispec.Descriptor, error) {
	defer s.Hold()()
	to, err := s.subject(ctx, subject)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("attaching %s to %s: %w", a.Type, subject, err)
	}
	desc, err := s.writeArtifact(ctx, a, &to)
	if err == nil {
		err = s.keepArtifact(ctx, desc)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("attaching %s to %s: %w", a.Type, subject, err)
	}
	return desc, nil
}

// PutArtifact makes an artifact of its own, which refers to nothing. It stays as long as the caller's Hold.
func (s *Store) PutArtifact(ctx context.Context, a Artifact) (ocispec.Descriptor, error) {
	desc, err := s.writeArtifact(ctx, a, nil)
	if err != nil {
		return desc, fmt.Errorf("making artifact %s: %w", a.Type, err)
	}
	return desc, nil
}

// ArtifactOf reads an artifact's manifest: its type, its config and its blobs.
func (s *Store) ArtifactOf(ctx context.Context, desc ocispec.Descriptor) (Artifact, error) {
	doc, err := s.document(ctx, desc)
	if err != nil {
		return Artifact{}, err
	}
	if doc.Config == nil {
		return Artifact{}, fmt.Errorf("%s is an index, not an artifact: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	a := Artifact{Type: artifactType(doc), ConfigType: doc.Config.MediaType, Annotations: doc.Annotations}
	a.Blobs = slices.DeleteFunc(doc.Layers, func(d ocispec.Descriptor) bool { return d.MediaType == ocispec.MediaTypeEmptyJSON })
	if doc.Config.MediaType != ocispec.MediaTypeEmptyJSON {
		a.Config, err = s.read(ctx, *doc.Config, maxConfig)
	}
	return a, err
}

// Referrers returns the artifacts here that refer to a manifest, of one type or ("" or AnyArtifact) of all.
func (s *Store) Referrers(_ context.Context, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	all, err := s.artifacts.All()
	if err != nil {
		return nil, fmt.Errorf("listing what refers to %s: %w", subject, err)
	}
	var found []ocispec.Descriptor
	for _, a := range all {
		if a.Subject == subject && (artifactType == "" || wanted([]string{artifactType}, a.Manifest.ArtifactType)) {
			found = append(found, a.Manifest)
		}
	}
	slices.SortFunc(found, func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	return found, nil
}

func wanted(types []string, one string) bool {
	return slices.Contains(types, one) || slices.Contains(types, AnyArtifact)
}

// artifactType is the type of an artifact by the image specification: the manifest's own word, else its config's media type.
func artifactType(doc document) string {
	if doc.ArtifactType != "" || doc.Config == nil {
		return doc.ArtifactType
	}
	return doc.Config.MediaType
}

// subject returns the descriptor of a manifest that is here.
func (s *Store) subject(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	info, err := s.content.Info(ctx, d)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{Digest: d, Size: info.Size}
	doc, err := s.document(ctx, desc)
	desc.MediaType = manifestType(doc, desc)
	return desc, err
}

func (s *Store) writeArtifact(ctx context.Context, a Artifact, subject *ocispec.Descriptor) (ocispec.Descriptor, error) {
	for _, b := range a.Blobs {
		if err := s.checkBlob(ctx, b); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: a.Type,
		Config: bare(ocispec.DescriptorEmptyJSON), Layers: a.Blobs, Subject: subject, Annotations: a.Annotations,
	}
	config := ocispec.DescriptorEmptyJSON.Data
	if a.Config != nil {
		config = a.Config
		m.Config = ocispec.Descriptor{MediaType: a.ConfigType, Digest: digest.FromBytes(config), Size: int64(len(config))}
	}
	if err := s.writeBlob(ctx, m.Config, config); err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(a.Blobs) == 0 { // the specification wants one layer at least
		m.Layers = []ocispec.Descriptor{bare(ocispec.DescriptorEmptyJSON)}
		if err := s.writeBlob(ctx, m.Layers[0], ocispec.DescriptorEmptyJSON.Data); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	data, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(data), Size: int64(len(data)), ArtifactType: a.Type, Annotations: a.Annotations}
	return desc, s.writeBlob(ctx, desc, data)
}

func bare(d ocispec.Descriptor) ocispec.Descriptor {
	d.Data = nil
	return d
}

// writeBlob puts a small blob into the store.
func (s *Store) writeBlob(ctx context.Context, desc ocispec.Descriptor, data []byte) error {
	desc = ocispec.Descriptor{Digest: desc.Digest, Size: desc.Size}
	return s.full(content.WriteBlob(ctx, s.content, "write-"+desc.Digest.String(), bytes.NewReader(data), desc))
}

// keepArtifact records an artifact whose content is here.
func (s *Store) keepArtifact(ctx context.Context, desc ocispec.Descriptor) error {
	doc, err := s.document(ctx, desc)
	if err != nil {
		return err
	}
	if doc.Subject == nil || doc.Subject.Digest.Validate() != nil {
		return fmt.Errorf("artifact %s refers to nothing: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	t, err := s.tree(ctx, desc)
	if err != nil {
		return err
	}
	a := artifact{Subject: doc.Subject.Digest, Manifest: ocispec.Descriptor{
		MediaType: manifestType(doc, desc), Digest: desc.Digest, Size: desc.Size, ArtifactType: artifactType(doc), Annotations: doc.Annotations,
	}}
	for _, b := range t.blobs {
		a.Blobs = append(a.Blobs, b.Digest)
	}
	s.change.Lock()
	defer s.change.Unlock()
	return s.artifacts.Put(desc.Digest.String(), a)
}

// liveArtifacts adds to live what refers to it, and returns the artifacts whose subjects are gone.
func (s *Store) liveArtifacts(live map[digest.Digest]bool) (dead []string, err error) {
	all, err := s.artifacts.All()
	if err != nil {
		return nil, err
	}
	for found := true; found; { // an artifact may refer to an artifact
		found = false
		for key, a := range all {
			if !live[a.Subject] {
				continue
			}
			found = true
			live[a.Manifest.Digest] = true
			for _, b := range a.Blobs {
				live[b] = true
			}
			delete(all, key)
		}
	}
	for key := range all {
		dead = append(dead, key)
	}
	return dead, nil
}

// AddBlob brings a stream into the store, for an artifact. It stays as long as the caller's Hold, or as what it becomes part of.
func (s *Store) AddBlob(ctx context.Context, r io.Reader) (ocispec.Descriptor, error) {
	return s.ingest(ctx, "blob", r, "")
}
