package base

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/sha1"
	"embed"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// alpineKeys are the keys of Alpine for amd64 and arm64, from Debian 13's package distribution-gpg-keys (1.119).
//
//go:embed alpine-keys/*.rsa.pub
var alpineKeys embed.FS

const alpineMirror = "https://dl-cdn.alpinelinux.org/alpine"

// Alpine's own minimal root has the first list; the second is its metapackage for a system with an init.
var (
	alpinePackages     = []string{"alpine-baselayout", "alpine-keys", "alpine-release", "apk-tools", "busybox", "busybox-binsh", "musl-utils"}
	alpineInitPackages = []string{"alpine-base"}
)

// alpineFiles replace those of a system with an init: its login prompts are on the console and on the serial line, as a machine has no
// screen, and its network is up before it begins.
var alpineFiles = map[string]string{
	"etc/inittab": `::sysinit:/sbin/openrc sysinit
::sysinit:/sbin/openrc boot
::wait:/sbin/openrc default
console::respawn:/sbin/getty -L 0 console vt100
ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100
::ctrlaltdel:/sbin/reboot
::shutdown:/sbin/openrc shutdown
`,
	"etc/network/interfaces": "auto lo\niface lo inet loopback\n",
}

// alpineServices are started where the packages have them, by runlevel.
var alpineServices = map[string][]string{
	"sysinit":  {"devfs", "dmesg"},
	"boot":     {"bootmisc", "hostname", "sysctl", "syslog", "seedrng"},
	"shutdown": {"killprocs", "mount-ro", "savecache"},
}

// alpine unpacks Alpine's packages without running any of them, so that it needs no root and none of Alpine's tools.
type alpine struct{}

func (alpine) plan(ctx context.Context, b *Builder, base Base, o Options, progress func(string)) (*plan, error) {
	if o.Snapshot != "" {
		return nil, hint.With(fmt.Errorf("snapshot of Alpine: its archive keeps no past: %w", errdefs.ErrInvalidArgument), "leave --snapshot out; a tagged image pins what it has")
	}
	keys, err := alpineKeysOf(o)
	if err != nil {
		return nil, err
	}
	arch, ok := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("architecture %s: %w", runtime.GOARCH, errdefs.ErrNotImplemented)
	}
	mirror := strings.TrimSuffix(cmp.Or(o.Mirror, alpineMirror), "/") + "/" + base.release
	client := debian.Client()
	var index []apkPackage
	for _, repository := range []string{"main", "community"} {
		dir := mirror + "/" + repository + "/" + arch
		progress("Reading " + dir + "/APKINDEX.tar.gz")
		all, err := readIndex(ctx, client, dir, keys)
		if err != nil {
			return nil, err
		}
		index = append(index, all...)
	}
	names := alpinePackages
	if base.init {
		names = append(slices.Clone(names), alpineInitPackages...)
	}
	own, err := resolve(index, names)
	if err != nil {
		return nil, err
	}
	packages, err := resolve(index, slices.Concat(names, o.Packages))
	if err != nil {
		return nil, err
	}
	t := &alpineTree{base: base, mirror: mirror, packages: packages, own: map[string]bool{}, world: slices.Sorted(slices.Values(slices.Concat(names, o.Packages)))}
	for _, p := range own {
		t.own[p.name] = true
	}
	for _, p := range packages { // the image is as old as its newest package
		if p.built.After(t.epoch) {
			t.epoch = p.built
		}
	}
	if len(o.Keyring) > 0 {
		t.keyring = o.Keyring
	}
	return &plan{
		origin: fmt.Sprintf("Alpine %s from %s", base.release, mirror), epoch: t.epoch, config: imageConfig(base, "/bin/sh"),
		write: func(ctx context.Context, layer io.Writer) error {
			if err := t.fetch(ctx, b, client, progress); err != nil {
				return err
			}
			return t.write(layer)
		},
	}, nil
}

func alpineKeysOf(o Options) ([]*rsa.PublicKey, error) {
	if len(o.Keyring) > 0 {
		return readKeys(o.Keyring)
	}
	entries, err := alpineKeys.ReadDir("alpine-keys")
	if err != nil {
		return nil, err
	}
	var all []byte
	for _, e := range entries {
		data, err := alpineKeys.ReadFile("alpine-keys/" + e.Name())
		if err != nil {
			return nil, err
		}
		all = append(append(all, data...), '\n')
	}
	return readKeys(all)
}

func readIndex(ctx context.Context, client *http.Client, dir string, keys []*rsa.PublicKey) ([]apkPackage, error) {
	url := dir + "/APKINDEX.tar.gz"
	var file bytes.Buffer
	if err := get(ctx, client, url, 64<<20, &file); err != nil {
		return nil, err
	}
	signed, err := verifyIndex(file.Bytes(), keys)
	if err != nil {
		return nil, hint.With(fmt.Errorf("verifying %s: %w", url, err),
			"the mirror or something on the way to it changed the file, or it is signed with other keys: name them with --keyring")
	}
	all, err := parseIndex(signed, dir)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", url, err)
	}
	return all, nil
}

// get fetches url, of most bytes.
func get(ctx context.Context, client *http.Client, url string, most int64, to io.Writer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("mirror %q: %w: %w", url, err, errdefs.ErrInvalidArgument)
	}
	resp, err := client.Do(req)
	if err != nil {
		return unreachable(url, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return hint.With(fmt.Errorf("%s: %w", url, errdefs.ErrNotFound), "check --mirror: it names the directory that holds v3.22 and the like")
	case resp.StatusCode != http.StatusOK:
		return unreachable(url, errors.New(resp.Status))
	}
	n, err := io.Copy(to, io.LimitReader(resp.Body, most+1))
	switch {
	case err != nil:
		return unreachable(url, err)
	case n > most:
		return fmt.Errorf("%s is larger than %d bytes: %w", url, most, errdefs.ErrDataLoss)
	}
	return nil
}

func unreachable(url string, err error) error {
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("fetching %s: %w", url, err)
	}
	return hint.With(fmt.Errorf("fetching %s: %w: %w", url, err, errdefs.ErrUnavailable), "check the network (and https_proxy, where there is a proxy), or name another mirror with --mirror")
}

// alpineTree is a file system made of packages.
type alpineTree struct {
	base     Base
	mirror   string
	epoch    time.Time
	packages []apkPackage
	own      map[string]bool // packages of the base itself
	world    []string
	keyring  []byte

	files []string // of the packages, in their order
}

// fetch brings the packages into the cache.
func (t *alpineTree) fetch(ctx context.Context, b *Builder, client *http.Client, progress func(string)) error {
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return err
	}
	t.files = make([]string, len(t.packages))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i, p := range t.packages {
		sum, _ := base64.StdEncoding.DecodeString(p.sum) // checked with the index
		t.files[i] = filepath.Join(b.Cache, hex.EncodeToString(sum[:8])+"-"+p.name+".apk")
		if st, err := os.Stat(t.files[i]); err == nil && st.Size() == p.size {
			continue
		}
		progress(fmt.Sprintf("Fetching %s %s", p.name, p.version))
		g.Go(func() error { return fetchPackage(ctx, client, p, t.files[i]) })
	}
	return g.Wait()
}

func fetchPackage(ctx context.Context, client *http.Client, p apkPackage, to string) error {
	f, err := os.CreateTemp(filepath.Dir(to), ".apk-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := get(ctx, client, p.url, p.size, f); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), to)
}

// write writes the tree as a tar, with the database by which apk knows what is installed.
func (t *alpineTree) write(layer io.Writer) error {
	tw := tar.NewWriter(layer)
	var database bytes.Buffer
	written := map[string]bool{} // directories, and the files that busybox's links must not replace
	replaced := map[string]string{}
	if t.base.init {
		replaced = alpineFiles
	}
	var links []string
	services := map[string]bool{}
	for i, p := range t.packages {
		f, err := os.Open(t.files[i])
		if err != nil {
			return err
		}
		record := newRecord(p)
		scripts, err := readPackage(p, f, func(h *tar.Header, content io.Reader) error {
			name := strings.TrimSuffix(path.Clean(h.Name), "/")
			if name == "." {
				return nil
			}
			record.add(name, h)
			switch {
			case h.Typeflag == tar.TypeDir && written[name], replaced[name] != "":
				return nil
			case strings.HasPrefix(name, "etc/busybox-paths.d/"):
				text, err := io.ReadAll(io.LimitReader(content, 1<<20))
				if err != nil {
					return err
				}
				links = append(links, strings.Fields(string(text))...)
				content = bytes.NewReader(text)
			case strings.HasPrefix(name, "etc/init.d/"):
				services[path.Base(name)] = true
			}
			written[name] = true
			return copyEntry(tw, h, name, content, t.epoch)
		})
		f.Close()
		if errdefs.IsDataLoss(err) {
			os.Remove(t.files[i]) // the next try fetches it anew
		}
		if err != nil {
			return err
		}
		if !t.own[p.name] {
			if err := refuseScripts(p, scripts); err != nil {
				return err
			}
		}
		record.appendTo(&database)
	}
	for _, link := range links { // what busybox's install script does
		name := strings.TrimPrefix(path.Clean(link), "/")
		if !filepath.IsLocal(name) || written[name] {
			continue
		}
		if err := t.parents(tw, written, name); err != nil {
			return err
		}
		written[name] = true
		if err := writeLink(tw, name, "/bin/busybox", t.epoch); err != nil {
			return err
		}
	}
	if t.base.init {
		for _, runlevel := range slices.Sorted(maps.Keys(alpineServices)) {
			for _, s := range alpineServices[runlevel] {
				name := "etc/runlevels/" + runlevel + "/" + s
				if !services[s] || written[name] {
					continue
				}
				if err := errors.Join(t.parents(tw, written, name), writeLink(tw, name, "/etc/init.d/"+s, t.epoch)); err != nil {
					return err
				}
			}
		}
	}
	var noScripts bytes.Buffer
	if err := tar.NewWriter(&noScripts).Close(); err != nil {
		return err
	}
	more := map[string]string{
		"etc/apk/world":          strings.Join(t.world, "\n") + "\n",
		"etc/apk/repositories":   t.mirror + "/main\n" + t.mirror + "/community\n",
		"lib/apk/db/installed":   database.String(),
		"lib/apk/db/scripts.tar": noScripts.String(),
		"lib/apk/db/triggers":    "",
	}
	if len(t.keyring) > 0 {
		more["etc/apk/keys/atoll-base.rsa.pub"] = string(t.keyring)
	}
	maps.Copy(more, replaced)
	for _, name := range sorted(more) {
		if err := errors.Join(t.parents(tw, written, name), writeFile(tw, name, 0o644, t.epoch, []byte(more[name]))); err != nil {
			return err
		}
	}
	return tw.Close()
}

// parents writes the directories above name that no package has.
func (t *alpineTree) parents(tw *tar.Writer, written map[string]bool, name string) error {
	dir := path.Dir(name)
	if dir == "." || written[dir] {
		return nil
	}
	if err := t.parents(tw, written, dir); err != nil {
		return err
	}
	written[dir] = true
	return tw.WriteHeader(&tar.Header{Name: dir + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: t.epoch})
}

// refuseScripts refuses what would be installed by halves.
func refuseScripts(p apkPackage, scripts []string) error {
	if !slices.Contains(scripts, "pre-install") && !slices.Contains(scripts, "post-install") {
		return nil
	}
	return hint.With(fmt.Errorf("package %s has an install script, which is not run here: %w", p.name, errdefs.ErrFailedPrecondition),
		"leave it out and add it in a Dockerfile: RUN apk add %s", p.name)
}

func copyEntry(tw *tar.Writer, h *tar.Header, name string, content io.Reader, epoch time.Time) error {
	out := &tar.Header{
		Name: name, Typeflag: h.Typeflag, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid,
		ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor,
	}
	if out.ModTime.After(epoch) {
		out.ModTime = epoch
	}
	switch h.Typeflag {
	case tar.TypeDir:
		out.Name += "/"
	case tar.TypeReg, tar.TypeSymlink, tar.TypeLink:
	default:
		return nil // devices: /dev is the kernel's
	}
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, "SCHILY.xattr.") {
			if out.PAXRecords == nil {
				out.PAXRecords = map[string]string{}
			}
			out.PAXRecords[k] = v
		}
	}
	if err := tw.WriteHeader(out); err != nil {
		return err
	}
	_, err := io.Copy(tw, content)
	return err
}

func writeLink(tw *tar.Writer, name, target string, epoch time.Time) error {
	return tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777, ModTime: epoch})
}

// record is a package in apk's database of what is installed: the index's lines, then directories (F, M) and their files (R, a, Z).
type record struct {
	p     apkPackage
	dirs  map[string][]string // lines of the files, by directory
	modes map[string]string
}

func newRecord(p apkPackage) *record {
	return &record{p, map[string][]string{}, map[string]string{}}
}

func (r *record) add(name string, h *tar.Header) {
	if h.Typeflag == tar.TypeDir {
		if _, ok := r.dirs[name]; !ok {
			r.dirs[name] = nil
		}
		if h.Uid != 0 || h.Gid != 0 || h.Mode&0o7777 != 0o755 {
			r.modes[name] = fmt.Sprintf("M:%d:%d:%o\n", h.Uid, h.Gid, h.Mode&0o7777)
		}
		return
	}
	dir := path.Dir(name)
	if dir == "." {
		dir = ""
	}
	line := "R:" + path.Base(name) + "\n"
	if h.Uid != 0 || h.Gid != 0 || h.Typeflag == tar.TypeReg && h.Mode&0o7777 != 0o644 || h.Typeflag != tar.TypeReg && h.Mode&0o7777 != 0o777 {
		line += fmt.Sprintf("a:%d:%d:%o\n", h.Uid, h.Gid, h.Mode&0o7777)
	}
	if sum, err := hex.DecodeString(h.PAXRecords["APK-TOOLS.checksum.SHA1"]); err == nil && len(sum) == sha1.Size {
		line += "Z:Q1" + base64.StdEncoding.EncodeToString(sum) + "\n"
	}
	r.dirs[dir] = append(r.dirs[dir], line)
}

func (r *record) appendTo(b *bytes.Buffer) {
	b.WriteString(r.p.stanza + "\n")
	for _, d := range slices.Sorted(maps.Keys(r.dirs)) {
		b.WriteString("F:" + d + "\n" + r.modes[d] + strings.Join(r.dirs[d], ""))
	}
	b.WriteString("\n")
}
