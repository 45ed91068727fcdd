package rootdisk

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"os"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// The hash device is laid out as veritysetup's "superblock format 1": the superblock in block 0, then the levels of the tree,
// the top one first; https://gitlab.com/cryptsetup/cryptsetup/-/wikis/DMVerity.
const (
	hashSize      = sha256.Size
	hashesPerNode = blockSize / hashSize
	hashShare     = 8 // blocks of hashes that one goroutine makes at a time: 4 MiB of data
)

// Verity is the dm-verity hash tree of a disk.
type Verity struct {
	Path       string `json:"path"`
	RootHash   string `json:"rootHash"` // hex
	Salt       string `json:"salt"`     // hex
	DataBlocks int64  `json:"dataBlocks"`
}

// writeVerity writes the hash device for the size bytes of data and returns the root hash.
func writeVerity(ctx context.Context, data io.ReaderAt, size int64, out *os.File, salt, uuid []byte) ([]byte, error) {
	dataBlocks := size / blockSize
	var levels []int64 // blocks of each, from the data up
	for n := dataBlocks; n > 1; {
		n = (n + hashesPerNode - 1) / hashesPerNode
		levels = append(levels, n)
	}
	var sb [blockSize]byte
	copy(sb[0:], "verity\x00\x00")
	le := binary.LittleEndian
	le.PutUint32(sb[8:], 1)  // version
	le.PutUint32(sb[12:], 1) // hash type: not Chrome OS's
	copy(sb[16:32], uuid)
	copy(sb[32:64], "sha256")
	le.PutUint32(sb[64:], blockSize)
	le.PutUint32(sb[68:], blockSize)
	le.PutUint64(sb[72:], uint64(dataBlocks))
	le.PutUint16(sb[80:], uint16(len(salt)))
	copy(sb[88:344], salt)
	if _, err := out.WriteAt(sb[:], 0); err != nil {
		return nil, err
	}
	// Where each level begins, counted from the bottom although the top lies first.
	starts, next := make([]int64, len(levels)), int64(1)
	for i := len(levels) - 1; i >= 0; i-- {
		starts[i] = next * blockSize
		next += levels[i]
	}
	src, srcStart, srcBlocks := data, int64(0), dataBlocks
	for i, n := range levels {
		if err := hashLevel(ctx, src, srcStart, srcBlocks, out, starts[i], salt); err != nil {
			return nil, err
		}
		src, srcStart, srcBlocks = out, starts[i], n
	}
	top := make([]byte, blockSize)
	if err := readFullAt(src, top, srcStart); err != nil {
		return nil, err
	}
	return hashBlock(nil, salt, top), nil
}

// hashLevel writes the hashes of n blocks of src as blocks of the level above.
func hashLevel(ctx context.Context, src io.ReaderAt, srcStart, n int64, out io.WriterAt, outStart int64, salt []byte) error {
	const share = hashShare * hashesPerNode // blocks read at a time
	g, ctx := errgroup.WithContext(ctx)
	workers := int64(runtime.GOMAXPROCS(0))
	for w := range workers {
		g.Go(func() error {
			in := make([]byte, 64*blockSize)
			hashes := make([]byte, 0, hashShare*blockSize)
			for first := w * share; first < n; first += workers * share {
				if err := ctx.Err(); err != nil {
					return err
				}
				hashes = hashes[:0]
				end := min(first+share, n)
				for k := first; k < end; k += 64 {
					piece := in[:min(64, end-k)*blockSize]
					if err := readFullAt(src, piece, srcStart+k*blockSize); err != nil {
						return err
					}
					for ; len(piece) > 0; piece = piece[blockSize:] {
						hashes = hashBlock(hashes, salt, piece[:blockSize])
					}
				}
				hashes = append(hashes, make([]byte, -len(hashes)&(blockSize-1))...)
				if _, err := out.WriteAt(hashes, outStart+first/hashesPerNode*blockSize); err != nil {
					return err
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
