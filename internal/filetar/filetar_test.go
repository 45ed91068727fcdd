package filetar

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func stream(t *testing.T, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		body := ""
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			body = "content of " + h.Name
			h.Size = int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, body)
	}
	w.Close()
	return &b
}

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestTreeComesThroughAsItIs(t *testing.T) {
	from, to := filepath.Join(t.TempDir(), "tree"), t.TempDir()
	write(t, from+"/sub/a", "hello")
	old := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	for _, err := range []error{
		os.Link(from+"/sub/a", from+"/twin"), os.Symlink("sub/a", from+"/link"), os.Symlink("/etc/passwd", from+"/away"), os.Chmod(from+"/sub/a", 0o640),
		syscall.Mkfifo(from+"/fifo", 0o600), os.Chtimes(from+"/sub", old, old), os.Chmod(from+"/sub", 0o500),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.Chmod(from+"/sub", 0o700); os.Chmod(to+"/copy/sub", 0o700) })
	var b bytes.Buffer
	if err := Pack(&b, from, PackOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := Unpack(t.Context(), &b, to, UnpackOptions{Name: "copy"}); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(to + "/copy/twin"); string(data) != "hello" {
		t.Errorf("twin: %q, %v", data, err)
	}
	a, _ := os.Stat(to + "/copy/sub/a")
	twin, _ := os.Stat(to + "/copy/twin")
	if a == nil || !os.SameFile(a, twin) || a.Mode().Perm() != 0o640 {
		t.Errorf("the hard link: %v and %v", a, twin)
	}
	for name, want := range map[string]string{"link": "sub/a", "away": "/etc/passwd"} {
		if got, _ := os.Readlink(to + "/copy/" + name); got != want {
			t.Errorf("link %s leads to %q, want %q", name, got, want)
		}
	}
	if fi, err := os.Stat(to + "/copy/sub"); err != nil || fi.Mode().Perm() != 0o500 || !fi.ModTime().Equal(old) {
		t.Errorf("directory: %v, %v", fi, err)
	}
	if fi, err := os.Lstat(to + "/copy/fifo"); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
		t.Errorf("fifo: %v, %v", fi, err)
	}
}

func TestHolesStayHoles(t *testing.T) {
	dir, to := t.TempDir(), t.TempDir()
	const size = 1 << 30
	f, err := os.Create(dir + "/holes")
	if err != nil {
		t.Fatal(err)
	}
	f.Truncate(size)
	f.WriteAt([]byte("begin"), 0)
	f.WriteAt([]byte("middle"), 500<<20)
	f.Close()
	write(t, dir+"/next", "after it") // what follows in the stream
	write(t, dir+"/zeros", strings.Repeat("\x00", 1<<20)+"x")
	var b bytes.Buffer
	if err := Pack(&b, dir, PackOptions{Name: "."}); err != nil {
		t.Fatal(err)
	}
	if b.Len() > 2<<20 {
		t.Errorf("the stream has %d bytes: the holes travel", b.Len())
	}
	if err := Unpack(t.Context(), &b, to, UnpackOptions{Name: "."}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int64{"holes": size, "zeros": 1<<20 + 1} {
		fi, err := os.Stat(filepath.Join(to, name))
		if err != nil || fi.Size() != want || fi.Sys().(*syscall.Stat_t).Blocks > 64 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	got := make([]byte, 6)
	g, _ := os.Open(to + "/holes")
	defer g.Close()
	if _, err := g.ReadAt(got, 500<<20); err != nil || string(got) != "middle" {
		t.Errorf("in the middle: %q, %v", got, err)
	}
	if data, _ := os.ReadFile(to + "/next"); string(data) != "after it" {
		t.Errorf("the next file: %q", data)
	}
}

// A stranger's stream writes nothing outside of the directory, by name or by link, and nothing that is dangerous in it.
func TestHostileStreams(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/victim", "untouched")
	reg := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	for name, tc := range map[string]struct {
		headers []tar.Header
		fails   bool
	}{
		"dots":                 {[]tar.Header{reg("x/../../victim")}, true},
		"dots at the end":      {[]tar.Header{{Typeflag: tar.TypeDir, Name: "x/.."}}, true},
		"absolute":             {[]tar.Header{reg(outside + "/victim")}, false}, // what it is called in there does not matter
		"link to a directory":  {[]tar.Header{{Typeflag: tar.TypeSymlink, Name: "x/l", Linkname: outside}, reg("x/l/victim")}, true},
		"link to dots":         {[]tar.Header{{Typeflag: tar.TypeSymlink, Name: "x/l", Linkname: "../../../../../../" + outside}, reg("x/l/victim")}, true},
		"link over a link":     {[]tar.Header{{Typeflag: tar.TypeSymlink, Name: "x/l", Linkname: outside + "/victim"}, reg("x/l")}, false},
		"the tree is a link":   {[]tar.Header{{Typeflag: tar.TypeSymlink, Name: "x", Linkname: outside}, reg("x/victim")}, true},
		"hard link out":        {[]tar.Header{{Typeflag: tar.TypeLink, Name: "x/h", Linkname: "../victim"}}, true},
		"hard link by a link":  {[]tar.Header{{Typeflag: tar.TypeSymlink, Name: "x/l", Linkname: outside}, {Typeflag: tar.TypeLink, Name: "x/h", Linkname: "x/l/victim"}}, true},
		"second tree":          {[]tar.Header{reg("x/a"), reg("y/b")}, true},
		"device":               {[]tar.Header{{Typeflag: tar.TypeBlock, Name: "x/dev", Devmajor: 8}}, false},
		"huge":                 {[]tar.Header{{Typeflag: tar.TypeReg, Name: "x/huge", Size: 1 << 62}}, true},
		"directory mode later": {[]tar.Header{{Typeflag: tar.TypeDir, Name: "x/d"}, {Typeflag: tar.TypeSymlink, Name: "x/d", Linkname: outside}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range tc.headers {
				if h.Typeflag == tar.TypeReg && h.Size == 0 {
					h.Size = 5
				}
				h.Mode = 0o6755
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
				if h.Size == 5 {
					io.WriteString(w, "taken")
				}
			}
			w.Flush()
			err := Unpack(t.Context(), &b, dir, UnpackOptions{Name: "x", NoReplaceKind: true})
			if (err != nil) != tc.fails {
				t.Errorf("got %v", err)
			}
			if data, err := os.ReadFile(outside + "/victim"); string(data) != "untouched" {
				t.Fatalf("the file outside: %q, %v", data, err)
			}
			if entries, _ := os.ReadDir(outside); len(entries) != 1 {
				t.Fatalf("outside: %v", entries)
			}
			filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil {
					t.Fatal(err)
				}
				fi, _ := d.Info()
				if fi.Mode()&(fs.ModeDevice|fs.ModeSetuid|fs.ModeSetgid) != 0 || strings.HasPrefix(d.Name(), ".atoll-") {
					t.Errorf("left behind: %s %v", path, fi.Mode())
				}
				return nil
			})
		})
	}
}

// What lies beside the tree in the directory is out of a stranger's reach as well: `cp web:/etc/hostname .` at home is no way to ~/.ssh.
func TestHostileStreamsDoNotReachWhatLiesBeside(t *testing.T) {
	reg := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	toKeys := tar.Header{Typeflag: tar.TypeSymlink, Name: "x/l", Linkname: "../.ssh"}
	for name, headers := range map[string][]tar.Header{
		"file by a link":              {toKeys, reg("x/l/authorized_keys")},
		"new file by a link":          {toKeys, reg("x/l/rc")},
		"directory by a link":         {toKeys, {Typeflag: tar.TypeDir, Name: "x/l/d"}},
		"missing directory by a link": {toKeys, reg("x/l/d/f")},
		"mode of the linked":          {toKeys, {Typeflag: tar.TypeDir, Name: "x/l"}},
		"hard link out":               {toKeys, {Typeflag: tar.TypeLink, Name: "x/h", Linkname: "x/l/authorized_keys"}},
		"hard link in":                {reg("x/f"), toKeys, {Typeflag: tar.TypeLink, Name: "x/l/rc", Linkname: "x/f"}},
		"link of an earlier copy":     {reg("x/old/authorized_keys")},
		"mode by an earlier link":     {{Typeflag: tar.TypeDir, Name: "x/old"}},
		"the tree is a link":          {{Typeflag: tar.TypeSymlink, Name: "x", Linkname: ".ssh"}, reg("x/authorized_keys")},
		"another tree":                {reg("x/f"), reg(".ssh/authorized_keys")},
		"another tree first":          {reg("../.ssh/authorized_keys")},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir+"/.ssh/authorized_keys", "untouched")
			if err := errors.Join(os.Chmod(dir+"/.ssh", 0o700), os.Mkdir(dir+"/x", 0o755), os.Symlink("../.ssh", dir+"/x/old")); err != nil {
				t.Fatal(err)
			}
			if name == "the tree is a link" {
				os.RemoveAll(dir + "/x")
			}
			before, _ := os.Stat(dir + "/.ssh")
			if err := Unpack(t.Context(), stream(t, headers...), dir, UnpackOptions{Name: "x", NoReplaceKind: true}); err == nil {
				t.Error("it was taken")
			}
			after, err := os.Stat(dir + "/.ssh")
			if err != nil || after.Mode() != before.Mode() || !after.ModTime().Equal(before.ModTime()) {
				t.Errorf("the directory beside: %v, %v", after, err)
			}
			keys, err := os.Stat(dir + "/.ssh/authorized_keys")
			if err != nil || keys.Sys().(*syscall.Stat_t).Nlink != 1 {
				t.Errorf("the file beside: %v, %v", keys, err)
			}
			if data, _ := os.ReadFile(dir + "/.ssh/authorized_keys"); string(data) != "untouched" {
				t.Errorf("the file beside: %q", data)
			}
		})
	}
}

// In a machine its own links count.
func TestLinksInsideAreFollowedForAFriend(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/real/old", "old")
	if err := os.Symlink("real", dir+"/l"); err != nil {
		t.Fatal(err)
	}
	b := stream(t, tar.Header{Typeflag: tar.TypeReg, Name: "l/f"}, tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "l/f"})
	if err := Unpack(t.Context(), b, dir, UnpackOptions{FollowLinks: true}); err != nil {
		t.Fatal(err)
	}
	f, _ := os.Stat(dir + "/real/f")
	h, _ := os.Stat(dir + "/h")
	if f == nil || !os.SameFile(f, h) {
		t.Errorf("got %v and its hard link %v", f, h)
	}
}

func TestNamesInErrorsAreQuoted(t *testing.T) {
	err := Unpack(t.Context(), stream(t, tar.Header{Typeflag: tar.TypeReg, Name: "x/\x1b[2J\n/../y"}), t.TempDir(), UnpackOptions{Name: "x"})
	if err == nil || strings.ContainsAny(err.Error(), "\x1b\n") {
		t.Errorf("got %q", err)
	}
}

func TestKindsAreNotReplaced(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/x/dir/in", "kept")
	write(t, dir+"/x/file", "kept")
	for _, h := range []tar.Header{{Typeflag: tar.TypeReg, Name: "x/dir"}, {Typeflag: tar.TypeDir, Name: "x/file/"}} {
		if err := Unpack(t.Context(), stream(t, h), dir, UnpackOptions{NoReplaceKind: true}); err == nil || !strings.Contains(err.Error(), "cannot overwrite") {
			t.Errorf("%s: %v", h.Name, err)
		}
		if err := Unpack(t.Context(), stream(t, h), dir, UnpackOptions{}); err != nil {
			t.Errorf("%s: %v", h.Name, err)
		}
	}
}

// What is there stays until the new file is whole.
func TestBrokenStreamLeavesTheOldFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "old")
	b := stream(t, tar.Header{Typeflag: tar.TypeReg, Name: "f", Size: 100 << 10}).Bytes()
	err := Unpack(t.Context(), io.MultiReader(bytes.NewReader(b[:512]), bytes.NewReader(make([]byte, 60<<10))), dir, UnpackOptions{})
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	entries, _ := os.ReadDir(dir)
	if data, _ := os.ReadFile(dir + "/f"); string(data) != "old" || len(entries) != 1 {
		t.Errorf("%q, beside it %v", data, entries)
	}
}

func TestBase(t *testing.T) {
	for p, want := range map[string]string{"/a/b": "b", "a": "a", "a/b/": "b", "a/.": ".", "/": ".", "": ".", ".": ".", "/a/..": ".", "/a/../b": "b"} {
		if got := Base(p); got != want {
			t.Errorf("Base(%q) = %q, want %q", p, got, want)
		}
	}
}

// FuzzUnpack: whatever the stream, nothing appears beside the directory, nor, for one that comes from a stranger, beside its tree. The input
// is a line for each header, "KIND NAME>LINK": a tar stream's checksums would have nearly every mutation refused, and its padding the fuzzer
// shorten each input for a minute.
func FuzzUnpack(f *testing.F) {
	f.Add("2 x/l>../beside\n0 x/l/f", "x", false)
	f.Add("5 x/d\n2 x/d/l>../../beside\n1 x/h>x/d/l/f", "x", false)
	f.Add("0 y/old/f\n6 y/p\n5 y/old", "x", true)
	f.Add("2 l>..\n0 l/out", "", true)
	f.Add("6 x/pipe\n0 x/pipe/f", "", false) // which must not be waited for
	f.Add("6 x/pipe\n0 x/pipe/f", "", true)
	f.Fuzz(func(t *testing.T, lines, name string, follow bool) {
		if len(lines) > 1000 || name != "" && name != "." && (!filepath.IsLocal(name) || name == "beside") {
			t.Skip()
		}
		parent := t.TempDir()
		dir := filepath.Join(parent, "in")
		write(t, dir+"/beside/f", "untouched")
		if err := errors.Join(os.Mkdir(dir+"/x", 0o755), os.Symlink("../beside", dir+"/x/old"), os.Chmod(dir+"/beside", 0o750)); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for line := range strings.Lines(lines) {
			kind, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			called, link, _ := strings.Cut(rest, ">")
			if kind == "" {
				continue
			}
			if w.WriteHeader(&tar.Header{Typeflag: kind[0], Name: called, Linkname: link, Mode: 0o777}) != nil {
				w = tar.NewWriter(&b) // it allows no more after a fault
			}
		}
		w.Close()
		_ = Unpack(t.Context(), &b, dir, UnpackOptions{Name: name, NoReplaceKind: true, FollowLinks: follow})
		if entries, _ := os.ReadDir(parent); len(entries) != 1 || entries[0].Name() != "in" {
			t.Fatalf("beside the directory: %v", entries)
		}
		if follow || name == "" || name == "." || strings.HasPrefix(filepath.Clean(name)+"/", "beside/") {
			return
		}
		in, err := os.Stat(dir + "/beside")
		entries, _ := os.ReadDir(dir + "/beside")
		kept, err2 := os.Stat(dir + "/beside/f")
		if errors.Join(err, err2) != nil || in.Mode().Perm() != 0o750 || len(entries) != 1 || kept.Size() != 9 || kept.Sys().(*syscall.Stat_t).Nlink != 1 {
			t.Fatalf("beside the tree: %v %v %v", in, entries, errors.Join(err, err2))
		}
	})
}
