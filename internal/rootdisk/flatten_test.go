package rootdisk

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// FuzzFlatten feeds two layers from strangers, as one disk and as two: whatever they hold, there is an error or a disk that fsck and our
// own reader find clean.
func FuzzFlatten(f *testing.F) {
	base := tarball(f, dir("d", 0o755), file("d/x", strings.Repeat("x", 5000)), link("h", "d/x"), symlink("s", "d"), file("s/y", "1"))
	top := tarball(f, file("d/.wh.x", ""), file(".wh.s", ""), link("z", "h"), file("s/q", ""), file("d/.wh..wh..opq", ""))
	f.Add(base, top)
	f.Add(gz(base), zst(top))
	f.Add(top, base)
	f.Add(sparse(f, 1<<20), sparse(f, 1<<40))
	f.Add(tarball(f, link("a", "b"), link("b", "c"), file("c", "")), tarball(f, file("b", ""), link("c", "a")))
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		dir := t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // a sparse file may be long
		defer cancel()
		write := func(name string, below func() (stack, error), layers ...Layer) *reader {
			out, err := os.Create(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { out.Close() })
			m, err := build(ctx, out, [16]byte{}, layers, below, func(int) {})
			if err != nil {
				return nil
			}
			if m.size > 64<<20 {
				return nil // nothing but holes; reading them takes time
			}
			if msg, err := exec.Command("fsck.erofs", out.Name()).CombinedOutput(); err != nil {
				t.Fatalf("fsck.erofs: %v\n%s", err, msg)
			}
			if names, err := check(out, m.size); err != nil || names != m.entries {
				t.Fatalf("%s has %d names, want %d: %v", name, names, m.entries, err)
			}
			r, err := newReader(out, m.size)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		write("flat", nil, layer(lower), layer(upper))
		if r := write("lower", nil, layer(lower)); r != nil {
			write("upper", func() (stack, error) { return stack{r}, nil }, layer(upper))
		}
	})
}

// benchTree is like a small distribution: 12,000 files, most of them small, text that compresses by about a third.
func benchTree(b *testing.B) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	text := make([]byte, 4<<20)
	for i := range text {
		text[i] = "etaoinshrdlu \n0123456789abcdefghijklmnopqrstuvwxyz"[min(r.IntN(50), r.IntN(50))]
	}
	var entries []ent
	for total, i := 0, 0; total < 260<<20; i++ {
		size := int(r.ExpFloat64() * 4000)
		if i%40 == 0 {
			size = r.IntN(1400 << 10)
		}
		start := r.IntN(len(text) - min(size, len(text)/2))
		entries = append(entries, file(fmt.Sprintf("usr/lib/d%d/file%d", i/50, i), string(text[start:start+size])))
		total += size
	}
	return tarball(b, entries...)
}

// MB/s are those of the uncompressed archive. floor is the same without making a disk.
func BenchmarkEnsure(b *testing.B) {
	plain := benchTree(b)
	for _, tt := range []struct {
		name string
		blob []byte
	}{{"tar", plain}, {"gz", gz(plain)}, {"zst", zst(plain)}} {
		b.Run(tt.name, func(b *testing.B) {
			s := openStore(b)
			b.SetBytes(int64(len(plain)))
			l := layer(tt.blob)
			for i := 0; b.Loop(); i++ {
				img := digest.FromString(fmt.Sprint(i))
				if _, err := s.Ensure(context.Background(), img, []Layer{l}, nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Remove(img); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
		b.Run(tt.name+"/floor", func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				r, err := decompress(bytes.NewReader(tt.blob))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	d := ensure(b, openStore(b), benchTree(b))
	b.SetBytes(d.Size)
	for b.Loop() {
		if err := d.Verify(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	s := openStore(b)
	ensure(b, s, tarball(b, file("a", "1")))
	for b.Loop() {
		if _, err := s.Get(testImage); err != nil {
			b.Fatal(err)
		}
	}
}
