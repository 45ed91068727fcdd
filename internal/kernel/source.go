//go:build linux

package kernel

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// debianSources is which release of Debian has the sources of which Linux; the first is the default.
var debianSources = []struct{ version, suite string }{{"6.1", "bookworm"}, {"6.12", "trixie"}}

const (
	sourceMax    = 1 << 30 // of a packed source; Linux 6.12 has 148 MB
	treeMax      = 8 << 30 // and unpacked, where it has 1.6 GB
	signatureMax = 1 << 20
)

// source is a kernel's source, verified but not unpacked.
type source struct {
	id    digest.Digest // of its content
	label string        // for Kernel.Source
	tree  string        // its directory, where it is unpacked already
	// unpack puts the tree into a directory.
	unpack func(ctx context.Context, dir string) error
}

// findSource fetches and verifies the source that o names.
func (s *Store) findSource(ctx context.Context, o BuildOptions) (source, error) {
	switch {
	case o.Source == "debian":
		return s.debianSource(ctx, o)
	case isURL(o.Source):
		return s.archiveSource(ctx, o)
	}
	return treeSource(ctx, o.Source)
}

func isURL(s string) bool { return strings.HasPrefix(s, "https://") || strings.HasPrefix(s, "http://") }

func (s *Store) debianSource(ctx context.Context, o BuildOptions) (source, error) {
	version, suite := debianSources[0].version, ""
	if o.Version != "" {
		version = o.Version
	}
	var known []string
	for _, d := range debianSources {
		if d.version == version {
			suite = d.suite
		}
		known = append(known, d.version)
	}
	if suite == "" {
		return source{}, hint.With(fmt.Errorf("linux %s: Debian has no source package of it: %w", version, errdefs.ErrNotFound),
			"Debian's versions are: %s; for another give the URL of its archive with --source", strings.Join(known, ", "))
	}
	suites, err := debian.Suites(o.Mirror, suite, s.opts.Cache, s.opts.Log)
	if err != nil {
		return source{}, err
	}
	name := "linux-source-" + version
	o.Progress(Transfer{ID: name, Status: "Reading package index"})
	pkg, err := suites.Get(ctx, "amd64", name) // the same for all architectures
	if err != nil {
		return source{}, err
	}
	return source{
		id:    digest.NewDigestFromEncoded(digest.SHA256, pkg.SHA256),
		label: fmt.Sprintf("%s %s sha256:%s", pkg.URL(), pkg.Version, pkg.SHA256),
		unpack: func(ctx context.Context, dir string) error {
			deb, err := pkg.Fetch(ctx, func(done, total int64) {
				o.Progress(Transfer{ID: name, Status: "Downloading", Done: done, Total: total})
			})
			if err != nil {
				return err
			}
			o.Progress(Transfer{ID: name, Status: "Unpacking", Done: pkg.Size, Total: pkg.Size})
			return unpackDeb(ctx, deb, dir)
		},
	}, nil
}

// unpackDeb unpacks the archive in Debian's package.
func unpackDeb(ctx context.Context, deb, dir string) error {
	found := false
	err := debian.Walk(deb, func(h *tar.Header, content io.Reader) error {
		if !strings.HasPrefix(h.Name, "usr/src/linux-source-") || !strings.HasSuffix(h.Name, ".tar.xz") {
			return nil
		}
		found = true
		r, err := debian.Decompress(content)
		if err != nil {
			return err
		}
		defer r.Close()
		return unpackTar(ctx, r, dir)
	})
	if err == nil && !found {
		err = fmt.Errorf("package %s has no archive of Linux: %w", deb, errdefs.ErrDataLoss)
	}
	return err
}

// archiveSource fetches an archive that a signature or a hash vouches for.
func (s *Store) archiveSource(ctx context.Context, o BuildOptions) (source, error) {
	if o.SHA256 == "" && len(o.Keyring) == 0 {
		return source{}, hint.With(fmt.Errorf("source %s: nothing vouches for it: %w", o.Source, errdefs.ErrFailedPrecondition),
			"give the public keys of its signers with --keyring (kernel.org: gpg --locate-keys torvalds@kernel.org gregkh@kernel.org; gpg --export torvalds@kernel.org gregkh@kernel.org >keys.gpg), or its hash with --sha256")
	}
	name := path.Base(o.Source)
	where := sha256.Sum256([]byte(o.Source))
	packed := filepath.Join(s.opts.Cache, "source-"+hex.EncodeToString(where[:8]))
	id, err := fileDigest(packed)
	if err != nil || o.SHA256 != "" && id.Encoded() != o.SHA256 {
		if id, err = s.download(ctx, o, name, packed); err != nil {
			return source{}, err
		}
	}
	by := "sha256 given"
	if o.SHA256 != "" {
		if id.Encoded() != o.SHA256 {
			return source{}, errors.Join(hint.With(fmt.Errorf("source %s has SHA256 %s instead of %s: %w", o.Source, id.Encoded(), o.SHA256, errdefs.ErrDataLoss),
				"the server or something on the way to it changed the file, or the hash is another file's"), os.Remove(packed))
		}
	} else if by, err = s.verifyArchive(ctx, o, packed, id); err != nil {
		return source{}, err
	}
	return source{
		id:    id,
		label: fmt.Sprintf("%s %s, %s", o.Source, id, by),
		unpack: func(ctx context.Context, dir string) error {
			o.Progress(Transfer{ID: name, Status: "Unpacking"})
			f, err := os.Open(packed)
			if err != nil {
				return err
			}
			defer f.Close()
			r, err := debian.Decompress(f)
			if err != nil {
				return fmt.Errorf("unpacking %s: %w: %w", o.Source, err, errdefs.ErrDataLoss)
			}
			defer r.Close()
			return unpackTar(ctx, r, dir)
		},
	}, nil
}

// download puts a file of unknown size at dst, whole or not at all.
func (s *Store) download(ctx context.Context, o BuildOptions, name, dst string) (digest.Digest, error) {
	body, size, err := debian.Get(ctx, debian.Client(), o.Source)
	if err != nil {
		return "", hint.With(err, "check the URL and the network")
	}
	defer body.Close()
	if err := os.MkdirAll(s.opts.Cache, 0o755); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(s.opts.Cache, partialSource) // Open removes it after a crash
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	sum := sha256.New()
	count := counter{func(done int64) {
		o.Progress(Transfer{ID: name, Status: "Downloading", Done: done, Total: max(size, 0)})
	}, 0}
	n, err := io.Copy(io.MultiWriter(f, sum, &count), io.LimitReader(body, sourceMax+1))
	if err != nil {
		return "", hint.With(fmt.Errorf("fetching %s: %w", o.Source, noSpace(f.Name(), err)), "check the network, and try again")
	}
	if n > sourceMax {
		return "", fmt.Errorf("fetching %s: it is larger than %d MiB: %w", o.Source, sourceMax>>20, errdefs.ErrResourceExhausted)
	}
	if err := f.Close(); err != nil {
		return "", noSpace(f.Name(), err)
	}
	return digest.NewDigest(digest.SHA256, sum), os.Rename(f.Name(), dst)
}

// counter reports how many bytes have been written to it.
type counter struct {
	report func(int64)
	n      int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	c.report(c.n)
	return len(p), nil
}

// verifyArchive checks the detached signature beside the archive. kernel.org signs the unpacked tar; others sign the file itself. An archive that
// was verified once is not unpacked for it again as long as signature and keys are the same.
func (s *Store) verifyArchive(ctx context.Context, o BuildOptions, packed string, id digest.Digest) (by string, err error) {
	keys, err := readKeyring(o.Keyring)
	if err != nil {
		return "", err
	}
	signature, err := fetchSignature(ctx, o.Source)
	if err != nil {
		return "", err
	}
	mark := packed + ".verified"
	what := digest.FromString(id.String() + "\x00" + string(o.Keyring) + "\x00" + string(signature)).String()
	if known, err := os.ReadFile(mark); err == nil {
		if sum, by, ok := strings.Cut(string(known), " "); ok && sum == what {
			return by, nil
		}
	}
	o.Progress(Transfer{ID: path.Base(o.Source), Status: "Verifying"})
	signer, err := checkSignature(ctx, packed, keys, signature)
	if err != nil {
		return "", errors.Join(hint.With(fmt.Errorf("verifying the signature of %s: %w: %w", o.Source, err, errdefs.ErrDataLoss),
			"the file or its signature was changed on the way, or the keys given with --keyring are not its signer's"), os.Remove(packed))
	}
	by = fmt.Sprintf("signed by %X", signer.PrimaryKey.Fingerprint)
	return by, os.WriteFile(mark, []byte(what+" "+by), 0o644)
}

func readKeyring(data []byte) (openpgp.EntityList, error) {
	read := openpgp.ReadKeyRing
	if bytes.Contains(data, []byte("-----BEGIN PGP")) {
		read = openpgp.ReadArmoredKeyRing
	}
	keys, err := read(bytes.NewReader(data))
	if err != nil || len(keys) == 0 {
		return nil, hint.With(fmt.Errorf("reading the keyring: no OpenPGP public keys: %v: %w", err, errdefs.ErrInvalidArgument),
			"make it with gpg --export, with or without --armor")
	}
	return keys, nil
}

// fetchSignature finds the signature beside an archive. kernel.org has linux-6.1.tar.sign for linux-6.1.tar.xz; others append to the whole name.
func fetchSignature(ctx context.Context, url string) ([]byte, error) {
	tried := []string{url + ".sign", url + ".asc", url + ".sig"}
	if plain, isTar := strings.CutSuffix(url, path.Ext(url)); isTar && strings.HasSuffix(plain, ".tar") {
		tried = append([]string{plain + ".sign"}, tried...)
	}
	for _, u := range tried {
		body, _, err := debian.Get(ctx, debian.Client(), u)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, hint.With(err, "check the URL and the network")
		}
		defer body.Close()
		return io.ReadAll(io.LimitReader(body, signatureMax))
	}
	return nil, hint.With(fmt.Errorf("source %s: no signature at %s: %w", url, strings.Join(tried, ", "), errdefs.ErrNotFound),
		"give the hash of the file instead: --sha256")
}

// checkSignature wants the signature to be of the packed file or of the tar in it.
func checkSignature(ctx context.Context, packed string, keys openpgp.EntityList, signature []byte) (*openpgp.Entity, error) {
	var faults []error
	for _, unpack := range []bool{true, false} {
		signer, err := func() (*openpgp.Entity, error) {
			f, err := os.Open(packed)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			content := io.Reader(f)
			if unpack {
				r, err := debian.Decompress(f)
				if err != nil {
					return nil, err
				}
				defer r.Close()
				content = io.LimitReader(r, treeMax)
			}
			sig := io.Reader(bytes.NewReader(signature))
			if bytes.Contains(signature, []byte("-----BEGIN PGP")) {
				block, err := armor.Decode(sig)
				if err != nil {
					return nil, err
				}
				sig = block.Body
			}
			return openpgp.CheckDetachedSignature(keys, &cancelReader{ctx, content}, sig, nil)
		}()
		if err == nil {
			return signer, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		faults = append(faults, err)
	}
	return nil, faults[0]
}

// cancelReader ends with its context.
type cancelReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancelReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// unpackTar unpacks a source archive without the one directory that holds all of it. Nothing gets outside dir.
func unpackTar(ctx context.Context, r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var total int64
	for tr := tar.NewReader(&cancelReader{ctx, r}); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpacking the source: %w", err)
		}
		_, name, _ := strings.Cut(strings.Trim(path.Clean("/"+h.Name), "/"), "/")
		if name == "" {
			continue
		}
		if total += h.Size; total > treeMax {
			return fmt.Errorf("unpacking the source: it is larger than %d GiB: %w", treeMax>>30, errdefs.ErrResourceExhausted)
		}
		if err := unpackEntry(root, name, h, tr); err != nil {
			return fmt.Errorf("unpacking the source: %s: %w", h.Name, noSpace(dir, err))
		}
	}
}

func unpackEntry(root *os.Root, name string, h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return root.MkdirAll(name, 0o755)
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644|fs.FileMode(h.Mode)&0o111)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.Copy(f, content); err != nil {
			return err
		}
		return f.Close()
	}
	return fmt.Errorf("type %q has no place in a source: %w", h.Typeflag, errdefs.ErrInvalidArgument)
}

// treeSource takes an unpacked tree as it is, and in place.
func treeSource(ctx context.Context, dir string) (source, error) {
	if !filepath.IsAbs(dir) {
		return source{}, hint.With(fmt.Errorf("source %q: neither debian nor a URL nor an absolute path: %w", dir, errdefs.ErrInvalidArgument),
			"give debian, the URL of an archive, or the directory of an unpacked tree")
	}
	if _, err := treeVersion(dir); err != nil {
		return source{}, hint.With(err, "give the directory of an unpacked Linux, with its Makefile and Kconfig")
	}
	for _, made := range []string{".config", "include/config"} {
		if _, err := os.Lstat(filepath.Join(dir, made)); err == nil {
			return source{}, hint.With(fmt.Errorf("source %s: there is %s, so something was built in it: %w", dir, made, errdefs.ErrFailedPrecondition),
				"clean it: make -C %s mrproper", dir)
		}
	}
	id, err := treeDigest(ctx, dir)
	if err != nil {
		return source{}, fmt.Errorf("reading source %s: %w", dir, err)
	}
	return source{id: id, label: fmt.Sprintf("directory %s %s", dir, id), tree: dir}, nil
}

// treeDigest is of all names, contents and which of them are executable; not of what git keeps for itself.
func treeDigest(ctx context.Context, dir string) (digest.Digest, error) {
	sum := sha256.New()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		switch d.Type() {
		case fs.ModeDir:
			if rel == ".git" {
				return fs.SkipDir
			}
		case fs.ModeSymlink:
			to, err := os.Readlink(name)
			fmt.Fprintf(sum, "link %q %q\n", rel, to)
			return err
		case 0:
			info, err := d.Info()
			if err != nil {
				return err
			}
			content, err := fileDigest(name)
			fmt.Fprintf(sum, "file %q %t %s\n", rel, info.Mode()&0o100 != 0, content)
			return err
		}
		return nil
	})
	return digest.NewDigest(digest.SHA256, sum), err
}

var versionLines = regexp.MustCompile(`(?m)^(VERSION|PATCHLEVEL|SUBLEVEL) = (\d+)$`)

// treeVersion reads the version from the Makefile of an unpacked tree.
func treeVersion(dir string) (string, error) {
	f, err := os.OpenInRoot(dir, "Makefile")
	if err != nil {
		return "", fmt.Errorf("it is no source of Linux: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	head, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return "", err
	}
	var parts []string
	for _, m := range versionLines.FindAllSubmatch(head, -1) {
		parts = append(parts, string(m[2]))
	}
	if _, err := os.Stat(filepath.Join(dir, "Kconfig")); err != nil || len(parts) != 3 {
		return "", fmt.Errorf("%s is no source of Linux: its Makefile has no version, or there is no Kconfig: %w", dir, errdefs.ErrInvalidArgument)
	}
	return strings.Join(parts, "."), nil
}
