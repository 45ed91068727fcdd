package base

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
)

// alpineArchive is a small Alpine on loopback, signed with a key of its own.
type alpineArchive struct {
	key   *rsa.PrivateKey
	files map[string][]byte // by path; a test may spoil them
	url   string
	index string
}

type alpineFile struct {
	name, text, link string
	mode             int64
}

func gzipTar(t *testing.T, open bool, files ...alpineFile) []byte {
	t.Helper()
	var b, out bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Size: int64(len(f.text)), Mode: f.mode}
		switch {
		case f.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		case strings.HasSuffix(f.name, "/"):
			h.Typeflag = tar.TypeDir
		case !strings.HasPrefix(f.name, "."):
			h.PAXRecords = map[string]string{"APK-TOOLS.checksum.SHA1": fmt.Sprintf("%x", sha1.Sum([]byte(f.text)))}
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		tw.Write([]byte(f.text))
	}
	if open { // as abuild-tar --cut: without the empty blocks at the end
		tw.Flush()
	} else {
		tw.Close()
	}
	zw := gzip.NewWriter(&out)
	zw.Write(b.Bytes())
	zw.Close()
	return out.Bytes()
}

func newAlpine(t *testing.T) *alpineArchive {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	a := &alpineArchive{key: key, files: map[string][]byte{}}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := a.files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write(data)
	}))
	t.Cleanup(srv.Close)
	a.url = srv.URL + "/alpine"
	return a
}

func (a *alpineArchive) keyring(t *testing.T) []byte {
	der, err := x509.MarshalPKIXPublicKey(&a.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func (a *alpineArchive) dir(repository string) string {
	return "/alpine/v3.22/" + repository + "/" + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH] + "/"
}

func (a *alpineArchive) add(t *testing.T, name, more string, scripts []alpineFile, files ...alpineFile) {
	t.Helper()
	data := gzipTar(t, false, files...)
	control := gzipTar(t, true, append([]alpineFile{{name: ".PKGINFO", text: fmt.Sprintf("pkgname = %s\ndatahash = %x\n", name, sha256.Sum256(data)), mode: 0o644}}, scripts...)...)
	file := append(append(gzipTar(t, true, alpineFile{name: ".SIGN.RSA.test.rsa.pub", text: "not looked at", mode: 0o644}), control...), data...)
	a.files[a.dir("main")+name+"-1.0-r0.apk"] = file
	sum := sha1.Sum(control)
	a.index += fmt.Sprintf("C:Q1%s\nP:%s\nV:1.0-r0\nS:%d\nI:1\nt:1700000000\n%s\n", base64.StdEncoding.EncodeToString(sum[:]), name, len(file), more)
}

func (a *alpineArchive) sign(t *testing.T) {
	t.Helper()
	for repository, text := range map[string]string{"main": a.index, "community": ""} {
		index := gzipTar(t, false, alpineFile{name: "DESCRIPTION", text: "v3.22", mode: 0o644}, alpineFile{name: "APKINDEX", text: text, mode: 0o644})
		sum := sha256.Sum256(index)
		signature, err := rsa.SignPKCS1v15(rand.Reader, a.key, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		a.files[a.dir(repository)+"APKINDEX.tar.gz"] = append(gzipTar(t, true, alpineFile{name: ".SIGN.RSA256.test.rsa.pub", text: string(signature), mode: 0o644}), index...)
	}
}

// filled has what Alpine's lists ask for, in small.
func filled(t *testing.T) *alpineArchive {
	a := newAlpine(t)
	script := []alpineFile{{name: ".post-install", text: "#!/bin/busybox sh\n", mode: 0o755}}
	a.add(t, "alpine-baselayout", "D:/bin/sh so:libc.musl.so.1\n", script, alpineFile{name: "etc/", mode: 0o755}, alpineFile{name: "sbin/", mode: 0o755}, alpineFile{name: "tmp/", mode: 0o1777}, alpineFile{name: "etc/inittab", text: "tty1::respawn:x\n", mode: 0o644})
	a.add(t, "musl", "p:so:libc.musl.so.1=1\n", nil, alpineFile{name: "lib/", mode: 0o755}, alpineFile{name: "lib/libc.so", text: "libc", mode: 0o755})
	a.add(t, "busybox", "D:so:libc.musl.so.1\n", script, alpineFile{name: "bin/", mode: 0o755}, alpineFile{name: "bin/busybox", text: "ELF", mode: 0o755},
		alpineFile{name: "etc/", mode: 0o755}, alpineFile{name: "etc/busybox-paths.d/", mode: 0o755}, alpineFile{name: "etc/busybox-paths.d/busybox", text: "bin/ls\nsbin/init\n../../evil\n", mode: 0o644})
	a.add(t, "busybox-binsh", "D:busybox=1.0-r0\np:/bin/sh cmd:sh\nk:100\n", nil, alpineFile{name: "bin/sh", link: "/bin/busybox", mode: 0o777})
	a.add(t, "dash-binsh", "p:/bin/sh\nk:60\n", nil, alpineFile{name: "bin/sh", link: "dash", mode: 0o777})
	a.add(t, "busybox-openrc", "i:openrc busybox=1.0-r0\n", nil, alpineFile{name: "etc/init.d/", mode: 0o755}, alpineFile{name: "etc/init.d/syslog", text: "#!/sbin/openrc-run\n", mode: 0o755})
	a.add(t, "openrc", "D:/bin/sh !sysvinit\n", script, alpineFile{name: "sbin/", mode: 0o755}, alpineFile{name: "sbin/openrc", text: "ELF", mode: 0o755})
	for _, empty := range []string{"alpine-keys", "alpine-release", "apk-tools", "musl-utils"} {
		a.add(t, empty, "", nil, alpineFile{name: "usr/", mode: 0o755})
	}
	a.add(t, "alpine-base", "D:alpine-baselayout openrc\n", nil)
	a.add(t, "sshd", "", script, alpineFile{name: "usr/", mode: 0o755})
	a.add(t, "jq", "D:so:nowhere.so.9\n", nil, alpineFile{name: "usr/", mode: 0o755})
	a.add(t, "tree", "", nil, alpineFile{name: "usr/", mode: 0o755}, alpineFile{name: "usr/bin/", mode: 0o755}, alpineFile{name: "usr/bin/tree", text: "ELF", mode: 0o755})
	a.sign(t)
	return a
}

func TestAlpine(t *testing.T) {
	a, b := filled(t), builder(t)
	b.Cache = t.TempDir()
	o := Options{Mirror: a.url, Keyring: a.keyring(t), Packages: []string{"tree"}}
	plain, err := b.Build(t.Context(), "alpine:3.22", o, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := b.Build(t.Context(), "alpine:3.22", o, nil)
	if err != nil || again.Digest != plain.Digest {
		t.Errorf("the second build: %v %v", again.Digest, err)
	}
	root := t.TempDir()
	config, entries := unpack(t, b, plain, root)
	if diff := cmp.Diff([]string{"/bin/sh"}, config.Config.Cmd); diff != "" {
		t.Error(diff)
	}
	if entries["bin/sh"] == nil || entries["bin/sh"].Linkname != "/bin/busybox" || entries["bin/ls"].Linkname != "/bin/busybox" || entries["usr/bin/tree"] == nil {
		t.Errorf("%v", entries["bin/sh"])
	}
	if entries["sbin/openrc"] != nil || entries["evil"] != nil || entries["etc/init.d/syslog"] != nil {
		t.Error("the plain base has what only an init needs, or what leads out of it")
	}
	database := readFile(t, root, "lib/apk/db/installed")
	for _, want := range []string{"P:tree\nV:1.0-r0\n", "F:usr/bin\nR:tree\na:0:0:755\nZ:Q1", "F:tmp\nM:0:0:1777\n"} {
		if !strings.Contains(database, want) {
			t.Errorf("apk's database lacks %q:\n%s", want, database)
		}
	}
	if world := readFile(t, root, "etc/apk/world"); !strings.Contains(world, "apk-tools\nbusybox\n") || !strings.HasSuffix(world, "tree\n") {
		t.Errorf("world: %q", world)
	}

	init, err := b.Build(t.Context(), "alpine:3.22-openrc", Options{Mirror: a.url + "/", Keyring: a.keyring(t)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	root = t.TempDir()
	config, entries = unpack(t, b, init, root)
	if diff := cmp.Diff([]string{"/sbin/init"}, config.Config.Cmd); diff != "" {
		t.Error(diff)
	}
	if l := entries["etc/runlevels/boot/syslog"]; l == nil || l.Linkname != "/etc/init.d/syslog" || entries["etc/runlevels/boot/sysctl"] != nil || entries["sbin/init"] == nil {
		t.Error("runlevels are not those of the services that are there")
	}
	if text := readFile(t, root, "etc/inittab"); strings.Contains(text, "tty1") || !strings.Contains(text, "openrc default") {
		t.Error(text)
	}
}

func TestAlpineFaults(t *testing.T) {
	a, b := filled(t), builder(t)
	b.Cache = t.TempDir()
	o := Options{Mirror: a.url, Keyring: a.keyring(t)}
	build := func(change func(o *Options)) error {
		o := o
		change(&o)
		_, err := b.Build(t.Context(), "alpine:3.22", o, nil)
		if err != nil && hint.Of(err) == "" && !errdefs.IsDataLoss(err) {
			t.Errorf("no hint: %v", err)
		}
		return err
	}
	for name, c := range map[string]struct {
		change func(o *Options)
		is     func(error) bool
		says   string
	}{
		"unknown package":    {func(o *Options) { o.Packages = []string{"nosuch"} }, errdefs.IsNotFound, "nosuch"},
		"missing dependency": {func(o *Options) { o.Packages = []string{"jq"} }, errdefs.IsNotFound, "so:nowhere.so.9 (for jq)"},
		"install script":     {func(o *Options) { o.Packages = []string{"sshd"} }, errdefs.IsFailedPrecondition, "sshd"},
		"option as a name":   {func(o *Options) { o.Packages = []string{"--allow-untrusted"} }, errdefs.IsInvalidArgument, "--allow"},
		"snapshot":           {func(o *Options) { o.Snapshot = "2026-01-15" }, errdefs.IsInvalidArgument, "no past"},
		"another's key":      {func(o *Options) { o.Keyring = nil }, errdefs.IsDataLoss, "no known key"},
		"no key":             {func(o *Options) { o.Keyring = []byte("x") }, errdefs.IsInvalidArgument, "no RSA"},
		"unreachable":        {func(o *Options) { o.Mirror = "http://127.0.0.1:1" }, errdefs.IsUnavailable, "127.0.0.1:1"},
		"no Alpine":          {func(o *Options) { o.Mirror = a.url + "/x" }, errdefs.IsNotFound, "APKINDEX"},
	} {
		if err := build(c.change); !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.MkdirAll(b.TempDir, 0o755); err != nil {
		t.Fatal(err)
	}
	none := func(*Options) {}
	for name, path := range map[string]string{"index": a.dir("main") + "APKINDEX.tar.gz", "package": a.dir("main") + "musl-1.0-r0.apk"} {
		good := a.files[path]
		for _, at := range []int{len(good) - 40, len(good) / 2} {
			spoiled := bytes.Clone(good)
			spoiled[at] ^= 1
			a.files[path] = spoiled
			b.Cache = t.TempDir()
			if err := build(none); !errdefs.IsDataLoss(err) {
				t.Errorf("one flipped bit in the %s: %v", name, err)
			}
		}
		a.files[path] = good[:len(good)-30]
		b.Cache = t.TempDir()
		if err := build(none); !errdefs.IsDataLoss(err) {
			t.Errorf("a cut %s: %v", name, err)
		}
		a.files[path] = good
		if err := build(none); err != nil {
			t.Errorf("after a bad %s: %v", name, err)
		}
	}
	nothingLeft(t, b)
}

// TestAlpineItself runs where Alpine's own archive can be reached.
func TestAlpineItself(t *testing.T) {
	if testing.Short() {
		t.Skip("short: it fetches packages")
	}
	b := builder(t)
	d, err := b.Build(t.Context(), "alpine:3.22-openrc", Options{}, nil)
	if errdefs.IsUnavailable(err) {
		t.Skipf("Alpine's archive cannot be reached from here, so nothing was tested with it: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, entries := unpack(t, b, d, "")
	for _, name := range []string{"bin/busybox", "bin/sh", "sbin/apk", "sbin/init", "sbin/openrc", "etc/runlevels/boot/bootmisc", "lib/apk/db/installed"} {
		if entries[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
}

func FuzzAlpineIndex(f *testing.F) {
	f.Add([]byte("C:Q1AAAAAAAAAAAAAAAAAAAAAAAAAAA=\nP:a\nV:1\nS:1\nD:b so:c !d\n\nC:Q1AAAAAAAAAAAAAAAAAAAAAAAAAAA=\nP:b\nV:1\nS:1\np:so:c=1\nD:a\ni:a"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var index []apkPackage
		for stanza := range strings.SplitSeq(string(text), "\n\n") {
			p, err := parseStanza(stanza, "http://m")
			if err != nil {
				continue
			}
			if strings.Count(p.url, "/") != 3 {
				t.Errorf("%q makes %q", stanza, p.url)
			}
			index = append(index, p)
		}
		if len(index) > 0 {
			all, err := resolve(index, []string{index[0].name})
			if err == nil && len(all) == 0 {
				t.Error("nothing chosen")
			}
		}
	})
}

func FuzzAlpinePackage(f *testing.F) {
	f.Add([]byte("\x1f\x8b"))
	f.Fuzz(func(t *testing.T, file []byte) {
		if _, err := verifyIndex(file, nil); err == nil {
			t.Error("an index that nobody signed")
		}
		_, err := readPackage(apkPackage{name: "x", sum: "AAAAAAAAAAAAAAAAAAAAAAAAAAA="}, bytes.NewReader(file), func(*tar.Header, io.Reader) error { return nil })
		if err == nil {
			t.Error("a package that no index has")
		}
	})
}

func readFile(t *testing.T, root, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
