package image

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/compression"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

// Bounds of an archive that somebody hands us.
const (
	maxFiles = 100_000
	maxLinks = 8 // in one another
)

// Loaded is one image of an archive.
type Loaded struct {
	Image     Image
	Reference string // familiar; "": the archive has no name for it
}

// Load takes images from a tar archive, also a compressed one: what docker save writes, an OCI archive, or an OCI layout. Every digest
// is verified; where anything is wrong nothing is loaded. The archive is read once, as a stream.
func (s *Store) Load(ctx context.Context, r io.Reader) ([]Loaded, error) {
	release := s.Hold()
	defer release()
	l := &loader{store: s, files: map[string]ocispec.Descriptor{}, links: map[string]string{}, small: map[string][]byte{}}
	loaded, err := l.load(ctx, r)
	// Whatever of the archive belongs to no image goes when nobody is at work any more.
	if sweepErr := s.sweep(context.WithoutCancel(ctx)); err == nil {
		err = sweepErr
	}
	if err != nil {
		return nil, fmt.Errorf("loading images: %w", err)
	}
	return loaded, nil
}

// loader is one load.
type loader struct {
	store *Store
	files map[string]ocispec.Descriptor // by name in the archive: digest and size; their content is in the store
	links map[string]string
	small map[string][]byte // the files that tell what the others are
}

func (l *loader) load(ctx context.Context, r io.Reader) ([]Loaded, error) {
	if err := l.read(ctx, r); err != nil {
		return nil, err
	}
	switch {
	case l.small["index.json"] != nil:
		return l.layout(ctx)
	case l.small["manifest.json"] != nil:
		return l.docker(ctx)
	case l.small["repositories"] != nil:
		return nil, hint.With(fmt.Errorf("an archive of Docker before 1.10, without manifest.json: %w", errdefs.ErrNotImplemented), "save it again with a current Docker")
	}
	return nil, hint.With(fmt.Errorf("neither index.json nor manifest.json is in the archive: it has no image: %w", errdefs.ErrInvalidArgument),
		"atoll import takes the archive of a root file system")
}

// read brings all files of the archive into the store.
func (l *loader) read(ctx context.Context, r io.Reader) error {
	plain, _, err := decompress(r)
	if err != nil {
		return badArchive(err)
	}
	tr := tar.NewReader(plain)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return hint.With(fmt.Errorf("the archive is empty: %w", errdefs.ErrInvalidArgument), "was the file written completely?")
			}
			return nil
		}
		if err != nil {
			return badArchive(err)
		}
		if n == maxFiles {
			return fmt.Errorf("more than %d files in the archive: %w", maxFiles, errdefs.ErrInvalidArgument)
		}
		if err := l.entry(ctx, h, tr); err != nil {
			return err
		}
	}
}

func (l *loader) entry(ctx context.Context, h *tar.Header, r io.Reader) error {
	name := path.Clean(h.Name)
	if path.IsAbs(name) || name == ".." || strings.HasPrefix(name, "../") {
		return fmt.Errorf("archive entry %q leads out of the archive: %w", h.Name, errdefs.ErrInvalidArgument)
	}
	switch h.Typeflag {
	case tar.TypeDir, tar.TypeXGlobalHeader:
		return nil
	case tar.TypeSymlink: // docker save before version 25 has them for layers that are in several images
		l.links[name] = path.Join(path.Dir(name), h.Linkname)
		return nil
	case tar.TypeLink:
		l.links[name] = path.Clean(h.Linkname)
		return nil
	case tar.TypeReg:
	default:
		return fmt.Errorf("archive entry %q is neither file, directory nor link: %w", h.Name, errdefs.ErrInvalidArgument)
	}
	switch name {
	case "index.json", "manifest.json", "repositories", ocispec.ImageLayoutFile:
		if h.Size > maxManifest {
			return fmt.Errorf("archive entry %q of %d bytes is too large, more than %d: %w", h.Name, h.Size, maxManifest, errdefs.ErrInvalidArgument)
		}
		data, err := io.ReadAll(r)
		l.small[name] = data
		return badArchive(err)
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return fmt.Errorf("archive entry %q is sparse, which no image needs: %w", h.Name, errdefs.ErrInvalidArgument)
		}
	}
	if err := l.store.room(h.Size); err != nil {
		return fmt.Errorf("archive entry %q: %w", h.Name, err)
	}
	desc, err := l.store.ingest(ctx, "load", r, expected(name))
	if err != nil {
		return fmt.Errorf("archive entry %q: %w", h.Name, err)
	}
	l.files[name] = desc
	return nil
}

var blobName = regexp.MustCompile(`^blobs/(sha256|sha384|sha512)/([0-9a-f]+)$`)

// expected is the digest that a file's name promises, or "".
func expected(name string) digest.Digest {
	m := blobName.FindStringSubmatch(name)
	if m == nil {
		return ""
	}
	return digest.NewDigestFromEncoded(digest.Algorithm(m[1]), m[2])
}

// ingest brings a stream into the store, and returns its digest and size. With a digest it must have that one.
func (s *Store) ingest(ctx context.Context, what string, r io.Reader, want digest.Digest) (ocispec.Descriptor, error) {
	algorithm := digest.SHA256
	if want != "" {
		if err := want.Validate(); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("digest %q: %w: %w", want, err, errdefs.ErrInvalidArgument)
		}
		algorithm = want.Algorithm()
	}
	key := fmt.Sprintf("%s-%d", what, s.ingests.Add(1))
	var w content.Writer
	if _, err := s.content.Info(ctx, want); want == "" || err != nil {
		if err := s.content.Abort(ctx, key); err != nil && !errdefs.IsNotFound(err) { // of a daemon that was killed
			return ocispec.Descriptor{}, err
		}
		if w, err = content.OpenWriter(ctx, s.content, content.WithRef(key)); err != nil {
			return ocispec.Descriptor{}, s.full(err)
		}
		defer func() {
			w.Close()
			_ = s.content.Abort(context.WithoutCancel(ctx), key) // nothing is there after a commit
		}()
	}
	hash := algorithm.Digester()
	var to io.Writer = hash.Hash()
	if w != nil {
		to = io.MultiWriter(w, to)
	}
	size, err := io.Copy(to, r)
	if err != nil {
		if errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return ocispec.Descriptor{}, err
		}
		return ocispec.Descriptor{}, s.full(badArchive(err))
	}
	got := hash.Digest()
	if want != "" && got != want {
		return ocispec.Descriptor{}, hint.With(fmt.Errorf("its content has the digest %s: %w", got, errdefs.ErrDataLoss), "the archive is damaged: write it again")
	}
	if w != nil {
		if err := w.Commit(ctx, size, got); err != nil && !errdefs.IsAlreadyExists(err) {
			return ocispec.Descriptor{}, s.full(err)
		}
	}
	return ocispec.Descriptor{Digest: got, Size: size}, nil
}

// badArchive gives faults of an archive their class.
func badArchive(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return hint.With(fmt.Errorf("the archive ends too early: %w: %w", io.ErrUnexpectedEOF, errdefs.ErrDataLoss), "was the file written completely?")
	}
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrInsecurePath) || errors.Is(err, gzip.ErrHeader) {
		return hint.With(fmt.Errorf("it is no tar archive: %w: %w", err, errdefs.ErrInvalidArgument), "give a tar archive, plain or compressed")
	}
	if errors.Is(err, gzip.ErrChecksum) || errors.Is(err, zstd.ErrCRCMismatch) || errors.Is(err, zstd.ErrMagicMismatch) {
		return hint.With(fmt.Errorf("the archive is damaged: %w: %w", err, errdefs.ErrDataLoss), "write it again")
	}
	return err
}

// layout takes the images of an OCI layout.
func (l *loader) layout(ctx context.Context) ([]Loaded, error) {
	doc, err := parseDocument(ocispec.Descriptor{Digest: digest.FromBytes(l.small["index.json"])}, l.small["index.json"])
	if err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	if len(doc.Manifests) == 0 {
		return nil, fmt.Errorf("index.json has no image: %w", errdefs.ErrInvalidArgument)
	}
	tags, err := l.dockerTags()
	if err != nil {
		return nil, err
	}
	var found []pending
	for _, desc := range doc.Manifests {
		names := layoutNames(desc)
		desc = ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
		if attached, err := l.attached(ctx, desc); err != nil {
			return nil, fmt.Errorf("manifest %s: %w", desc.Digest, missingBlob(err))
		} else if attached {
			continue
		}
		rec, img, err := l.store.adopt(ctx, desc)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", desc.Digest, missingBlob(err))
		}
		if len(names) == 0 {
			names = tags[img.ConfigDesc.Digest]
		}
		found = append(found, pending{rec, img, names})
	}
	return l.keep(found)
}

// attached keeps an entry of the index that refers to another one.
func (l *loader) attached(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	doc, err := l.store.document(ctx, desc)
	if err != nil || doc.Config == nil || doc.Subject == nil || images.IsConfigType(doc.Config.MediaType) {
		return false, err
	}
	return true, l.store.keepArtifact(ctx, desc)
}

func missingBlob(err error) error {
	if errdefs.IsNotFound(err) {
		return hint.With(fmt.Errorf("it is not whole in the archive: %s: %w", err.Error(), errdefs.ErrInvalidArgument), "was the archive written completely?")
	}
	return err
}

// layoutNames returns the names that an entry of index.json has.
func layoutNames(desc ocispec.Descriptor) []string {
	if name := desc.Annotations[nameAnnotation]; name != "" {
		return []string{name}
	}
	if name := desc.Annotations[ocispec.AnnotationRefName]; strings.ContainsAny(name, ":/") {
		return []string{name} // podman and skopeo write all of it there; a tag alone names nothing
	}
	return nil
}

// dockerTags returns the names in manifest.json by the digest of the config.
func (l *loader) dockerTags() (map[digest.Digest][]string, error) {
	items, err := l.items()
	tags := map[digest.Digest][]string{}
	for _, item := range items {
		if desc, err := l.file(item.Config); err == nil {
			tags[desc.Digest] = append(tags[desc.Digest], item.RepoTags...)
		}
	}
	return tags, err
}

func (l *loader) items() ([]dockerItem, error) {
	data := l.small["manifest.json"]
	if data == nil {
		return nil, nil
	}
	var items []dockerItem
	if err := json.Unmarshal(data, &items); err != nil {
		return nil, fmt.Errorf("manifest.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(items) > maxEntries {
		return nil, fmt.Errorf("manifest.json has %d images, more than %d: %w", len(items), maxEntries, errdefs.ErrInvalidArgument)
	}
	for _, item := range items {
		if len(item.Layers) > maxEntries {
			return nil, fmt.Errorf("manifest.json: an image of %d layers, more than %d: %w", len(item.Layers), maxEntries, errdefs.ErrInvalidArgument)
		}
	}
	return items, nil
}

// file finds a file of the archive, through links within it.
func (l *loader) file(name string) (ocispec.Descriptor, error) {
	name = path.Clean(name)
	for range maxLinks {
		if desc, ok := l.files[name]; ok {
			return desc, nil
		}
		target, ok := l.links[name]
		if !ok {
			break
		}
		name = target
	}
	return ocispec.Descriptor{}, hint.With(fmt.Errorf("file %q is not in the archive: %w", name, errdefs.ErrInvalidArgument), "was the archive written completely?")
}

// docker takes the images of an archive that docker save before version 25 has written: configs and layers, without OCI manifests.
func (l *loader) docker(ctx context.Context) ([]Loaded, error) {
	items, err := l.items()
	if err != nil {
		return nil, err
	}
	if len(items) == 0 {
		return nil, fmt.Errorf("manifest.json has no image: %w", errdefs.ErrInvalidArgument)
	}
	var found []pending
	for _, item := range items {
		desc, err := l.assemble(ctx, item)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", cmp.Or(strings.Join(item.RepoTags, ", "), item.Config), err)
		}
		rec, img, err := l.store.adopt(ctx, desc)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", desc.Digest, err)
		}
		found = append(found, pending{rec, img, item.RepoTags})
	}
	return l.keep(found)
}

// assemble writes the manifest that the archive does not have.
func (l *loader) assemble(ctx context.Context, item dockerItem) (ocispec.Descriptor, error) {
	s := l.store
	config, err := l.file(item.Config)
	if err != nil {
		return config, err
	}
	config.MediaType = ocispec.MediaTypeImageConfig
	raw, err := s.read(ctx, config, maxConfig)
	if err != nil {
		return config, err
	}
	var parsed ocispec.Image
	if err := json.Unmarshal(raw, &parsed); err != nil {
		return config, fmt.Errorf("config %q: %w: %w", item.Config, err, errdefs.ErrInvalidArgument)
	}
	if want, got := len(parsed.RootFS.DiffIDs), len(item.Layers); want != got {
		return config, fmt.Errorf("its config has %d layers, manifest.json %d: %w", want, got, errdefs.ErrInvalidArgument)
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{}}
	type unpacked struct {
		mediaType string
		diff      digest.Digest
	}
	known := map[digest.Digest]unpacked{} // the same layer, named often, is unpacked once
	for i, name := range item.Layers {
		layer, err := l.file(name)
		if err != nil {
			return config, err
		}
		u, ok := known[layer.Digest]
		if !ok {
			if u.mediaType, u.diff, err = s.layerOf(ctx, layer, nil); err != nil {
				return config, fmt.Errorf("layer %q: %w", name, err)
			}
			known[layer.Digest] = u
		}
		layer.MediaType = u.mediaType
		diff := u.diff
		if want := parsed.RootFS.DiffIDs[i]; diff != want {
			return config, hint.With(fmt.Errorf("layer %q has the digest %s, the config says %s: %w", name, diff, want, errdefs.ErrDataLoss), "the archive is damaged: write it again")
		}
		m.Layers = append(m.Layers, layer)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return config, err
	}
	desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, s.writeBlob(ctx, desc, data)
}

// untilDone reads until the context ends: a layer of nothing may unpack to more than anybody waits for.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.Reader.Read(p)
}

// layerOf looks into a layer: its media type, and the digest of the tar archive in it, which each (where it is not nil) reads too.
func (s *Store) layerOf(ctx context.Context, layer ocispec.Descriptor, each func(io.Reader) error) (mediaType string, diff digest.Digest, err error) {
	r, err := s.Blob(ctx, layer)
	if err != nil {
		return "", "", err
	}
	defer r.Close()
	plain, kind, err := decompress(r)
	if err != nil {
		return "", "", badArchive(err)
	}
	mediaType, ok := layerTypes[kind]
	if !ok {
		return "", "", fmt.Errorf("compressed with %s: %w", kind, errdefs.ErrInvalidArgument)
	}
	hash := digest.SHA256.Digester()
	plain = io.TeeReader(untilDone{ctx, plain}, hash.Hash())
	if each != nil {
		if err := each(plain); err != nil {
			return "", "", badArchive(err)
		}
	}
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return "", "", badArchive(err)
	}
	return mediaType, hash.Digest(), ctx.Err()
}

var layerTypes = map[compression.Kind]string{
	compression.None: ocispec.MediaTypeImageLayer, compression.Gzip: ocispec.MediaTypeImageLayerGzip, compression.Zstd: ocispec.MediaTypeImageLayerZstd,
}

// decompress looks at the first bytes of a stream. What no compression begins with is taken for plain.
func decompress(r io.Reader) (plain io.Reader, kind compression.Kind, err error) {
	plain, kind, _, err = sniff(r)
	return plain, kind, err
}

// sniff is decompress; raw is the stream as it came. Only one of the two can be read.
func sniff(r io.Reader) (plain io.Reader, kind compression.Kind, raw io.Reader, err error) {
	b := bufio.NewReaderSize(r, 1<<16)
	if kind, err = compression.Detect(b); err != nil {
		return nil, compression.None, nil, err
	}
	return &lazily{open: func() (io.Reader, error) { return kind.Open(b) }}, kind, b, nil
}

// lazily opens a reader when it is first read.
type lazily struct {
	open func() (io.Reader, error)
	r    io.Reader
}

func (l *lazily) Read(b []byte) (n int, err error) {
	if l.r == nil {
		if l.r, err = l.open(); err != nil {
			return 0, err
		}
	}
	return l.r.Read(b)
}

// pending is an image that is whole in the store and not yet known by its names.
type pending struct {
	rec   record
	img   *Image
	names []string
}

// keep makes the images known, having checked all of their names.
func (l *loader) keep(found []pending) ([]Loaded, error) {
	type named struct {
		pending
		ref ref.Ref
	}
	var all []named
	for _, p := range found {
		if len(p.names) == 0 {
			all = append(all, named{p, ref.Ref{}})
		}
		for _, name := range p.names {
			r, err := parseTag(name)
			if err != nil {
				return nil, fmt.Errorf("image %s: %w", p.img.Digest, err)
			}
			n := named{p, r}
			if !slices.ContainsFunc(all, func(o named) bool { return o.ref == r && o.img.Digest == p.img.Digest }) {
				all = append(all, n)
			}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("the archive has no image: %w", errdefs.ErrInvalidArgument)
	}
	s := l.store
	var loaded []Loaded
	for _, n := range all {
		key, familiar := n.img.Digest.String(), ""
		if n.ref.Name != "" {
			key, familiar = n.ref.String(), n.ref.Familiar()
		}
		if err := s.set(key, n.rec, n.img); err != nil {
			return nil, err
		}
		name := ""
		if familiar != "" {
			name = key
		}
		s.publish("load", n.img.Digest, name)
		loaded = append(loaded, Loaded{Image: s.image(n.img.Digest), Reference: familiar})
	}
	return loaded, nil
}
