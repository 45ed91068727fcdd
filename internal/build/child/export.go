//go:build linux

package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExporterName is the exporter that puts the built image into the image store.
const ExporterName = "atoll"

// DescriptorKey is the exporter's answer: the manifest's descriptor as JSON.
const DescriptorKey = "atoll.manifest"

// imageExporter writes an image into BuildKit's content and links its blobs into the image store's.
type imageExporter struct {
	writer *containerimage.ImageWriter
	leases leases.Manager
	from   string // root of BuildKit's content
	to     string // root of the image store's content
}

func (e *imageExporter) Resolve(_ context.Context, id int, attrs map[string]string) (exporter.ExporterInstance, error) {
	return &export{imageExporter: e, id: id, attrs: attrs}, nil
}

type export struct {
	*imageExporter
	id    int
	attrs map[string]string
}

// layerConfig asks for fast zstd in new layers. Those of the base stay as they are, so that images share them.
func layerConfig() cacheconfig.RefConfig {
	return cacheconfig.RefConfig{Compression: compression.New(compression.Zstd).SetLevel(1)}
}

func (e *export) ID() int                  { return e.id }
func (e *export) Name() string             { return "exporting to image" }
func (e *export) Type() string             { return ExporterName }
func (e *export) Attrs() map[string]string { return e.attrs }
func (e *export) Config() *exporter.Config {
	return exporter.NewConfigWithCompression(layerConfig().Compression)
}

func (e *export) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (_ map[string]string, _ exporter.FinalizeFunc, _ exporter.DescriptorReference, err error) {
	// The lease keeps garbage collection away until everything is linked.
	ctx, done, err := leaseutil.WithLease(ctx, e.leases, leaseutil.MakeTemporary)
	if err != nil {
		return nil, nil, nil, err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()

	opts := containerimage.ImageCommitOpts{RefCfg: layerConfig()}
	opts.SetOCITypesDefault(true)
	desc, err := e.writer.Commit(ctx, src, info.SessionID, info.InlineCache, &opts, info.CompatibilityVersion, e.Type())
	if err != nil {
		return nil, nil, nil, err
	}
	config, err := e.transfer(ctx, src, info.SessionID, *desc)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("storing the image in %s: %w", e.to, err)
	}
	// BuildKit's annotations on the descriptor are notes to its own exporters.
	manifest, err := json.Marshal(ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size})
	if err != nil {
		return nil, nil, nil, err
	}
	return map[string]string{
		DescriptorKey:                         string(manifest),
		exptypes.ExporterImageDigestKey:       desc.Digest.String(),
		exptypes.ExporterImageConfigDigestKey: config.String(),
	}, nil, nil, nil
}

// transfer puts the image into the image store, the manifest last: whoever sees it finds the rest. It returns the config's digest.
func (e *export) transfer(ctx context.Context, src *exporter.Source, sessionID string, desc ocispec.Descriptor) (digest.Digest, error) {
	raw, err := content.ReadBlob(ctx, e.writer.ContentStore(), desc)
	if err != nil {
		return "", err
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(raw, &manifest); err != nil {
		return "", err
	}
	if manifest.MediaType != ocispec.MediaTypeImageManifest {
		return "", fmt.Errorf("the build made a %s instead of one image", manifest.MediaType)
	}
	missing := make([]digest.Digest, 0, len(manifest.Layers)+2)
	for _, layer := range manifest.Layers {
		if _, err := os.Stat(blobPath(e.to, layer.Digest)); err != nil {
			missing = append(missing, layer.Digest)
		}
	}
	if len(missing) > 0 {
		if err := e.unlazy(ctx, src, sessionID); err != nil {
			return "", err
		}
	}
	for _, d := range append(missing, manifest.Config.Digest, desc.Digest) {
		if err := link(blobPath(e.from, d), blobPath(e.to, d)); err != nil {
			return "", err
		}
	}
	return manifest.Config.Digest, nil
}

// unlazy fetches the layers of the base that no step has needed so far.
func (e *export) unlazy(ctx context.Context, src *exporter.Source, sessionID string) error {
	var refs []cache.ImmutableRef
	if src.Ref != nil {
		refs = append(refs, src.Ref)
	}
	for _, ref := range src.Refs {
		if ref != nil {
			refs = append(refs, ref)
		}
	}
	for _, ref := range refs {
		remotes, err := ref.GetRemotes(ctx, false, layerConfig(), false, session.NewGroup(sessionID))
		if err != nil {
			return err
		}
		if u, ok := remotes[0].Provider.(cache.Unlazier); ok {
			if err := u.Unlazy(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// blobPath is where containerd's local content store keeps a blob.
func blobPath(root string, d digest.Digest) string {
	return filepath.Join(root, "blobs", d.Algorithm().String(), d.Encoded())
}

// link gives a finished blob a second name, or copies it where the two stores are on different file systems. Either way it appears
// whole or not at all.
func link(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	err := os.Link(from, to)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return copyFile(from, to)
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(to), ".build-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(out.Name())
		}
	}()
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Chmod(0o444), out.Sync(), out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), to)
}
