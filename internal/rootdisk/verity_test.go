package rootdisk

import (
	"bytes"
	"context"
	"encoding/hex"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestPrepareVerity(t *testing.T) {
	s := openStore(t)
	ctx := context.Background()
	if _, err := s.PrepareVerity(ctx, testImage); !errdefs.IsNotFound(err) {
		t.Fatalf("without a disk: %v", err)
	}
	random := make([]byte, 70<<20) // three levels, more than one share of work
	rand.NewChaCha8([32]byte{}).Read(random)
	ensure(t, s, tarball(t, file("a", string(random))))
	d, err := s.PrepareVerity(ctx, testImage)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(testImage); err != nil || !cmp.Equal(got, d) {
		t.Errorf("got %+v, want %+v: %v", got, d, err)
	}
	// The root hash is what ties the disk to the tree, so compute it once more, in the simplest way.
	data, err := os.ReadFile(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	if root := plainRoot(data, seedOf("salt")); root != d.Verity.RootHash {
		t.Errorf("root hash %s, want %s", d.Verity.RootHash, root)
	}
	if _, err := exec.LookPath("veritysetup"); err != nil {
		t.Skip("veritysetup is not installed (apt-get install cryptsetup-bin): only our own computation was compared")
	}
	verify := func(path string) ([]byte, error) {
		return exec.Command("veritysetup", "verify", path, d.Verity.Path, d.Verity.RootHash).CombinedOutput()
	}
	if out, err := verify(d.Path); err != nil {
		t.Errorf("veritysetup verify: %v\n%s", err, out)
	}
	data[len(data)/2] ^= 1
	flipped := filepath.Join(t.TempDir(), "flipped")
	if err := os.WriteFile(flipped, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(flipped); err == nil {
		t.Errorf("veritysetup does not see the flipped bit\n%s", out)
	}
}

func seedOf(what string) []byte {
	s := seed(testImage, what)
	return s[:]
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
		root, err := writeVerity(context.Background(), bytes.NewReader(data), int64(len(data)), out, []byte("salt"), make([]byte, 16))
		if err != nil {
			t.Fatal(err)
		}
		if want := plainRoot(data, []byte("salt")); hex.EncodeToString(root) != want {
			t.Errorf("%d blocks: root hash %x, want %s", blocks, root, want)
		}
	}
}
