package rootdisk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// The hash tree is dm-verity's version 1 without a superblock, the levels one behind the other, the top one first;
// Documentation/admin-guide/device-mapper/verity.rst.
const (
	hashSize      = sha256.Size
	hashesPerNode = blockSize / hashSize
	hashShare     = 8 // blocks of hashes that one goroutine makes at a time: 4 MiB of data
)

// Verity is the dm-verity hash tree of a disk, which lies behind the file system in the same file.
type Verity struct {
	RootHash   string `json:"rootHash"` // hex
	Salt       string `json:"salt"`     // hex
	DataBlocks int64  `json:"dataBlocks"`
}

// levels returns how many blocks each level of the tree has, from the data up.
func levels(dataBlocks int64) (levels []int64) {
	for n := dataBlocks; n > 1; {
		n = (n + hashesPerNode - 1) / hashesPerNode
		levels = append(levels, n)
	}
	return levels
}

func treeSize(dataBlocks int64) (size int64) {
	for _, n := range levels(dataBlocks) {
		size += n * blockSize
	}
	return size
}

// hashTree computes a hash tree: each level is handed to write when it is there, at its offset within the tree.
func hashTree(ctx context.Context, data io.ReaderAt, dataBlocks int64, salt []byte, write func(level []byte, off int64) error) (root []byte, err error) {
	off := treeSize(dataBlocks)
	src, blocks := data, dataBlocks
	for _, n := range levels(dataBlocks) {
		level := make([]byte, n*blockSize)
		if err := hashLevel(ctx, src, blocks, level, salt); err != nil {
			return nil, err
		}
		off -= n * blockSize
		if err := write(level, off); err != nil {
			return nil, err
		}
		src, blocks = bytes.NewReader(level), n
	}
	top := make([]byte, blockSize)
	if err := readFullAt(src, top, 0); err != nil {
		return nil, err
	}
	return hashBlock(nil, salt, top), nil
}

// writeTree writes the hash tree for the size bytes of data at an offset of out and returns the root hash.
func writeTree(ctx context.Context, data io.ReaderAt, size int64, out io.WriterAt, at int64, salt []byte) ([]byte, error) {
	return hashTree(ctx, data, size/blockSize, salt, func(level []byte, off int64) error {
		_, err := out.WriteAt(level, at+off)
		return err
	})
}

// Mismatch is where a disk is not what its root hash says.
type Mismatch struct {
	Path  string
	Block int64 // of the file, 4096 bytes each; -1: the root hash itself is another
	Tree  bool  // the block belongs to the hash tree
}

func (m *Mismatch) Error() string {
	switch {
	case m.Block < 0:
		return fmt.Sprintf("root disk %s does not verify: it has another root hash", m.Path)
	case m.Tree:
		return fmt.Sprintf("root disk %s does not verify: block %d, in its hash tree", m.Path, m.Block)
	}
	return fmt.Sprintf("root disk %s does not verify: block %d", m.Path, m.Block)
}

// Unwrap gives the class of the error.
func (m *Mismatch) Unwrap() error { return errdefs.ErrDataLoss }

// Verify reads a whole disk and compares it with its root hash. A *Mismatch says where it differs.
func (d Disk) Verify(ctx context.Context) error {
	f, err := os.Open(d.Path)
	if err != nil {
		return fmt.Errorf("verifying a root disk: %w", err)
	}
	defer f.Close()
	salt, err := hex.DecodeString(d.Verity.Salt)
	if err != nil {
		return fmt.Errorf("verifying root disk %s: its salt: %w: %w", d.Path, err, errdefs.ErrDataLoss)
	}
	// The tree on the disk is compared with the right one, level by level from the data up: the first difference is a damaged block
	// of data, or of the tree when the root hash turns out right.
	var data, tree int64 = -1, -1
	first := true
	root, err := hashTree(ctx, f, d.Verity.DataBlocks, salt, func(level []byte, off int64) error {
		stored := make([]byte, len(level))
		if err := readFullAt(f, stored, d.Size+off); err != nil {
			return err
		}
		if i := firstDifference(level, stored); i >= 0 {
			if first && data < 0 {
				data = int64(i / hashSize)
			}
			if tree < 0 {
				tree = (d.Size + off + int64(i)) / blockSize
			}
		}
		first = false
		return nil
	})
	if err != nil {
		return fmt.Errorf("verifying root disk %s: %w", d.Path, err)
	}
	switch same := hex.EncodeToString(root) == d.Verity.RootHash; {
	case same && tree < 0:
		return nil
	case same:
		return &Mismatch{d.Path, tree, true}
	default:
		return &Mismatch{d.Path, data, false}
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// hashLevel fills out with the hashes of n blocks of src.
func hashLevel(ctx context.Context, src io.ReaderAt, n int64, out, salt []byte) error {
	const share = hashShare * hashesPerNode // blocks
	g, ctx := errgroup.WithContext(ctx)
	workers := int64(runtime.GOMAXPROCS(0))
	for w := range min(workers, n/share+1) {
		g.Go(func() error {
			in := make([]byte, 64*blockSize)
			for first := w * share; first < n; first += workers * share {
				if err := ctx.Err(); err != nil {
					return err
				}
				for k := first; k < min(first+share, n); k += 64 {
					piece := in[:min(64, min(first+share, n)-k)*blockSize]
					if err := readFullAt(src, piece, k*blockSize); err != nil {
						return err
					}
					hashes := out[k*hashSize : k*hashSize]
					for ; len(piece) > 0; piece = piece[blockSize:] {
						hashes = hashBlock(hashes, salt, piece[:blockSize])
					}
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func hashBlock(to, salt, block []byte) []byte {
	h := sha256.New()
	h.Write(salt)
	h.Write(block)
	return h.Sum(to)
}

func readFullAt(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	return noEOF(err)
}
