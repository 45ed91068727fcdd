// Package base makes base images from Debian's own signed packages, so that FROM works without any registry: a Debian by mmdebstrap,
// a busybox from one package. It writes OCI content and names nothing: the caller tags what it gets, and keeps it from
// being collected until then. A Builder may be used from several goroutines; it builds one image at a time.
package base

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// Base is an image that can be built here.
type Base struct {
	Name        string
	Aliases     []string
	Description string

	suite string // the Debian release it is made from
	slim  bool   // without documentation
	write func(b *Builder, ctx context.Context, base Base, in inputs, layer io.Writer) error
	cmd   string
}

// inputs is what a build starts from.
type inputs struct {
	suites   debian.Archives
	mirror   string
	epoch    time.Time // of the suite's release: the date of everything in the image
	progress func(line string)
}

// List returns the images that Build knows.
func List() []Base {
	return []Base{
		{Name: "debian:bookworm", Aliases: []string{"debian:12"}, Description: "Debian 12, minimal", suite: "bookworm", write: (*Builder).bootstrap, cmd: "bash"},
		{Name: "debian:bookworm-slim", Aliases: []string{"debian:12-slim"}, Description: "Debian 12, minimal, without documentation", suite: "bookworm", slim: true, write: (*Builder).bootstrap, cmd: "bash"},
		{Name: "debian:trixie", Aliases: []string{"debian:13"}, Description: "Debian 13, minimal", suite: "trixie", write: (*Builder).bootstrap, cmd: "bash"},
		{Name: "debian:trixie-slim", Aliases: []string{"debian:13-slim"}, Description: "Debian 13, minimal, without documentation", suite: "trixie", slim: true, write: (*Builder).bootstrap, cmd: "bash"},
		{Name: "busybox", Aliases: []string{"busybox:latest"}, Description: "Busybox of Debian 12, one static program", suite: "bookworm", write: (*Builder).busybox, cmd: "sh"},
	}
}

// Find returns the base with that name or alias, or errdefs.ErrNotFound.
func Find(name string) (Base, error) {
	known := ""
	for _, b := range List() {
		for _, n := range append([]string{b.Name}, b.Aliases...) {
			if n == name {
				return b, nil
			}
		}
		known += " " + b.Name
	}
	return Base{}, hint.With(fmt.Errorf("base %q: %w", name, errdefs.ErrNotFound), "the bases are:%s", known)
}

// Config is what a builder works with. All must be set.
type Config struct {
	Content content.Store
	TempDir string // for file systems in the making; nobody else's
	Cache   string // for packages; may be emptied at any time
	Log     *slog.Logger
}

// Builder builds base images.
type Builder struct {
	Config
	building chan struct{} // holds a token while one image is built
}

// New returns a builder.
func New(c Config) *Builder { return &Builder{c, make(chan struct{}, 1)} }

// Options of one build.
type Options struct {
	Mirror string // default: debian.DefaultMirror
}

// Build makes the base with that name for the host's architecture and returns the descriptor of its manifest. The same packages
// give the same digests. progress, which may be nil, gets the lines of the tools that are run.
func (b *Builder) Build(ctx context.Context, name string, o Options, progress func(line string)) (ocispec.Descriptor, error) {
	base, err := Find(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	select {
	case b.building <- struct{}{}:
		defer func() { <-b.building }()
	case <-ctx.Done():
		return ocispec.Descriptor{}, fmt.Errorf("waiting for another base to be built: %w", context.Cause(ctx))
	}
	if progress == nil {
		progress = func(string) {}
	}
	d, err := b.build(ctx, base, o, progress)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("building base %s: %w", base.Name, err)
	}
	return d, nil
}

func (b *Builder) build(ctx context.Context, base Base, o Options, progress func(string)) (ocispec.Descriptor, error) {
	suites, err := debian.Suites(o.Mirror, base.suite, b.Cache, b.Log)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	release, err := suites[0].Release(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	in := inputs{suites, suites[0].Mirror, release.Date, progress}
	layer, diffID, err := b.writeLayer(ctx, base.Name, func(w io.Writer) error { return base.write(b, ctx, base, in, w) })
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := b.writeJSON(ctx, ocispec.MediaTypeImageConfig, ocispec.Image{
		Created:  &in.epoch,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: ocispec.ImageConfig{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{base.cmd},
		},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
		History: []ocispec.History{{Created: &in.epoch, CreatedBy: "atoll base build " + base.Name, Comment: fmt.Sprintf("Debian %s (%s) from %s", release.Version, base.suite, in.mirror)}},
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	manifest, err := b.writeJSON(ctx, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	manifest.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	return manifest, nil
}

// writeLayer stores as a zstd layer what write writes, packing and hashing on the way: the file system lies nowhere twice.
func (b *Builder) writeLayer(ctx context.Context, name string, write func(io.Writer) error) (ocispec.Descriptor, digest.Digest, error) {
	ref := "base-layer-" + digest.FromString(name).Encoded()[:16]
	if err := b.Content.Abort(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return ocispec.Descriptor{}, "", fmt.Errorf("dropping an interrupted layer: %w", err)
	}
	blob, err := content.OpenWriter(ctx, b.Content, content.WithRef(ref))
	if err != nil {
		return ocispec.Descriptor{}, "", fmt.Errorf("storing the layer: %w", err)
	}
	defer blob.Close()
	packed := &counter{w: blob}
	zw, err := zstd.NewWriter(packed)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	defer zw.Close()
	diff := digest.Canonical.Digester()
	if err := write(io.MultiWriter(zw, diff.Hash())); err != nil {
		zw.Close()
		return ocispec.Descriptor{}, "", withAbort(ctx, b.Content, blob, ref, err)
	}
	if err := zw.Close(); err != nil {
		return ocispec.Descriptor{}, "", withAbort(ctx, b.Content, blob, ref, fmt.Errorf("storing the layer: %w", err))
	}
	sum := blob.Digest()
	if err := blob.Commit(ctx, packed.n, sum); err != nil && !errdefs.IsAlreadyExists(err) {
		return ocispec.Descriptor{}, "", fmt.Errorf("storing the layer: %w", err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: sum, Size: packed.n}, diff.Digest(), nil
}

// withAbort drops the half-written layer at once: nothing will ask for it again.
func withAbort(ctx context.Context, store content.Store, blob content.Writer, ref string, err error) error {
	blob.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if abortErr := store.Abort(ctx, ref); abortErr != nil && !errdefs.IsNotFound(abortErr) {
		return fmt.Errorf("%w (and dropping the layer: %w)", err, abortErr)
	}
	return err
}

func (b *Builder) writeJSON(ctx context.Context, mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(ctx, b.Content, "base-"+d.Digest.Encoded(), bytes.NewReader(data), d); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("storing %s: %w", mediaType, err)
	}
	return d, nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
