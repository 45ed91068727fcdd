package rootdisk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Adopt takes root disks that another host has made of an image, the lowest first, unless the image has some. open gives a disk's file
// system, without its hash tree. Each must have the root hash that its description says. That they hold the image's layers is the word of
// whoever made them, so they are this image's alone: no other image shares them.
func (s *Store) Adopt(ctx context.Context, img digest.Digest, disks []Disk, open func(i int) (io.ReadCloser, error)) (Root, error) {
	r, err := s.adopt(ctx, img, disks, open)
	if err != nil {
		return Root{}, fmt.Errorf("taking the root disks of image %s from elsewhere: %w", img, err)
	}
	return r, nil
}

func (s *Store) adopt(ctx context.Context, img digest.Digest, disks []Disk, open func(i int) (io.ReadCloser, error)) (_ Root, err error) {
	if err := checkForeign(img, disks); err != nil {
		return Root{}, err
	}
	unlock, err := s.lock(ctx, img.String())
	if err != nil {
		return Root{}, err
	}
	defer unlock()
	if r, err := s.Get(img); !errdefs.IsNotFound(err) {
		return r, err
	}
	root, rec := Root{ImageDigest: img}, record{ImageDigest: img}
	var files []*os.File // locked against sweep until the record is there
	defer func() {
		for _, f := range files {
			f.Close()
		}
		if err != nil {
			if err := s.sweep(); err != nil {
				s.log.Error("removing what was half taken", "image", img, "err", err)
			}
		}
	}()
	for i, d := range disks {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s", img, i, d.Verity.RootHash))
		d.Key = "adopted-" + hex.EncodeToString(sum[:])
		d.Path = s.diskPath(d.Key)
		f, err := s.write(d.Path, func(f *os.File) (string, error) {
			return d.Path, receive(ctx, f, d, func() (io.ReadCloser, error) { return open(i) })
		})
		if err != nil {
			return Root{}, err
		}
		files = append(files, f)
		if err := s.writeJSON(s.diskRecord(d.Key), d); err != nil {
			return Root{}, err
		}
		root.Disks, rec.Disks = append(root.Disks, d), append(rec.Disks, d.Key)
	}
	return root, s.writeJSON(s.imageRecord(img), rec)
}

// checkForeign looks at what a stranger has written of disks.
func checkForeign(img digest.Digest, disks []Disk) error {
	if err := img.Validate(); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(disks) == 0 || len(disks) > maxDisks {
		return fmt.Errorf("%d disks, there must be 1 to %d: %w", len(disks), maxDisks, errdefs.ErrInvalidArgument)
	}
	for i, d := range disks {
		salt, saltErr := hex.DecodeString(d.Verity.Salt)
		hash, hashErr := hex.DecodeString(d.Verity.RootHash)
		switch {
		case d.Size <= 0 || d.Size > maxData || d.Size%blockSize != 0 || d.Verity.DataBlocks != d.Size/blockSize:
			return fmt.Errorf("disk %d of %d bytes and %d blocks: %w", i, d.Size, d.Verity.DataBlocks, errdefs.ErrInvalidArgument)
		case saltErr != nil || hashErr != nil || len(hash) != sha256.Size || len(salt) > 256:
			return fmt.Errorf("disk %d: root hash %.80q, salt %.80q: %w", i, d.Verity.RootHash, d.Verity.Salt, errdefs.ErrInvalidArgument)
		case i > 0 && d.HidesBelow:
			return fmt.Errorf("disk %d hides those below it, which then have no place: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// receive writes a disk and its hash tree, and compares the root hash.
func receive(ctx context.Context, f *os.File, d Disk, open func() (io.ReadCloser, error)) error {
	from, err := open()
	if err != nil {
		return err
	}
	defer from.Close()
	n, err := io.Copy(f, io.LimitReader(from, d.Size+1))
	if err != nil {
		return err
	}
	if n != d.Size {
		return fmt.Errorf("a disk of %d bytes has another length: %w", d.Size, errdefs.ErrDataLoss)
	}
	salt, err := hex.DecodeString(d.Verity.Salt)
	if err != nil {
		return err
	}
	root, err := writeTree(ctx, f, d.Size, f, d.Size, salt)
	if err != nil {
		return err
	}
	if got := hex.EncodeToString(root); got != d.Verity.RootHash {
		return fmt.Errorf("it has the root hash %s, its description says %s: %w", got, d.Verity.RootHash, errdefs.ErrDataLoss)
	}
	return ctx.Err()
}
