//go:build linux

package kernel

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// A tree that behaves to a build as Linux does, in a second: it takes any configuration but CONFIG_UNKNOWN, and what it builds is as little
// of an ELF as is a kernel to us. Its build fails when it can do what it must not.
const (
	tinyMakefile = `VERSION = 6
PATCHLEVEL = 1
SUBLEVEL = 999
EXTRAVERSION =

allnoconfig:
	grep -v CONFIG_UNKNOWN $(KCONFIG_ALLCONFIG) >$(O)/.config
olddefconfig:
	grep -v CONFIG_UNKNOWN $(O)/.config >$(O)/.new; mv $(O)/.new $(O)/.config
vmlinux:
	@if [ -n "$(ROOT)" ] || [ "$$(id -u)" = 0 ]; then echo built as root; exit 1; fi
	@if [ -d /tmp/linux ] && { touch made || touch /var/tmp/made || touch /dev/shm/made; } 2>/dev/null; then echo could write elsewhere; exit 1; fi
	@echo "  CC      tiny.o"
	@gcc -nostdlib -static -Wl,-e0 -o $(O)/vmlinux tiny.S
`
	tinySource = `.section .note.Xen, "a", @note
.long 4, 4, 18
.asciz "Xen"
.long 0
.section .rodata
.asciz "Linux version 6.1.999-tiny (me) #1"
`
)

func tinyTree(t *testing.T) string {
	t.Helper()
	if os.Geteuid() == 0 && runtime.GOARCH != "amd64" {
		t.Skip("the tiny kernel is for x86-64")
	}
	if missing, install := MissingBuildTools(t.Context(), "amd64", runtime.GOARCH); len(missing) > 0 {
		t.Fatalf("no %s: %s", missing, install)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"Makefile": tinyMakefile, "Kconfig": "", "tiny.S": tinySource} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// lines gathers what a build says.
type lines []string

func (l *lines) add(s string) { *l = append(*l, s) }

func TestBuild(t *testing.T) {
	s := open(t)
	path := filepath.Join(t.TempDir(), "file")
	os.WriteFile(path, tinyELF("Xen"), 0o644)
	if _, err := s.Import(t.Context(), path, "first"); err != nil {
		t.Fatal(err)
	}
	tree := tinyTree(t)
	var said lines
	var steps []string
	o := BuildOptions{Source: tree, Arch: "amd64", Line: said.add, Progress: func(tr Transfer) { steps = append(steps, tr.Status) }}
	k, err := s.Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if k.Name != "atoll-6.1.999" || k.Version != "6.1.999-tiny" || !k.Default || k.NeedsACPI || !k.ACPI || k.ConfigDigest == "" || !strings.Contains(k.Source, tree) {
		t.Errorf("%+v", k)
	}
	if strings.Join(said, "|") != "Kernel atoll-6.1.999 is the default now" || len(steps) < 2 {
		t.Errorf("it said %q, %q", said, steps)
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(k.Path), configFile))
	if err != nil || !strings.Contains(string(text), "CONFIG_EROFS_FS=y\n") {
		t.Errorf("the configuration kept: %v", err)
	}

	// The same again is there already; under another name, a second time.
	if err := s.SetDefault(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	said = nil
	o.Line = said.add
	if again, err := s.Build(t.Context(), o); err != nil || again.Created != k.Created || !again.Default || !strings.HasPrefix(said[0], "Already built: atoll-6.1.999") {
		t.Errorf("the second build: %+v, %v, %q", again, err, said)
	}
	o.Name = "other"
	if other, err := s.Build(t.Context(), o); err != nil || other.Digest != k.Digest || other.Name != "other" || !other.Default || !isFile(other.Path) || other.ConfigDigest != k.ConfigDigest {
		t.Errorf("under another name: %+v, %v", other, err)
	}
	// Another configuration or another source is another kernel.
	o.Name, o.Config = "", []byte("CONFIG_XFS_FS=y\n")
	fragment, err := s.Build(t.Context(), o)
	if err != nil || fragment.BuildKey == k.BuildKey || !strings.HasPrefix(fragment.Name, "atoll-6.1.999-") {
		t.Errorf("with a fragment: %+v, %v", fragment, err)
	}
	o.Config = nil
	os.WriteFile(filepath.Join(tree, "tiny.S"), []byte(strings.Replace(tinySource, "-tiny", "-teeny", 1)), 0o644)
	if changed, err := s.Build(t.Context(), o); err != nil || changed.Version != "6.1.999-teeny" || changed.Name != k.Name {
		t.Errorf("with another source: %+v, %v", changed, err)
	}
	// A build takes no name of a kernel that came from elsewhere or that machines use; a name of its own making gives way.
	o.Name = "first"
	if _, err := s.Build(t.Context(), o); !errdefs.IsAlreadyExists(err) {
		t.Errorf("over an imported kernel: %v", err)
	}
	s.SetInUse(func(name string) []string { return map[string][]string{k.Name: {"web"}, "other": {"web"}}[name] })
	o.Name = "other"
	if _, err := s.Build(t.Context(), o); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "web") {
		t.Errorf("over a kernel in use: %v", err)
	}
	o.Name = ""
	os.WriteFile(filepath.Join(tree, "tiny.S"), []byte(strings.Replace(tinySource, "-tiny", "-third", 1)), 0o644)
	if third, err := s.Build(t.Context(), o); err != nil || !strings.HasPrefix(third.Name, k.Name+"-") {
		t.Errorf("beside a kernel in use: %+v, %v", third, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.opts.Dir, tempPrefix+"*")); len(left) > 0 {
		t.Error("left behind:", left)
	}
}

func TestForeignKernelsAreNoDefault(t *testing.T) {
	s := open(t)
	for name, k := range map[string]Kernel{"came": {Foreign: true}, "arm": {}} {
		dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
		if err != nil {
			t.Fatal(err)
		}
		img := image{arch: runtime.GOARCH, data: []byte("kernel")}
		if name == "arm" {
			img.arch = "other"
		}
		k.Name = name
		if k, err := s.add(dir, img, k); err != nil || k.Default {
			t.Errorf("%s: %+v, %v", name, k, err)
		}
	}
}

func TestBuildFails(t *testing.T) {
	for name, c := range map[string]struct {
		change func(tree string, o *BuildOptions)
		class  func(error) bool
		says   []string
		log    bool
	}{
		"compiler": {func(tree string, _ *BuildOptions) {
			os.WriteFile(filepath.Join(tree, "tiny.S"), []byte("nonsense\n"), 0o644)
		}, errdefs.IsFailedPrecondition, []string{"make vmlinux", "tiny.S:1: Error"}, true},
		"unknown symbol": {func(_ string, o *BuildOptions) { o.Config = []byte("CONFIG_UNKNOWN=y\n") },
			errdefs.IsFailedPrecondition, []string{"CONFIG_UNKNOWN is n instead of y"}, false},
		"symbol that guests need": {func(_ string, o *BuildOptions) { o.Config = []byte("# CONFIG_EROFS_FS is not set\n") },
			errdefs.IsFailedPrecondition, []string{"CONFIG_EROFS_FS"}, false},
		"module": {func(_ string, o *BuildOptions) { o.Config = []byte("CONFIG_XFS_FS=m\n") },
			errdefs.IsInvalidArgument, []string{"CONFIG_XFS_FS=m"}, false},
		"no configuration": {func(_ string, o *BuildOptions) { o.Config = []byte("hello\nCONFIG_A=y\nrm -rf /\n") },
			errdefs.IsInvalidArgument, []string{"--config:1", "--config:3"}, false},
		"whole configuration without PVH": {func(_ string, o *BuildOptions) {
			o.Config = []byte("#\n# Automatically generated file; DO NOT EDIT.\n#\nCONFIG_VIRTIO_MMIO=y\n")
		}, errdefs.IsFailedPrecondition, []string{"CONFIG_PVH", "CONFIG_VIRTIO_BLK"}, false},
		"other version": {func(_ string, o *BuildOptions) { o.Version = "6.2" }, errdefs.IsInvalidArgument, []string{"6.1.999", "6.2"}, false},
		"no tree":       {func(tree string, _ *BuildOptions) { os.Remove(filepath.Join(tree, "Kconfig")) }, errdefs.IsInvalidArgument, []string{"no source of Linux"}, false},
		"used tree": {func(tree string, _ *BuildOptions) { os.WriteFile(filepath.Join(tree, ".config"), nil, 0o644) },
			errdefs.IsFailedPrecondition, []string{".config"}, false},
		"no kernel comes out": {func(tree string, _ *BuildOptions) {
			os.WriteFile(filepath.Join(tree, "tiny.S"), []byte(strings.Replace(tinySource, "Xen", "Zen", 2)), 0o644)
		}, errdefs.IsInvalidArgument, []string{"no PVH entry"}, false},
		"link instead of a kernel": {func(tree string, _ *BuildOptions) {
			os.WriteFile(filepath.Join(tree, "Makefile"), []byte(tinyMakefile+"\n\t@ln -sf /etc/passwd $(O)/.config\n"), 0o644)
		}, func(err error) bool { return strings.Contains(err.Error(), "escapes") }, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			s.opts.Cache = t.TempDir()
			tree := tinyTree(t)
			o := BuildOptions{Source: tree, Arch: "amd64"}
			c.change(tree, &o)
			_, err := s.Build(t.Context(), o)
			if err == nil || !c.class(err) {
				t.Fatalf("got %v", err)
			}
			for _, text := range c.says {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%v does not say %q", err, text)
				}
			}
			kept := filepath.Join(s.opts.Cache, buildLogName)
			if isFile(kept) != c.log || c.log && !strings.Contains(hint.Of(err), kept) {
				t.Errorf("log %t, hint %q", isFile(kept), hint.Of(err))
			}
			if left, _ := os.ReadDir(s.opts.Dir); len(left) > 0 {
				t.Error("left behind:", left)
			}
		})
	}
}

func TestBuildGivenUp(t *testing.T) {
	s := open(t)
	s.opts.Cache = t.TempDir()
	tree := tinyTree(t)
	word := fmt.Sprintf("98765.%d", os.Getpid()) // names the build's processes
	os.WriteFile(filepath.Join(tree, "Makefile"), []byte(strings.Replace(tinyMakefile, "vmlinux:\n", "vmlinux:\n\t@sleep "+word+" & setsid sleep "+word+"\n", 1)), 0o644)
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the caller has gone")
	defer cancel(nil)
	go func() {
		defer cancel(gone)
		for range 200 {
			if len(processes(word)) >= 2 {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	if _, err := s.Build(ctx, BuildOptions{Source: tree, Arch: "amd64"}); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
	for _, pid := range processes(word) {
		syscall.Kill(pid, syscall.SIGKILL)
		if os.Geteuid() == 0 { // else what has left the process group lives on
			t.Error("a process lives on:", pid)
		}
	}
	if left, _ := os.ReadDir(s.opts.Dir); len(left) > 0 {
		t.Error("left behind:", left)
	}
	if left, _ := os.ReadDir(s.opts.Cache); len(left) > 0 {
		t.Error("left in the cache:", left)
	}
}

func processes(word string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if data, _ := os.ReadFile(filepath.Join(d, "cmdline")); strings.HasPrefix(string(data), "sleep\x00"+word) {
			pid, _ := strconv.Atoi(filepath.Base(d))
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestBuildRefuses(t *testing.T) {
	s := open(t)
	for name, o := range map[string]BuildOptions{
		"architecture":        {Arch: "vax"},
		"name":                {Name: "../x"},
		"version":             {Version: "new"},
		"jobs":                {Jobs: -1},
		"hash":                {Source: "http://x/y", SHA256: "abc"},
		"hash without a URL":  {SHA256: strings.Repeat("a", 64)},
		"keys without a URL":  {Keyring: []byte("x")},
		"a source of no kind": {Source: "gentoo", Arch: "amd64"},
	} {
		if _, err := s.Build(t.Context(), o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Build(t.Context(), BuildOptions{Version: "2.6", Arch: "amd64"}); !errdefs.IsNotFound(err) || !strings.Contains(hint.Of(err), "6.1") {
		t.Errorf("a version that Debian does not have: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := s.Build(t.Context(), BuildOptions{Arch: "amd64"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "gcc, make, flex, bison, bc") ||
		!strings.Contains(hint.Of(err), "apt install gcc make flex bison bc") || !strings.Contains(hint.Of(err), "libelf-dev libssl-dev") {
		t.Errorf("without tools: %v, hint %q", err, hint.Of(err))
	}
}

// packTree makes the archive of a tree, as kernel.org does.
func packTree(t *testing.T, tree string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(tree, path)
		if err := w.WriteHeader(&tar.Header{Name: "linux-6.1.999/" + rel, Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func newKey(t *testing.T) (*openpgp.Entity, []byte) {
	t.Helper()
	key, err := openpgp.NewEntity("Linus", "", "linus@example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	var public bytes.Buffer
	if err := key.Serialize(&public); err != nil {
		t.Fatal(err)
	}
	return key, public.Bytes()
}

func TestBuildFromArchive(t *testing.T) {
	plain := packTree(t, tinyTree(t))
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write(plain)
	z.Close()
	key, public := newKey(t)
	_, stranger := newKey(t)
	sign := func(data []byte) []byte {
		var out bytes.Buffer
		if err := openpgp.ArmoredDetachSign(&out, key, bytes.NewReader(data), nil); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	other := bytes.Clone(packed.Bytes())
	files := map[string][]byte{
		"/linux-1.tar.gz": packed.Bytes(), "/linux-1.tar.sign": sign(plain), // as kernel.org
		"/linux-2.tar.gz": packed.Bytes(), "/linux-2.tar.gz.asc": sign(packed.Bytes()),
		"/linux-3.tar.gz": packed.Bytes(), "/linux-3.tar.sign": sign([]byte("something else")),
		"/linux-4.tar.gz": other,
		"/linux-5.tar.gz": packed.Bytes()[:packed.Len()/2],
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write(data)
	}))
	defer server.Close()
	sum := sha256.Sum256(packed.Bytes())
	hash := hex.EncodeToString(sum[:])
	half := sha256.Sum256(files["/linux-5.tar.gz"])
	for name, c := range map[string]struct {
		path, sha256 string
		keyring      []byte
		class        func(error) bool // nil: it is built
		hinted       string
	}{
		"signed tar":            {"/linux-1.tar.gz", "", public, nil, ""},
		"signed archive":        {"/linux-2.tar.gz", "", public, nil, ""},
		"hash":                  {"/linux-4.tar.gz", hash, nil, nil, ""},
		"nothing vouches":       {"/linux-1.tar.gz", "", nil, errdefs.IsFailedPrecondition, "--keyring"},
		"a stranger's key":      {"/linux-1.tar.gz", "", stranger, errdefs.IsDataLoss, "--keyring"},
		"a bad signature":       {"/linux-3.tar.gz", "", public, errdefs.IsDataLoss, "changed"},
		"no signature":          {"/linux-4.tar.gz", "", public, errdefs.IsNotFound, "--sha256"},
		"another hash":          {"/linux-4.tar.gz", strings.Repeat("a", 64), nil, errdefs.IsDataLoss, "hash"},
		"no keys":               {"/linux-1.tar.gz", "", []byte("hello"), errdefs.IsInvalidArgument, "gpg --export"},
		"nothing there":         {"/linux-9.tar.gz", hash, nil, errdefs.IsNotFound, "URL"},
		"half, and meant to be": {"/linux-5.tar.gz", hex.EncodeToString(half[:]), nil, func(err error) bool { return strings.Contains(err.Error(), "unpacking") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			s.opts.Cache = t.TempDir()
			o := BuildOptions{Source: server.URL + c.path, SHA256: c.sha256, Keyring: c.keyring, Arch: "amd64"}
			k, err := s.Build(t.Context(), o)
			if c.class != nil {
				if err == nil || !c.class(err) || !strings.Contains(hint.Of(err), c.hinted) {
					t.Errorf("got %v, hint %q", err, hint.Of(err))
				}
				if left, _ := os.ReadDir(s.opts.Dir); len(left) > 0 {
					t.Error("left behind:", left)
				}
				return
			}
			if err != nil || k.Version != "6.1.999-tiny" || !strings.Contains(k.Source, server.URL+c.path) {
				t.Fatalf("%+v, %v", k, err)
			}
			if again, err := s.Build(t.Context(), o); err != nil || again.Created != k.Created {
				t.Errorf("the second time: %+v, %v", again, err)
			}
		})
	}
	t.Run("changed on the way", func(t *testing.T) {
		s := open(t)
		s.opts.Cache = t.TempDir()
		var changed bytes.Buffer
		z := gzip.NewWriter(&changed)
		z.Write(bytes.Replace(plain, []byte("Linux version"), []byte("Minix version"), 1))
		z.Close()
		files["/linux-1.tar.gz"] = changed.Bytes()
		if _, err := s.Build(t.Context(), BuildOptions{Source: server.URL + "/linux-1.tar.gz", Keyring: public, Arch: "amd64"}); !errdefs.IsDataLoss(err) {
			t.Errorf("got %v", err)
		}
		if left, _ := os.ReadDir(s.opts.Cache); len(left) > 0 {
			t.Error("left in the cache:", left)
		}
	})
}

func TestUnpackStaysInside(t *testing.T) {
	for name, entries := range map[string][]tar.Header{
		"dots":          {{Name: "linux/../../x", Size: 0, Typeflag: tar.TypeReg}},
		"link out":      {{Name: "linux/a", Linkname: "/tmp", Typeflag: tar.TypeSymlink}, {Name: "linux/a/x", Typeflag: tar.TypeReg}},
		"device":        {{Name: "linux/null", Typeflag: tar.TypeChar}},
		"twice":         {{Name: "linux/a", Typeflag: tar.TypeReg}, {Name: "linux/a", Typeflag: tar.TypeReg}},
		"more than all": {{Name: "linux/a", Size: treeMax + 1, Typeflag: tar.TypeReg}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			w := tar.NewWriter(&out)
			for _, h := range entries {
				h.Mode = 0o644
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
			}
			parent := t.TempDir()
			dir := filepath.Join(parent, "src")
			os.Mkdir(dir, 0o755)
			err := unpackTar(t.Context(), &out, dir)
			if err == nil && name != "dots" { // which is a name at the top
				t.Error("accepted")
			}
			if all, _ := os.ReadDir(parent); len(all) != 1 {
				t.Error("something is outside:", all)
			}
		})
	}
}
