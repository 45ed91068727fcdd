//go:build linux

package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/atollvm/atoll/internal/server"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The root disks of an image in a registry are an artifact that refers to it: its config is the list of the disks, and each disk's file
// system, compressed, is a blob. The hash trees are made anew and must have the root hashes of the list.
const (
	diskMeta = "application/vnd.atoll.rootdisk.config.v1+json"
	diskBlob = "application/vnd.atoll.rootdisk.v1.erofs+zstd"
)

// Attach makes the image's root disks an artifact that refers to it.
func (d *disksOf) Attach(ctx context.Context, img digest.Digest) error {
	release := d.s.images.Hold()
	defer release()
	there, err := d.s.images.Referrers(ctx, img, server.RootDiskArtifact)
	if err != nil || len(there) > 0 {
		return err
	}
	root, err := d.Make(ctx, img, nil)
	if err != nil {
		return err
	}
	a := image.Artifact{Type: server.RootDiskArtifact, ConfigType: diskMeta}
	if a.Config, err = json.Marshal(root.Disks); err != nil {
		return err
	}
	for _, disk := range root.Disks {
		blob, err := d.addDisk(ctx, disk)
		if err != nil {
			return fmt.Errorf("packing root disk %s: %w", disk.Path, err)
		}
		a.Blobs = append(a.Blobs, blob)
	}
	_, err = d.s.images.Attach(ctx, img, a)
	return err
}

func (d *disksOf) addDisk(ctx context.Context, disk rootdisk.Disk) (ocispec.Descriptor, error) {
	f, err := os.Open(disk.Path)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer f.Close()
	packed, in := io.Pipe()
	defer packed.Close()
	go func() { // ends with the disk, or when packed is closed
		z, err := zstd.NewWriter(in, zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err == nil {
			_, err = io.Copy(z, io.LimitReader(f, disk.Size))
		}
		if err == nil {
			err = z.Close()
		}
		in.CloseWithError(err)
	}()
	blob, err := d.s.images.AddBlob(ctx, packed)
	blob.MediaType = diskBlob
	return blob, err
}

// Adopt takes the root disks that came with an image, where any did.
func (d *disksOf) Adopt(ctx context.Context, img digest.Digest) error {
	release := d.s.images.Hold()
	defer release()
	came, err := d.s.images.Referrers(ctx, img, server.RootDiskArtifact)
	if err != nil || len(came) == 0 {
		return err
	}
	a, err := d.s.images.ArtifactOf(ctx, came[0])
	if err != nil {
		return err
	}
	var disks []rootdisk.Disk
	if err := json.Unmarshal(a.Config, &disks); err != nil || len(disks) != len(a.Blobs) {
		return fmt.Errorf("root disks %s: their list is damaged: %w", came[0].Digest, errdefs.ErrInvalidArgument)
	}
	_, err = d.s.disks.Adopt(ctx, img, disks, func(i int) (io.ReadCloser, error) {
		blob, err := d.s.images.Blob(ctx, a.Blobs[i])
		if err != nil {
			return nil, err
		}
		z, err := zstd.NewReader(blob, zstd.WithDecoderMaxMemory(64<<20))
		if err != nil {
			blob.Close()
			return nil, err
		}
		return unpacked{z.IOReadCloser(), blob}, nil
	})
	return err
}

// unpacked closes both ends.
type unpacked struct {
	io.ReadCloser
	packed io.Closer
}

func (u unpacked) Close() error {
	_ = u.ReadCloser.Close() // a decoder's Close has nothing to say
	return u.packed.Close()
}
