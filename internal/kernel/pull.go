package kernel

import (
	"archive/tar"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// debianSuite is the Debian release whose kernel is fetched.
const debianSuite = "bookworm"

// PullOptions says which kernel to fetch.
type PullOptions struct {
	Name     string         // debian, the default
	Mirror   string         // default: debian.DefaultMirror
	Arch     string         // amd64 or arm64; default: the host's
	Progress func(Transfer) // may be nil
}

// Transfer is how far one part of a pull is. Total 0: not known.
type Transfer struct {
	ID          string
	Status      string
	Done, Total int64
}

// Pull fetches Debian's newest cloud kernel, every step from the archive's signature to the package's hash verified. A kernel that is
// there already is returned as it is. The first kernel becomes the default.
func (s *Store) Pull(ctx context.Context, o PullOptions) (Kernel, error) {
	o.Name, o.Arch = cmp.Or(o.Name, "debian"), cmp.Or(o.Arch, runtime.GOARCH)
	if o.Progress == nil {
		o.Progress = func(Transfer) {}
	}
	if o.Name != "debian" {
		return Kernel{}, hint.With(fmt.Errorf("kernel source %q: %w", o.Name, errdefs.ErrNotFound), "the sources are: debian")
	}
	if o.Arch != "amd64" && o.Arch != "arm64" {
		return Kernel{}, fmt.Errorf("kernel for architecture %q: only amd64 and arm64: %w", o.Arch, errdefs.ErrInvalidArgument)
	}
	release, err := s.lock(ctx)
	if err != nil {
		return Kernel{}, err
	}
	defer release()
	k, err := s.pullDebian(ctx, o)
	if err != nil {
		return Kernel{}, fmt.Errorf("pulling Debian's kernel for %s: %w", o.Arch, err)
	}
	return k, nil
}

func (s *Store) pullDebian(ctx context.Context, o PullOptions) (Kernel, error) {
	suites, err := debian.Suites(o.Mirror, debianSuite, s.opts.Cache, s.opts.Log)
	if err != nil {
		return Kernel{}, err
	}
	meta := "linux-image-cloud-" + o.Arch // depends on the newest kernel of its suite
	o.Progress(Transfer{ID: meta, Status: "Reading package index"})
	found, err := suites.Find(ctx, o.Arch, func(name string) bool {
		return strings.HasPrefix(name, "linux-image-") && strings.HasSuffix(name, "cloud-"+o.Arch)
	})
	if err != nil {
		return Kernel{}, err
	}
	var pkg debian.Package
	for _, dep := range found[meta].DependsOn() {
		if p, ok := found[dep]; ok {
			pkg = p
		}
	}
	if pkg.Name == "" {
		return Kernel{}, fmt.Errorf("package %s or what it depends on: %w", meta, errdefs.ErrNotFound)
	}
	name := "debian-" + strings.TrimPrefix(pkg.Name, "linux-image-")
	source := fmt.Sprintf("%s %s sha256:%s", pkg.URL(), pkg.Version, pkg.SHA256)
	// A security update may keep the kernel's name: the same name with another source is replaced.
	if k, err := s.Get(name); err == nil && strings.HasSuffix(k.Source, pkg.SHA256) && isFile(k.Path) && k.Features != nil && s.Modules(name) != nil {
		o.Progress(Transfer{ID: name, Status: "Already there", Done: pkg.Size, Total: pkg.Size})
		return k, nil
	}
	deb, err := pkg.Fetch(ctx, func(done, total int64) {
		o.Progress(Transfer{ID: name, Status: "Downloading", Done: done, Total: total})
	})
	if err != nil {
		return Kernel{}, err
	}
	o.Progress(Transfer{ID: name, Status: "Unpacking", Done: pkg.Size, Total: pkg.Size})
	k, err := s.addDeb(ctx, deb, Kernel{Name: name, Source: source})
	if err != nil {
		return Kernel{}, err
	}
	o.Progress(Transfer{ID: name, Status: "Done", Done: pkg.Size, Total: pkg.Size})
	s.publish("pull", k)
	return k, nil
}

// addDeb takes kernel, configuration and the modules that guests need from a Debian package.
func (s *Store) addDeb(ctx context.Context, deb string, k Kernel) (Kernel, error) {
	dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(dir)
	// Which modules are needed is known when all have been seen; until then they lie in a directory of their own.
	all, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(all)

	var vmlinuz, configuration string
	modules, dirs := map[string]string{}, map[string]string{}
	err = debian.Walk(deb, func(h *tar.Header, content io.Reader) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		base := path.Base(h.Name)
		switch {
		case h.Typeflag != tar.TypeReg || h.Size > imageMax:
			return nil
		case strings.HasPrefix(h.Name, "boot/vmlinuz-"):
			vmlinuz = filepath.Join(all, "vmlinuz")
			return writeFrom(vmlinuz, content)
		case strings.HasPrefix(h.Name, "boot/config-"):
			configuration = filepath.Join(dir, configFile)
			return writeFrom(configuration, content)
		case strings.Contains(base, ".ko"):
			r, err := debian.Decompress(content)
			if err != nil {
				return err
			}
			defer r.Close()
			name := moduleName(base)
			modules[name], dirs[name] = filepath.Join(all, name+".ko"), moduleDirectory(h.Name)
			return writeFrom(modules[name], r)
		}
		return nil
	})
	if err != nil {
		return Kernel{}, err
	}
	if vmlinuz == "" || configuration == "" {
		return Kernel{}, fmt.Errorf("package %s has no kernel or no configuration: %w", deb, errdefs.ErrDataLoss)
	}
	text, err := os.Open(configuration)
	if err != nil {
		return Kernel{}, err
	}
	defer text.Close()
	c, err := parseConfig(text)
	if err != nil {
		return Kernel{}, err
	}
	if k.ConfigDigest, err = fileDigest(configuration); err != nil {
		return Kernel{}, err
	}
	k.NeedsACPI, k.ACPI = c["VIRTIO_MMIO_CMDLINE_DEVICES"] != "y", c["ACPI"] == "y" && c["PCI"] == "y"
	if k.Modules, err = loadOrder(c, modules, wanted); err != nil {
		return Kernel{}, err
	}
	if k.Features, err = features(c, modules, k.Modules); err != nil {
		return Kernel{}, err
	}
	edit := unsigned
	if c["MODULE_SIG_FORCE"] == "y" {
		edit = func(module []byte) []byte { return module }
	}
	if err := archive(filepath.Join(dir, archiveFile), modules, dirs, edit); err != nil {
		return Kernel{}, err
	}
	for _, m := range k.moduleFiles() {
		module, err := os.ReadFile(modules[m.name])
		if err != nil {
			return Kernel{}, err
		}
		to := filepath.Join(dir, moduleDir, m.path)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return Kernel{}, err
		}
		if err := writeSynced(to, edit(module)); err != nil {
			return Kernel{}, err
		}
	}
	img, err := readImage(vmlinuz)
	if err != nil {
		return Kernel{}, fmt.Errorf("reading the kernel of package %s: %w", deb, err)
	}
	return s.add(dir, img, k)
}

func writeFrom(path string, content io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, content); err != nil {
		return noSpace(path, err)
	}
	return f.Close()
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func fileDigest(path string) (digest.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return digest.FromReader(f)
}
