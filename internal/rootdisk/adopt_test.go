package rootdisk

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// made elsewhere: the disks of an image, and their file systems.
func foreign(t *testing.T) (layers []Layer, disks []Disk, data [][]byte) {
	t.Helper()
	layers = []Layer{layer(tarball(t, file("who", "published")))}
	root, err := openStore(t).Ensure(t.Context(), testImage, layers, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range root.Disks {
		file, err := os.ReadFile(d.Path)
		if err != nil {
			t.Fatal(err)
		}
		disks, data = append(disks, d), append(data, file[:d.Size])
	}
	return layers, disks, data
}

func opener(data [][]byte) func(int) (io.ReadCloser, error) {
	return func(i int) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data[i])), nil }
}

func TestAdoptedDisksAreTheirImagesAlone(t *testing.T) {
	layers, disks, data := foreign(t)
	s := openStore(t)
	root, err := s.Adopt(t.Context(), testImage, disks, opener(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := root.Disks[0].Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if got, err := s.Ensure(t.Context(), testImage, layers, nil); err != nil || got.Disks[0].Path != root.Disks[0].Path {
		t.Errorf("the adopted disk is not used: %+v, %v", got, err)
	}
	// Another image of the same layers must not get what a stranger says they are.
	other, err := s.Ensure(t.Context(), digest.FromString("other"), layers, nil)
	if err != nil || other.Disks[0].Path == root.Disks[0].Path {
		t.Errorf("another image shares an adopted disk: %+v, %v", other, err)
	}
	if err := s.Remove(testImage); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(root.Disks[0].Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the disk stays when its image is gone: %v", err)
	}
}

func TestAdoptRefuses(t *testing.T) {
	_, good, data := foreign(t)
	for name, change := range map[string]func(d *Disk, data []byte) []byte{
		"a flipped byte":   func(d *Disk, data []byte) []byte { data[len(data)/2] ^= 1; return data },
		"too short":        func(d *Disk, data []byte) []byte { return data[:len(data)-1] },
		"too long":         func(d *Disk, data []byte) []byte { return append(data, 0) },
		"another size":     func(d *Disk, data []byte) []byte { d.Size--; return data },
		"negative":         func(d *Disk, data []byte) []byte { d.Size, d.Verity.DataBlocks = -blockSize, -1; return data },
		"huge":             func(d *Disk, data []byte) []byte { d.Size, d.Verity.DataBlocks = 1<<60, 1<<48; return data },
		"blocks that wrap": func(d *Disk, data []byte) []byte { d.Verity.DataBlocks += 1 << 52; return data },
		"no hash":          func(d *Disk, data []byte) []byte { d.Verity.RootHash = ""; return data },
		"a salt that lies": func(d *Disk, data []byte) []byte { d.Verity.Salt = "zz"; return data },
	} {
		s := openStore(t)
		d := good[0]
		changed := change(&d, bytes.Clone(data[0]))
		_, err := s.Adopt(t.Context(), testImage, []Disk{d}, opener([][]byte{changed}))
		if !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", name, left, err)
		}
	}
	if _, err := openStore(t).Adopt(t.Context(), testImage, nil, opener(nil)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no disk: %v", err)
	}
}
