package image

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

// The formats of archives. A docker-archive is an oci-archive with manifest.json and repositories in it, as Docker writes it from
// version 25 on; older ones read it too.
const (
	DockerArchive = "docker-archive"
	OCIArchive    = "oci-archive"
)

// SaveOptions are what a save may be told.
type SaveOptions struct {
	Format   string // default: DockerArchive
	Platform string // the one image of an index to save; default: the whole index where all of it is here
}

// nameAnnotation has the whole reference of an image in index.json. The specification's own has the tag only.
const nameAnnotation = "io.containerd.image.name"

// dockerItem is one image in manifest.json.
type dockerItem struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Save writes images into one tar archive. The same images give the same bytes. Images named by ID have no name in it.
func (s *Store) Save(ctx context.Context, w io.Writer, names []string, o SaveOptions) error {
	o.Format = cmp.Or(o.Format, DockerArchive)
	if o.Format != DockerArchive && o.Format != OCIArchive {
		return hint.With(fmt.Errorf("saving images: format %q: %w", o.Format, errdefs.ErrInvalidArgument), "the formats are %s and %s", DockerArchive, OCIArchive)
	}
	if len(names) == 0 {
		return fmt.Errorf("saving images: none is named: %w", errdefs.ErrInvalidArgument)
	}
	defer s.Hold()()
	a := &archive{store: s, blobs: map[digest.Digest]ocispec.Descriptor{}, repositories: map[string]map[string]string{}}
	for _, name := range names {
		if err := a.add(ctx, name, o.Platform); err != nil {
			return fmt.Errorf("saving image %q: %w", name, err)
		}
	}
	if err := a.write(ctx, w, o.Format == DockerArchive); err != nil {
		return fmt.Errorf("saving images: %w", err)
	}
	return nil
}

// archive is what goes into an archive.
type archive struct {
	store        *Store
	blobs        map[digest.Digest]ocispec.Descriptor
	index        []ocispec.Descriptor
	items        []dockerItem
	repositories map[string]map[string]string
}

func (a *archive) add(ctx context.Context, name, platform string) error {
	s := a.store
	img, err := s.find(name)
	if err != nil {
		return err
	}
	rec := s.recordFor(name, img)
	root, _, err := s.toPush(ctx, rec, platform)
	if err != nil {
		return err
	}
	t, err := s.tree(ctx, root)
	if err != nil {
		return err
	}
	for _, d := range slices.Concat(t.blobs, t.manifests) {
		a.blobs[d.Digest] = d
	}
	if images.IsManifestType(root.MediaType) && root.Digest != img.Digest {
		other, err := s.decode(ctx, root)
		if err != nil {
			return err
		}
		img = *other
	}
	entry := ocispec.Descriptor{MediaType: root.MediaType, Digest: root.Digest, Size: root.Size}
	var tag string
	if r, err := ref.Parse(name); err == nil && r.Digest == "" {
		s.mu.RLock()
		_, named := s.refs[r.String()]
		s.mu.RUnlock()
		if named {
			entry.Annotations = map[string]string{nameAnnotation: r.String(), ocispec.AnnotationRefName: r.Tag}
			tag = r.Familiar()
			a.repository(strings.TrimSuffix(tag, ":"+r.Tag), r.Tag, img)
		}
	}
	a.index = append(a.index, entry)
	a.item(img, tag)
	return nil
}

// item adds an image to manifest.json, or a tag to the image that is in it.
func (a *archive) item(img Image, tag string) {
	item := dockerItem{Config: archivePath(img.ConfigDesc.Digest), RepoTags: []string{}}
	for _, l := range img.Layers {
		item.Layers = append(item.Layers, archivePath(l.Digest))
	}
	i := slices.IndexFunc(a.items, func(o dockerItem) bool { return o.Config == item.Config && slices.Equal(o.Layers, item.Layers) })
	if i < 0 {
		a.items = append(a.items, item)
		i = len(a.items) - 1
	}
	if tag != "" && !slices.Contains(a.items[i].RepoTags, tag) {
		a.items[i].RepoTags = append(a.items[i].RepoTags, tag)
	}
}

func (a *archive) repository(name, tag string, img Image) {
	if len(img.Layers) == 0 {
		return
	}
	if a.repositories[name] == nil {
		a.repositories[name] = map[string]string{}
	}
	a.repositories[name][tag] = img.Layers[len(img.Layers)-1].Digest.Encoded()
}

func archivePath(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// write writes the small files first, so that whoever reads a stream knows early what comes.
func (a *archive) write(ctx context.Context, w io.Writer, docker bool) error {
	tw := tar.NewWriter(w)
	files := []struct {
		name    string
		content any
	}{
		{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}},
		{"index.json", nil},
		{"manifest.json", a.items},
		{"repositories", a.repositories},
	}
	for i, f := range files {
		if i >= 2 && !docker {
			break
		}
		data, err := json.Marshal(f.content)
		if f.content == nil {
			_, data, err = marshalIndex(a.index, nil)
		}
		if err != nil {
			return err
		}
		if err := writeHeader(tw, f.name, int64(len(data))); err != nil {
			return err
		}
		if _, err := tw.Write(data); err != nil {
			return err
		}
	}
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := writeHeader(tw, dir, 0); err != nil {
			return err
		}
	}
	all := make([]ocispec.Descriptor, 0, len(a.blobs))
	for _, d := range a.blobs {
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	for _, d := range all {
		if err := a.blob(ctx, tw, d); err != nil {
			return err
		}
	}
	return tw.Close()
}

func (a *archive) blob(ctx context.Context, tw *tar.Writer, d ocispec.Descriptor) error {
	r, err := a.store.Blob(ctx, ocispec.Descriptor{Digest: d.Digest, Size: d.Size})
	if err != nil {
		return err
	}
	defer r.Close()
	if err := writeHeader(tw, archivePath(d.Digest), d.Size); err != nil {
		return err
	}
	_, err = io.Copy(tw, untilDone{ctx, r})
	return err
}

func writeHeader(tw *tar.Writer, name string, size int64) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
	if strings.HasSuffix(name, "/") {
		h.Typeflag, h.Mode = tar.TypeDir, 0o755
	}
	return tw.WriteHeader(h)
}
