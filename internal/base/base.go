// Package base makes base images from distributions' own signed packages, so that FROM works without any registry: Debian and Ubuntu by
// mmdebstrap, Alpine by reading its packages, a busybox from one package; Red Hat's UBI comes from its registry. It writes OCI content and
// names nothing: the caller tags what it gets, and keeps it from being collected until then.
// A Builder may be used from several goroutines; it builds one image at a time.
package base

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"runtime"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
)

// Base is an image that can be built here.
type Base struct {
	Name        string
	Aliases     []string
	Description string

	family  family
	release string // in the distribution's own words: bookworm, v3.22
	slim    bool   // without documentation
	init    bool   // boots with an init as PID 1
}

// family is the bases of one distribution.
type family interface {
	// plan checks the options and finds the archive; nothing is made yet.
	plan(ctx context.Context, b *Builder, base Base, o Options, progress func(string)) (*plan, error)
}

// plan is how one image is made: by writing its one layer, or, where manifest is set, elsewhere already.
type plan struct {
	origin string    // for the image's history
	epoch  time.Time // the date of the image, and of all in it that has none of its own
	config ocispec.ImageConfig
	write  func(ctx context.Context, layer io.Writer) error

	manifest *ocispec.Descriptor
}

// Config is what a builder works with. All must be set.
type Config struct {
	Content content.Store
	TempDir string // for file systems in the making; nobody else's
	Cache   string // for packages; may be emptied at any time
	Log     *slog.Logger
	// Pull brings an image from a registry and returns its manifest for the host's architecture.
	Pull func(ctx context.Context, reference string, progress func(line string)) (ocispec.Descriptor, error)
}

// Builder builds base images.
type Builder struct {
	Config
	building chan struct{} // holds a token while one image is built
}

// New returns a builder.
func New(c Config) *Builder { return &Builder{c, make(chan struct{}, 1)} }

// Options of one build. The zero value is the distribution's packages of today.
type Options struct {
	Mirror   string
	Keyring  []byte   // instead of the distribution's keys
	Packages []string // beside the base's own
	Snapshot string   // the archive as it was, by a date
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
	if err := checkPackages(o.Packages); err != nil {
		return ocispec.Descriptor{}, err
	}
	p, err := base.family.plan(ctx, b, base, o, progress)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if p.manifest != nil {
		return *p.manifest, nil
	}
	layer, diffID, err := b.writeLayer(ctx, base.Name, func(w io.Writer) error { return p.write(ctx, w) })
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := b.writeJSON(ctx, ocispec.MediaTypeImageConfig, ocispec.Image{
		Created:  &p.epoch,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   p.config,
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
		History:  []ocispec.History{{Created: &p.epoch, CreatedBy: "atoll base build " + base.Name, Comment: p.origin}},
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

// packageForm is a name in Debian's and Alpine's archives, which so is no option of any tool.
var packageForm = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9+._-]*$`)

func checkPackages(names []string) error {
	var faults []error
	for _, n := range names {
		if !packageForm.MatchString(n) {
			faults = append(faults, hint.With(fmt.Errorf("package name %q: %w", n, errdefs.ErrInvalidArgument), "give names as the distribution has them, one per --package"))
		}
	}
	return errors.Join(faults...)
}

// noSuchPackages is the error for packages that the archive does not have.
func noSuchPackages(names, where string) error {
	return hint.With(fmt.Errorf("%s has no package %s: %w", where, names, errdefs.ErrNotFound), "check the name with the distribution's package search")
}

// imageConfig is what the images have in common.
func imageConfig(base Base, command string) ocispec.ImageConfig {
	c := ocispec.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{command}}
	if base.init {
		c.Cmd = []string{"/sbin/init"}
	}
	return c
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
