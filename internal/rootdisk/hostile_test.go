package rootdisk

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// sparse is a tar of one file in GNU's old sparse form: nothing is stored, and it says it is that long.
func sparse(t testing.TB, size uint64) []byte {
	h := tarHeader(t, &tar.Header{Typeflag: tar.TypeReg, Name: "sparse", Format: tar.FormatGNU})[:512]
	number := func(b []byte, n uint64) { // in base 256
		clear(b)
		b[0] = 0x80
		binary.BigEndian.PutUint64(b[4:], n)
	}
	h[156] = tar.TypeGNUSparse
	number(h[386:398], size)
	number(h[398:410], 0)
	number(h[483:495], size)
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return append(h, make([]byte, 1024)...)
}

// What claims to be huge is refused at once, not when the disk is full.
func TestHugeClaims(t *testing.T) {
	claim := tarHeader(t, &tar.Header{Typeflag: tar.TypeReg, Name: "big", Size: 1 << 40, Format: tar.FormatPAX})
	negative := tarHeader(t, &tar.Header{Typeflag: tar.TypeReg, Name: "neg", Format: tar.FormatPAX, PAXRecords: map[string]string{"x.y": "size"}})
	for name, blob := range map[string][]byte{
		"sparse": sparse(t, 1<<40), "file": claim, "negative": bytes.Replace(negative, []byte("x.y=size"), []byte("size=-10"), 1),
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			began := time.Now()
			_, err := s.Ensure(t.Context(), testImage, []Layer{layer(blob)}, nil)
			if err == nil || time.Since(began) > 5*time.Second {
				t.Errorf("got %v after %s", err, time.Since(began))
			}
			t.Log(err)
			if files, _ := os.ReadDir(s.dir); len(files) != 0 {
				t.Errorf("left behind: %v", files)
			}
		})
	}
	// One that is not refused is all zeros and takes no room.
	d := ensure(t, openStore(t), sparse(t, 64<<20))
	data, err := os.ReadFile(filepath.Join(mountLoop(t, d.Path, "erofs", "ro"), "sparse"))
	if err != nil || len(data) != 64<<20 || len(bytes.Trim(data, "\x00")) > 0 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}

// A long sparse file is read from nowhere, but not for ever.
func TestCancelSparse(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := openStore(t).Ensure(ctx, testImage, []Layer{layer(sparse(t, maxData))}, nil)
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second {
		t.Errorf("got %v after %s", err, time.Since(began))
	}
}

// endless is a tar without an end: each header is another name, which the maker says.
type endless struct {
	t    testing.TB
	make func(i int) *tar.Header
	i    int
	buf  []byte
}

func (e *endless) Read(b []byte) (int, error) {
	if len(e.buf) == 0 {
		e.buf = tarHeader(e.t, e.make(e.i))
		e.i++
	}
	n := copy(b, e.buf)
	e.buf = e.buf[n:]
	return n, nil
}

// Trees that grow without end are cut off; here with a small allowance.
func TestEndlessTrees(t *testing.T) {
	big := strings.Repeat("v", 30000)
	for name, tt := range map[string]func(i int) *tar.Header{
		"files":     func(i int) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("f", i)} },
		"whiteouts": func(i int) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(".wh.f", i)} },
		"links": func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprint("f", i), Linkname: fmt.Sprint("f", i+1)}
		},
		"hidden": func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeLink, Name: "f", Linkname: fmt.Sprint("t", i)}
		},
		"deep": func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("d/", 2000) + fmt.Sprint(i)}
		},
		"directories": func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprint("d", i), Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.x": big}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			fs := newErofs(out)
			defer fs.out.stop()
			f := newFlattener(fs, nil, func(int) {})
			f.left.memory = 4 << 20
			l := Layer{Digest: testImage, Open: func() (io.ReadCloser, error) { return io.NopCloser(&endless{t: t, make: tt}), nil }}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := f.flatten(ctx, []Layer{l}); !errdefs.IsResourceExhausted(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A bomb of zeros ends at the bound of the data.
func TestZeroBomb(t *testing.T) {
	out, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	fs := newErofs(out)
	defer fs.out.stop()
	f := newFlattener(fs, nil, func(int) {})
	f.left.data = 20 << 20
	var entries []ent
	for i := range 5 {
		entries = append(entries, file(fmt.Sprint(i), strings.Repeat("\x00", 8<<20)))
	}
	if err := f.flatten(t.Context(), []Layer{layer(gz(tarball(t, entries...)))}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %v", err)
	}
}

// The allowance is what a name really takes.
func TestMemoryOfTree(t *testing.T) {
	const names = 50_000
	var blob bytes.Buffer
	w := tar.NewWriter(&blob)
	for i := range names {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("some/dir/%d/%d", i/20, i)}); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	out, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools kept goes with the second
	runtime.ReadMemStats(&before)
	fs := newErofs(out)
	defer fs.out.stop()
	f := newFlattener(fs, nil, func(int) {})
	if err := f.flatten(t.Context(), []Layer{layer(blob.Bytes())}); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	counted := float64(maxMemory-f.left.memory) / names
	took := float64(int64(after.HeapAlloc)-int64(before.HeapAlloc)) / names
	t.Logf("%.0f bytes for a name, counted as %.0f", took, counted)
	if took > counted {
		t.Errorf("a name takes %.0f bytes, counted are %.0f", took, counted)
	}
	runtime.KeepAlive(f)
	runtime.KeepAlive(&blob)
}

// check walks a whole file system by our own reader and returns how many names it has.
func check(r io.ReaderAt, size int64) (names int, err error) {
	rd, err := newReader(r, size)
	if err != nil {
		return 0, err
	}
	root, err := rd.inode(rd.root)
	if err != nil {
		return 0, err
	}
	var walk func(dir stored, parent uint64, depth int) error
	walk = func(dir stored, parent uint64, depth int) error {
		last, dots, kids := "", 0, 2
		err := rd.names(dir, func(name string, nid uint64) error {
			if name <= last && last != "" {
				return fmt.Errorf("%q follows %q", name, last)
			}
			last = name
			ino, err := rd.inode(nid)
			if err != nil {
				return fmt.Errorf("%q: %w", name, err)
			}
			switch {
			case name == "." && nid == dir.nid, name == ".." && nid == parent:
				dots++
				return nil
			case name == "" || strings.Contains(name, "/") || len(name) > maxName || ino.nlink == 0 || ino.mode == 0:
				return fmt.Errorf("%q: %+v", name, ino.inode)
			}
			names++
			if ino.isDir() {
				kids++
				return walk(ino, dir.nid, depth+1)
			}
			if ino.data != nil && ino.size < 1<<20 {
				if n, err := io.Copy(io.Discard, ino.data); err != nil || n != ino.size {
					return fmt.Errorf("%q: %d of %d bytes, %v", name, n, ino.size, err)
				}
			}
			return nil
		})
		if err == nil && (dots != 2 || int(dir.nlink) != kids) {
			err = errors.New("wrong dots or number of links of a directory")
		}
		return err
	}
	return names, walk(root, root.nid, 0)
}

// FuzzReader gives the reader damaged disks: an error, or an end.
func FuzzReader(f *testing.F) {
	d := ensure(f, openStore(f), tarball(f, dir("d", 0o755), file("d/x", strings.Repeat("x", 5000)), symlink("s", "d"), link("h", "d/x")))
	data, err := os.ReadFile(d.Path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data[:d.Size])
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := newReader(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		for _, name := range []string{"d", "d/x", "s", "h/x", "none"} {
			s, found, err := stack{r, r}.lookup(name)
			if err == nil && found && s.data != nil {
				io.Copy(io.Discard, io.LimitReader(s.data, 1<<20))
			}
		}
	})
}
