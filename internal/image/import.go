package image

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/compression"
	"github.com/atollvm/atoll/internal/hint"
)

// ImportOptions are what an import may be told.
type ImportOptions struct {
	Reference string // default: none
	Platform  string // os/arch[/variant]; default: linux on the host's architecture
	Message   string // a comment, for the history
	Config    dockerspec.DockerOCIImageConfig
	Created   time.Time
}

// Import makes an image of one layer of the tar archive of a root file system, also a compressed one.
func (s *Store) Import(ctx context.Context, r io.Reader, o ImportOptions) (Image, error) {
	release := s.Hold()
	defer release()
	img, err := s.importLayer(ctx, r, o)
	if err != nil {
		_ = s.sweep(context.WithoutCancel(ctx)) // the failure matters more
		return Image{}, fmt.Errorf("importing a root file system: %w", err)
	}
	return img, nil
}

func (s *Store) importLayer(ctx context.Context, r io.Reader, o ImportOptions) (Image, error) {
	platform, err := parsePlatform(cmp.Or(o.Platform, "linux/"+runtime.GOARCH))
	if err != nil {
		return Image{}, err
	}
	if o.Reference != "" {
		if _, err := parseTag(o.Reference); err != nil {
			return Image{}, err
		}
	}
	layer, err := s.ingestLayer(ctx, r)
	if err != nil {
		return Image{}, err
	}
	var diff digest.Digest
	if layer.MediaType, diff, err = s.layerOf(ctx, layer, checkTar); err != nil {
		return Image{}, err
	}
	config := dockerspec.DockerOCIImage{
		Image: ocispec.Image{
			Created: &o.Created, Platform: platform,
			RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diff}},
			History: []ocispec.History{{Created: &o.Created, Comment: cmp.Or(o.Message, "imported by atoll")}},
		},
		Config: o.Config,
	}
	data, err := json.Marshal(config)
	if err != nil {
		return Image{}, err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(data), Size: int64(len(data))},
		Layers: []ocispec.Descriptor{layer},
	}
	if err := s.writeBlob(ctx, m.Config, data); err != nil {
		return Image{}, err
	}
	if data, err = json.Marshal(m); err != nil {
		return Image{}, err
	}
	desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := s.writeBlob(ctx, desc, data); err != nil {
		return Image{}, err
	}
	img, err := s.put(ctx, o.Reference, desc)
	if err == nil {
		s.publish("import", img.Digest, "")
	}
	return img, err
}

// ingestLayer stores gzip and zstd as they come, and all else as gzip, which everybody reads.
func (s *Store) ingestLayer(ctx context.Context, r io.Reader) (ocispec.Descriptor, error) {
	plain, kind, raw, err := sniff(r)
	if err != nil {
		return ocispec.Descriptor{}, badArchive(err)
	}
	if _, ok := layerTypes[kind]; ok && kind != compression.None {
		return s.ingest(ctx, "import", raw, "")
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		z, err := gzip.NewWriterLevel(pw, gzip.BestSpeed)
		if err == nil {
			_, err = io.Copy(z, plain)
			err = errors.Join(err, z.Close())
		}
		pw.CloseWithError(err)
	}()
	desc, err := s.ingest(ctx, "import", pr, "")
	pr.CloseWithError(errors.Join(err, io.ErrClosedPipe))
	<-done
	return desc, err
}

// checkTar reads an archive to its end.
func checkTar(r io.Reader) error {
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		_, err := tr.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return hint.With(fmt.Errorf("the archive is empty: %w", errdefs.ErrInvalidArgument), "give the tar archive of a root file system")
		}
		if err != nil {
			return err
		}
	}
}
