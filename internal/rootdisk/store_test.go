package rootdisk

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// ent is a tar entry in few words.
type ent struct {
	tar.Header
	data string
}

func file(name, data string) ent {
	return ent{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}
func dir(name string, mode int64) ent {
	return ent{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, ""}
}
func symlink(name, to string) ent {
	return ent{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, ""}
}
func link(name, to string) ent {
	return ent{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}, ""}
}

func tarball(t testing.TB, entries ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.data))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zst(b []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return w.EncodeAll(b, nil)
}

func layer(blob []byte) Layer {
	return Layer{Digest: digest.FromBytes(blob), MediaType: "test", Open: func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(blob)), nil
	}}
}

func openStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "disks"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var testImage = digest.FromString("image")

// ensure makes a disk of layers, bottom first, and has fsck.erofs look at it. They are too small for more than one.
func ensure(t testing.TB, s *Store, blobs ...[]byte) Disk {
	t.Helper()
	var layers []Layer
	for _, b := range blobs {
		layers = append(layers, layer(b))
	}
	r, err := s.Ensure(context.Background(), testImage, layers, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Disks) != 1 {
		t.Fatalf("%d disks", len(r.Disks))
	}
	d := r.Disks[0]
	if out, err := exec.Command("fsck.erofs", d.Path).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v\n%s", err, out)
	}
	return d
}

// list describes a mounted tree, one line for each name.
func list(t *testing.T, root string) []string {
	t.Helper()
	var lines []string
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("/%s %o %d:%d", name, st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(data) > 20 {
				data = []byte(digest.FromBytes(data).Encoded()[:12])
			}
			line += fmt.Sprintf(" %q", data)
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if len(to) > 20 {
				to = digest.FromString(to).Encoded()[:12]
			}
			line += " -> " + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" dev %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mtim.Sec != 0 || st.Mtim.Nsec != 0 {
			line += fmt.Sprintf(" at %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			line += fmt.Sprintf(" links %d", st.Nlink)
			if first := inodes[st.Ino]; first != "" {
				line += " with " + first
			} else {
				inodes[st.Ino] = name
			}
		}
		names := make([]byte, 64<<10)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		var attrs []string
		for attr := range strings.SplitSeq(string(names[:n]), "\x00") {
			if attr == "" {
				continue
			}
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(path, attr, value)
			if err != nil {
				return fmt.Errorf("%s of %s: %w", attr, path, err)
			}
			attrs = append(attrs, fmt.Sprintf(" %s=%s", attr, digest.FromBytes(value[:n]).Encoded()[:8]))
		}
		slices.Sort(attrs)
		lines = append(lines, line+strings.Join(attrs, ""))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

func contents(t *testing.T, blobs ...[]byte) []string {
	t.Helper()
	return list(t, mountLoop(t, ensure(t, openStore(t), blobs...).Path, "erofs", "ro"))
}

func TestKinds(t *testing.T) {
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x04\x00\xff\xff\xff\xff \x00\x04\x00\xff\xff\xff\xff"
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	random := make([]byte, 100<<10)
	rand.NewChaCha8([32]byte{}).Read(random)
	long, huge := strings.Repeat("l", 3000), strings.Repeat("t", 4095)
	big := strings.Repeat("v", 60000)
	owned := ent{tar.Header{Typeflag: tar.TypeReg, Name: "owned", Mode: 0o4755, Uid: 100000, Gid: 4294967294,
		ModTime: time.Unix(1700000000, 123456789), Format: tar.FormatPAX,
		PAXRecords: map[string]string{
			"SCHILY.xattr.user.a": "1", "SCHILY.xattr.trusted.b": "22", "SCHILY.xattr.security.capability": capability,
			"SCHILY.xattr.system.posix_acl_access": acl, "SCHILY.xattr.system.nfs4_acl": "dropped",
		}}, "x"}
	withBig := func(e ent) ent {
		e.Format = tar.FormatPAX
		e.PAXRecords = map[string]string{"SCHILY.xattr.trusted.big": big}
		return e
	}
	entries := []ent{
		dir("./", 0o755), owned,
		{tar.Header{Typeflag: tar.TypeReg, Name: "past", Mode: 0o600, ModTime: time.Unix(-5, 0), Format: tar.FormatPAX}, ""},
		{tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
		{tar.Header{Typeflag: tar.TypeBlock, Name: "dev/big", Mode: 0o660, Devmajor: 259, Devminor: 70000}, ""},
		{tar.Header{Typeflag: tar.TypeFifo, Name: "dev/fifo", Mode: 0o600}, ""},
		{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "skipped"}}, ""},
		symlink("short", "target"), symlink("long", long), symlink("huge", huge),
		withBig(file("bigattr", "small")), withBig(dir("bigdir", 0o1777)), file("bigdir/in", "it"), withBig(symlink("biglink", "target")),
		file("dev/missing/parents", ""),
	}
	want := []string{
		"/ 40755 0:0",
		fmt.Sprintf("/owned 104755 100000:4294967294 %q at 1700000000.123456789", "x") + " security.capability=" + digest.FromString(capability).Encoded()[:8] +
			" system.posix_acl_access=" + digest.FromString(acl).Encoded()[:8] + " trusted.b=" + digest.FromString("22").Encoded()[:8] +
			" user.a=" + digest.FromString("1").Encoded()[:8],
		`/past 100600 0:0 "" at -5.000000000`,
		"/dev 40755 0:0", "/dev/null 20666 0:0 dev 1:3", "/dev/big 60660 0:0 dev 259:70000", "/dev/fifo 10600 0:0",
		"/short 120777 0:0 -> target",
		"/long 120777 0:0 -> " + digest.FromString(long).Encoded()[:12],
		"/huge 120777 0:0 -> " + digest.FromString(huge).Encoded()[:12],
		"/dev/missing 40755 0:0", `/dev/missing/parents 100644 0:0 ""`, `/bigdir/in 100644 0:0 "it"`,
	}
	bigAttr := " trusted.big=" + digest.FromString(big).Encoded()[:8]
	want = append(want, `/bigattr 100644 0:0 "small"`+bigAttr, "/bigdir 41777 0:0"+bigAttr, "/biglink 120777 0:0 -> target"+bigAttr)
	for _, size := range []int{1, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 65536, 100 << 10} {
		name := fmt.Sprintf("size%d", size)
		entries = append(entries, file(name, string(random[:size])))
		text := fmt.Sprintf("%q", digest.FromBytes(random[:size]).Encoded()[:12])
		if size == 1 {
			text = fmt.Sprintf("%q", random[:1])
		}
		want = append(want, "/"+name+" 100644 0:0 "+text)
	}
	want = append(want, "/many 40700 0:0")
	entries = append(entries, dir("many", 0o700))
	for i := range 5000 { // many blocks of names, also such as sort before and between the dots
		name := fmt.Sprintf("many/%c%s%d", "!-.0a~\xff"[i%7], strings.Repeat("x", i%40), i)
		entries = append(entries, ent{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Format: tar.FormatGNU}, name})
		text := fmt.Sprintf("%q", name)
		if len(name) > 20 {
			text = fmt.Sprintf("%q", digest.FromString(name).Encoded()[:12])
		}
		want = append(want, "/"+name+" 100644 0:0 "+text)
	}
	slices.Sort(want)
	plain := tarball(t, entries...)
	for name, blob := range map[string][]byte{"tar": plain, "gzip": gz(plain), "zstd": zst(plain)} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(want, contents(t, blob)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

type layersTest struct {
	name   string
	layers [][]ent // bottom first
	want   []string
}

func layersTests() []layersTest {
	return []layersTest{
		{"whiteouts", [][]ent{
			{file("a", "1"), dir("d", 0o700), file("d/x", "1"), file("d/y", "1"), dir("gone", 0o700), file("gone/z", "1")},
			{file(".wh.a", ""), file("d/.wh.x", ""), file(".wh.gone", ""), file(".wh.never", ""), file(".wh..wh.plnk", "")},
		}, []string{"/d 40700 0:0", `/d/y 100644 0:0 "1"`}},
		{"a whiteout does not hide its own layer, in either order", [][]ent{
			{file("a", "1"), dir("d", 0o700), file("d/x", "1")},
			{file("a", "2"), file(".wh.a", ""), file(".wh.d", ""), dir("d", 0o711), file("d/y", "2")},
		}, []string{`/a 100644 0:0 "2"`, "/d 40711 0:0", `/d/y 100644 0:0 "2"`}},
		{"a name comes back above its whiteout", [][]ent{
			{dir("d", 0o700), file("d/x", "1")}, {file(".wh.d", "")}, {file("d/y", "3")},
		}, []string{"/d 40755 0:0", `/d/y 100644 0:0 "3"`}},
		{"opaque", [][]ent{
			{dir("d", 0o700), file("d/x", "1"), dir("d/s", 0o700), file("d/s/x", "1")},
			{file("d/y", "2"), file("d/.wh..wh..opq", ""), dir("d", 0o711), file("d/s/y", "2")},
			{file("d/z", "3")},
		}, []string{"/d 40711 0:0", "/d/s 40755 0:0", `/d/s/y 100644 0:0 "2"`, `/d/y 100644 0:0 "2"`, `/d/z 100644 0:0 "3"`}},
		{"opaque root", [][]ent{{dir(".", 0o700), file("x", "1")}, {file(".wh..wh..opq", ""), file("y", "2")}},
			[]string{`/y 100644 0:0 "2"`}},
		{"file becomes directory and back", [][]ent{
			{file("a", "1"), dir("b", 0o700), file("b/x", "1")},
			{dir("a", 0o711), file("a/x", "2"), file("b", "2")},
		}, []string{"/a 40711 0:0", `/a/x 100644 0:0 "2"`, `/b 100644 0:0 "2"`}},
		{"directory over file over directory", [][]ent{
			{dir("a", 0o700), file("a/x", "1")}, {file("a", "2")}, {file("a/y", "3")},
		}, []string{"/a 40755 0:0", `/a/y 100644 0:0 "3"`}},
		{"metadata of a directory is the topmost there is", [][]ent{
			{dir("a", 0o700), file("a/1", "")}, {dir("a", 0o711), file("a/2", "")}, {file("a/3", "")},
		}, []string{"/a 40711 0:0", `/a/1 100644 0:0 ""`, `/a/2 100644 0:0 ""`, `/a/3 100644 0:0 ""`}},
		{"the last of equal names in a layer counts", [][]ent{
			{file("a", "1"), file("a", "2"), dir("b", 0o700), file("b/x", ""), file("b", "3"), file("c", "1"), dir("c", 0o711)},
		}, []string{`/a 100644 0:0 "2"`, `/b 100644 0:0 "3"`, "/c 40711 0:0"}},
		{"odd names", [][]ent{
			{file("/abs", "1"), file("./x/../dot", "2"), file("x//y", "3")},
		}, []string{`/abs 100644 0:0 "1"`, `/dot 100644 0:0 "2"`, "/x 40755 0:0", `/x/y 100644 0:0 "3"`}},
		{"below a symbolic link: followed in its layer, replaced above it", [][]ent{
			{dir("usr/bin", 0o755), symlink("bin", "usr/bin"), symlink("abs", "/usr"), symlink("up", "../../usr"),
				file("bin/a", "1"), file("abs/b", "1"), file("up/c", "1"), symlink("opt", "usr"),
				symlink("usr/self", "/usr"), file("usr/self/e", "1")},
			{file("opt/d", "2")},
		}, []string{"/abs 120777 0:0 -> /usr", "/bin 120777 0:0 -> usr/bin", "/opt 40755 0:0", `/opt/d 100644 0:0 "2"`,
			"/up 120777 0:0 -> ../../usr", "/usr 40755 0:0", `/usr/b 100644 0:0 "1"`, "/usr/bin 40755 0:0",
			`/usr/bin/a 100644 0:0 "1"`, `/usr/c 100644 0:0 "1"`, `/usr/e 100644 0:0 "1"`, "/usr/self 120777 0:0 -> /usr"}},
		{"hard links", [][]ent{
			{file("a", "data"), link("b", "a"), link("c", "./b"), symlink("s", "a"), link("t", "/s")},
		}, []string{`/a 100644 0:0 "data" links 3`, `/b 100644 0:0 "data" links 3 with a`, `/c 100644 0:0 "data" links 3 with a`,
			"/s 120777 0:0 -> a links 2", "/t 120777 0:0 -> a links 2 with s"}},
		{"hard link before its target", [][]ent{{link("a", "b"), link("c", "a"), file("b", "data")}},
			[]string{`/a 100644 0:0 "data" links 3`, `/b 100644 0:0 "data" links 3 with a`, `/c 100644 0:0 "data" links 3 with a`}},
		{"hard link to what an upper layer hides", [][]ent{
			{file("a", "old"), link("b", "a"), link("c", "b"), file("e", "gone"), link("f", "e")},
			{file("a", "new"), file(".wh.e", "")},
		}, []string{`/a 100644 0:0 "new"`, `/b 100644 0:0 "old" links 2`, `/c 100644 0:0 "old" links 2 with b`, `/f 100644 0:0 "gone"`}},
		{"hard link to a hidden hard link", [][]ent{
			{file("a", "old"), link("b", "a"), link("c", "b"), file("v", "seen"), link("w", "v"), link("x", "w")},
			{file("a", "new"), file(".wh.b", ""), file("w", "new")},
		}, []string{`/a 100644 0:0 "new"`, `/c 100644 0:0 "old"`, `/v 100644 0:0 "seen" links 2`, `/w 100644 0:0 "new"`, `/x 100644 0:0 "seen" links 2 with v`}},
		{"hard link to a lower layer", [][]ent{
			{file("a", "low"), file("h", "hid")}, {link("b", "a")}, {link("c", "a"), link("i", "h"), file(".wh.h", "")},
		}, []string{`/a 100644 0:0 "low" links 3`, `/b 100644 0:0 "low" links 3 with a`, `/c 100644 0:0 "low" links 3 with a`, `/i 100644 0:0 "hid"`}},
		{"no layers", nil, nil},
	}
}

func TestLayers(t *testing.T) {
	for _, tt := range layersTests() {
		t.Run(tt.name, func(t *testing.T) {
			var blobs [][]byte
			for _, l := range tt.layers {
				blobs = append(blobs, tarball(t, l...))
			}
			got := contents(t, blobs...)
			got = slices.DeleteFunc(got, func(s string) bool { return strings.HasPrefix(s, "/ ") })
			if diff := cmp.Diff(tt.want, got, cmp.Transformer("nil", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestBadLayers(t *testing.T) {
	good := tarball(t, file("a", strings.Repeat("x", 9000)))
	short := gz(good)
	tests := map[string]struct {
		blob  []byte
		words string
	}{
		"dots":            {tarball(t, file("a/../../x", "")), "out of the image"},
		"dots only":       {tarball(t, dir("..", 0o755)), "out of the image"},
		"link out":        {tarball(t, link("a", "../../etc/shadow")), "out of the image"},
		"long part":       {tarball(t, file(strings.Repeat("x", 256), "")), "256 bytes"},
		"long name":       {tarball(t, file(strings.Repeat("x/", 3000)+"x", "")), "4095"},
		"below a file":    {tarball(t, file("a", ""), file("a/b", "")), "not a directory"},
		"link loop":       {tarball(t, symlink("a", "b"), symlink("b", "a"), file("a/x", "")), "too many levels"},
		"hard link cycle": {tarball(t, link("a", "b"), link("b", "a")), "lead back"},
		"long cycle":      {tarball(t, link("a", "b"), link("b", "c"), link("c", "a")), "lead back"},
		"link to self":    {tarball(t, link("a", "./a")), "to itself"},
		"no target":       {tarball(t, link("a", "none")), "no layer has its target"},
		"link to dir":     {tarball(t, dir("d", 0o755), link("a", "d")), "to directory"},
		"link to dir 2":   {tarball(t, link("a", "d"), dir("d", 0o755)), "is to a directory"},
		"bad whiteout":    {tarball(t, file("d/.wh...", "")), "whiteout of nothing"},
		"root is a file":  {tarball(t, file(".", "")), "root is not a directory"},
		"unknown type":    {tarball(t, ent{tar.Header{Typeflag: 'Z', Name: "z"}, ""}), "unknown type"},
		"device":          {tarball(t, ent{tar.Header{Typeflag: tar.TypeChar, Name: "z", Devmajor: 5000}, ""}), "out of range"},
		"no archive":      {bytes.Repeat([]byte("html"), 500), "neither gzip"},
		"short tar":       {good[:5000], "unexpected EOF"},
		"short gzip":      {short[:len(short)-12], "unexpected EOF"},
		"short gzip sum":  {short[:len(short)-3], "unexpected EOF"},
		"short zstd":      {zst(good)[:20], "unexpected EOF"},
		"bad gzip sum":    {append(slices.Clone(short[:len(short)-8]), 1, 2, 3, 4, 0, 40, 0, 0), "checksum"},
		"huge header": {tarball(t, ent{tar.Header{Typeflag: tar.TypeReg, Name: "a", Format: tar.FormatPAX,
			PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 900<<10)}}, ""}), "too long"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			_, err := s.Ensure(context.Background(), testImage, []Layer{layer(tt.blob)}, nil)
			if err == nil || !strings.Contains(err.Error(), tt.words) || !strings.Contains(err.Error(), digest.FromBytes(tt.blob).String()) {
				t.Errorf("got %v, want the layer's digest and %q", err, tt.words)
			}
			if strings.Contains(name, "short") && hint.Of(err) == "" {
				t.Errorf("no hint with %v", err)
			}
			if files, _ := os.ReadDir(s.dir); len(files) != 0 {
				t.Errorf("left behind: %v", files)
			}
		})
	}
}

func TestEnsureOnce(t *testing.T) {
	s := openStore(t)
	blob := tarball(t, file("a", "1"))
	var opened atomic.Int32
	l := layer(blob)
	l.Open = func() (io.ReadCloser, error) {
		opened.Add(1)
		return io.NopCloser(bytes.NewReader(blob)), nil
	}
	if _, err := s.Get(testImage); !errdefs.IsNotFound(err) {
		t.Fatalf("before: %v", err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if _, err := s.Ensure(context.Background(), testImage, []Layer{l}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := opened.Load(); n != 1 {
		t.Errorf("built %d times", n)
	}
	got, err := s.Get(testImage)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Disks) != 1 || got.Disks[0].Entries != 1 || got.ImageDigest != testImage {
		t.Errorf("%+v", got)
	}
	if all, err := s.List(); err != nil || !cmp.Equal(all, []Root{got}) {
		t.Errorf("list: %v %v", all, err)
	}
	if err := s.Remove(testImage); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(testImage); !errdefs.IsNotFound(err) {
		t.Errorf("removing again: %v", err)
	}
	if files, _ := os.ReadDir(s.dir); len(files) != 0 {
		t.Errorf("left behind: %v", files)
	}
	if _, err := s.Get("../../etc:passwd"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad digest: %v", err)
	}
}

func TestCancel(t *testing.T) {
	s := openStore(t)
	ctx, cancel := context.WithCancel(context.Background())
	l := layer(tarball(t, file("a", strings.Repeat("x", 8<<20))))
	_, err := s.Ensure(ctx, testImage, []Layer{l}, func(int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Ensure(context.Background(), testImage, []Layer{l}, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// The same image gives the same bytes, or its root hash would change when the disk is made again.
func TestReproducible(t *testing.T) {
	var entries []ent
	for i := range 500 {
		entries = append(entries, file(fmt.Sprintf("d%d/f%d", i%17, i), strings.Repeat("x", i*7)), link(fmt.Sprintf("l%d", i), fmt.Sprintf("d%d/f%d", i%17, i)))
	}
	blob := tarball(t, entries...)
	var images [2][]byte
	for i := range images {
		data, err := os.ReadFile(ensure(t, openStore(t), blob).Path)
		if err != nil {
			t.Fatal(err)
		}
		images[i] = data
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two disks of one image differ")
	}
}

func TestOpenSweeps(t *testing.T) {
	s := openStore(t)
	d := ensure(t, s, tarball(t, file("a", "1")))
	live, err := s.temp()
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	for _, name := range []string{tempPrefix + "dead", "orphan" + diskSuffix, "sha256-old" + diskSuffix, "sha256-old" + oldVeritySuffix} {
		if err := os.WriteFile(filepath.Join(s.dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = Open(s.dir, s.log); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(s.dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{d.Path, strings.TrimSuffix(d.Path, diskSuffix) + diskRecordSuffix, s.imageRecord(testImage), live.Name()}
	slices.Sort(want)
	slices.Sort(files)
	if diff := cmp.Diff(want, files); diff != "" {
		t.Error(diff)
	}
	// A disk that was cut off is made anew.
	if err := os.Truncate(d.Path, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(testImage); !errdefs.IsNotFound(err) {
		t.Errorf("damaged disk: %v", err)
	}
	ensure(t, s, tarball(t, file("a", "1")))
}

func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	mnt := t.TempDir()
	if err := syscall.Mount("tmpfs", mnt, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(mnt, 0) })
	s, err := Open(filepath.Join(mnt, "disks"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	random := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{}).Read(random)
	_, err = s.Ensure(context.Background(), testImage, []Layer{layer(tarball(t, file("a", string(random))))}, nil)
	if !errdefs.IsResourceExhausted(err) || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), s.dir) || hint.Of(err) == "" {
		t.Errorf("got %v", err)
	}
	t.Log(err)
	if files, _ := os.ReadDir(s.dir); len(files) != 0 {
		t.Errorf("left behind: %v", files)
	}
}

// A file beyond 4 GiB, nearly all of it zeros, takes no room.
func TestBigSparseFile(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 5 GiB of zeros")
	}
	const size = 5<<30 + 3
	head := tarHeader(t, &tar.Header{Typeflag: tar.TypeReg, Name: "big", Mode: 0o600, Size: size, Format: tar.FormatPAX})
	l := Layer{Digest: testImage, Open: func() (io.ReadCloser, error) {
		return io.NopCloser(io.MultiReader(bytes.NewReader(head), io.LimitReader(zeroReader{}, size-3), strings.NewReader("end"),
			io.LimitReader(zeroReader{}, 512-size%512+1024))), nil
	}}
	s := openStore(t)
	r, err := s.Ensure(context.Background(), testImage, []Layer{l}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := r.Disks[0]
	var st unix.Stat_t
	if err := unix.Stat(d.Path, &st); err != nil || st.Blocks*512 > 48<<20 {
		t.Errorf("%d KiB allocated, %v", st.Blocks/2, err)
	}
	f, err := os.Open(filepath.Join(mountLoop(t, d.Path, "erofs", "ro"), "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end := make([]byte, 5)
	if n, err := f.ReadAt(end, size-4); n != 4 || err != io.EOF || string(end[:4]) != "\x00end" {
		t.Errorf("read %q, %v", end[:n], err)
	}
}

type zeroReader struct{}

func (zeroReader) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func tarHeader(t testing.TB, h *tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
