package rootdisk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"
)

// Root is the root of an image: read-only disks that overlayfs joins, the lowest first.
type Root struct {
	ImageDigest digest.Digest
	Disks       []Disk
}

// Size is the bytes of all its file systems; images may share them.
func (r Root) Size() (n int64) {
	for _, d := range r.Disks {
		n += d.Size
	}
	return n
}

// Disk is a finished disk of an image's root: neighbouring layers as one EROFS file system, behind it its dm-verity hash tree. Its file
// never changes; a machine that has it open keeps it when it is removed.
type Disk struct {
	Key     string          `json:"key"`
	Path    string          `json:"-"`
	Size    int64           `json:"size"`   // of the file system
	Layers  []digest.Digest `json:"layers"` // bottom first
	Entries int             `json:"entries"`
	Verity  Verity          `json:"verity"`
	// HasRoot: its layers say what the root directory is like.
	HasRoot bool `json:"hasRoot"`
	// HidesBelow: its root directory is opaque, so disks below it are left out.
	HidesBelow bool `json:"hidesBelow,omitempty"`
}

// FileSize is the length of the disk's file.
func (d Disk) FileSize() int64 { return d.Size + treeSize(d.Verity.DataBlocks) }

// made is what build says of a disk.
type made struct {
	size    int64
	entries int
	leans   bool // it took something from below
	hasRoot bool
	hides   bool
}

// build writes the file system of neighbouring layers, bottom first. below gives the disks under them; it is nil at the bottom.
func build(ctx context.Context, f *os.File, id [16]byte, layers []Layer, below func() (stack, error), progress func(int)) (made, error) {
	fs := newErofs(f)
	defer fs.out.stop()
	flat := newFlattener(fs, below, progress)
	if err := flat.flatten(ctx, layers); err != nil {
		return made{}, err
	}
	m := made{leans: flat.leans, hasRoot: flat.hasRoot || below == nil, hides: flat.root.cut != noCut && below != nil}
	var err error
	m.size, m.entries, err = fs.finish(flat.root, id)
	return m, err
}

// WriteFlat writes all layers of an image, bottom first, as one EROFS file system to f, an empty file. The same layers give the same
// bytes. progress, which may be nil, hears how many stored bytes of the layers have been read.
func WriteFlat(ctx context.Context, f *os.File, layers []Layer, progress func(done int64)) error {
	k := key(layers, run{0, len(layers)}, false)
	if _, err := build(ctx, f, uuid(seed(k, "uuid")), layers, nil, adder(progress)); err != nil {
		return fmt.Errorf("writing a root disk: %w", explain(f.Name(), err))
	}
	return nil
}

// seed derives identifiers from the disk's key, so that making it again gives the same bytes.
func seed(key, what string) [32]byte {
	return sha256.Sum256([]byte("atoll root disk " + what + " " + key))
}

// uuid makes a version 8 UUID: 122 bits of our own choice.
func uuid(seed [32]byte) (u [16]byte) {
	copy(u[:], seed[:])
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

// seal appends the hash tree to a file that holds a file system of that size.
func seal(ctx context.Context, f *os.File, size int64, key string) (Verity, error) {
	salt := seed(key, "salt")
	root, err := writeTree(ctx, f, size, f, size, salt[:])
	if err != nil {
		return Verity{}, err
	}
	return Verity{RootHash: hex.EncodeToString(root), Salt: hex.EncodeToString(salt[:]), DataBlocks: size / blockSize}, nil
}
