package rootdisk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestVerity(t *testing.T) {
	random := make([]byte, 70<<20) // three levels, more than one share of work
	rand.NewChaCha8([32]byte{}).Read(random)
	d := ensure(t, openStore(t), tarball(t, file("a", string(random))))
	if err := d.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(data)) != d.FileSize() {
		t.Fatalf("%d bytes, want %d", len(data), d.FileSize())
	}
	// The root hash is what ties the disk to the tree, so compute it once more, in the simplest way.
	salt, _ := hex.DecodeString(d.Verity.Salt)
	if root := plainRoot(data[:d.Size], salt); root != d.Verity.RootHash {
		t.Errorf("root hash %s, want %s", d.Verity.RootHash, root)
	}
	for name, tt := range map[string]struct {
		at   int64
		want Mismatch
	}{
		"superblock":   {1024 + 20, Mismatch{Block: 0}},
		"data":         {d.Size/2 + 7, Mismatch{Block: (d.Size/2 + 7) / blockSize}},
		"last block":   {d.Size - 1, Mismatch{Block: d.Size/blockSize - 1}},
		"top of tree":  {d.Size, Mismatch{Block: d.Size / blockSize, Tree: true}},
		"leaf of tree": {d.FileSize() - 5000, Mismatch{Block: (d.FileSize() - 5000) / blockSize, Tree: true}},
	} {
		t.Run(name, func(t *testing.T) {
			flipped := d
			flipped.Path = filepath.Join(t.TempDir(), "flipped")
			data[tt.at] ^= 1
			err := os.WriteFile(flipped.Path, data, 0o600)
			data[tt.at] ^= 1
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Path = flipped.Path
			err = flipped.Verify(t.Context())
			if m := (*Mismatch)(nil); !errors.As(err, &m) || *m != tt.want || !errdefs.IsDataLoss(err) {
				t.Errorf("got %v, want %v", err, &tt.want)
			}
		})
	}
	another := d
	another.Verity.RootHash = hex.EncodeToString(make([]byte, hashSize))
	if err := another.Verify(t.Context()); !errdefs.IsDataLoss(err) {
		t.Errorf("with another root hash: %v", err)
	}
	if err := os.Truncate(d.Path, d.Size); err != nil {
		t.Fatal(err)
	}
	if err := d.Verify(t.Context()); err == nil {
		t.Error("without its tree it verifies")
	}
	if _, err := exec.LookPath("veritysetup"); err != nil {
		t.Skip("veritysetup is not installed (apt-get install cryptsetup-bin): only our own computation was compared")
	}
	path := filepath.Join(t.TempDir(), "disk")
	verify := func(root string) ([]byte, error) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return exec.Command("veritysetup", "verify", path, path, root, "--no-superblock", "--hash-offset", fmt.Sprint(d.Size),
			"--data-blocks", fmt.Sprint(d.Verity.DataBlocks), "--salt", d.Verity.Salt).CombinedOutput()
	}
	if out, err := verify(d.Verity.RootHash); err != nil {
		t.Errorf("veritysetup verify: %v\n%s", err, out)
	}
	data[len(data)/2] ^= 1
	if out, err := verify(d.Verity.RootHash); err == nil {
		t.Errorf("veritysetup does not see the flipped bit\n%s", out)
	}
}

func plainRoot(data, salt []byte) string {
	for len(data) > blockSize {
		var next []byte
		for ; len(data) > 0; data = data[blockSize:] {
			next = hashBlock(next, salt, data[:blockSize])
		}
		data = append(next, make([]byte, -len(next)&(blockSize-1))...)
	}
	return hex.EncodeToString(hashBlock(nil, salt, data))
}

// Disks of every number of levels, down to none.
func TestVerityLevels(t *testing.T) {
	for _, blocks := range []int{1, 2, 128, 129, 1024, 1025, 128*128 + 1} {
		data := bytes.Repeat([]byte{byte(blocks)}, blocks*blockSize)
		out, err := os.Create(filepath.Join(t.TempDir(), "tree"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		root, err := writeTree(t.Context(), bytes.NewReader(data), int64(len(data)), out, 0, []byte("salt"))
		if err != nil {
			t.Fatal(err)
		}
		if want := plainRoot(data, []byte("salt")); hex.EncodeToString(root) != want {
			t.Errorf("%d blocks: root hash %x, want %s", blocks, root, want)
		}
	}
}
