//go:build linux

package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/atollvm/atoll/internal/compression"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/ociindex"
	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/moby/buildkit/session/upload/uploadprovider"
	"github.com/moby/buildkit/util/staticfs"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"github.com/xi2/xz"
)

// maxDockerfile bounds a Dockerfile that comes without a context.
const maxDockerfile = 4 << 20

// The names of BuildKit's frontend for the two local directories.
const (
	contextMount    = "context"
	dockerfileMount = "dockerfile"
)

// setContext says where the context and the Dockerfile come from. done lets go of what was opened.
func (b *Builder) setContext(ctx context.Context, r Request, opt *client.SolveOpt) (done func(), err error) {
	done = func() {}
	switch {
	case r.ContextURL != "":
		if err := needGit(r.ContextURL); err != nil {
			return nil, err
		}
		opt.FrontendAttrs["context"] = r.ContextURL
		setName(r.Dockerfile, opt)
	case r.ContextStream != nil:
		if done, err = b.setStream(ctx, &r, opt); err != nil {
			return nil, err
		}
	default:
		if err := setDir(r, opt); err != nil {
			return nil, err
		}
	}
	if r.DockerfileText != nil {
		fs := staticfs.NewFS()
		fs.Add("Dockerfile", &types.Stat{Mode: 0o644}, r.DockerfileText)
		opt.LocalMounts[dockerfileMount] = fs
		opt.FrontendAttrs["filename"] = "Dockerfile"
		opt.FrontendAttrs["dockerfilekey"] = dockerfileMount // also where the context is remote
	}
	return done, nil
}

// setName names the Dockerfile in a context that is not here.
func setName(file string, opt *client.SolveOpt) {
	if file != "" {
		opt.FrontendAttrs["filename"] = file
	}
}

func setDir(r Request, opt *client.SolveOpt) error {
	if info, err := os.Stat(r.ContextDir); err != nil {
		return hint.With(errdefs.ErrInvalidArgument.WithMessage("build context: "+err.Error()),
			"give the directory that holds your Dockerfile: atoll build -t name DIR")
	} else if !info.IsDir() {
		return hint.With(errdefs.ErrInvalidArgument.WithMessage("build context: it is not a directory"),
			"give the directory that holds your Dockerfile: atoll build -t name DIR")
	}
	var err error
	if opt.LocalMounts[contextMount], err = fsutil.NewFS(r.ContextDir); err != nil {
		return err
	}
	// Files of an earlier build of the same context are not sent again.
	opt.SharedKey = r.ContextDir
	if r.DockerfileText != nil {
		return nil
	}
	file, err := localDockerfile(r.ContextDir, r.Dockerfile)
	if err != nil {
		return err
	}
	if opt.LocalMounts[dockerfileMount], err = fsutil.NewFS(filepath.Dir(file)); err != nil {
		return err
	}
	opt.FrontendAttrs["filename"] = filepath.Base(file)
	return nil
}

// setStream reads the stream to its end, for the client may have to answer for SSH agents on the same connection as soon as the build
// begins, and tells an archive from a Dockerfile.
func (b *Builder) setStream(ctx context.Context, r *Request, opt *client.SolveOpt) (done func(), err error) {
	file, err := b.spool(ctx, r.ContextStream)
	if err != nil {
		return nil, fmt.Errorf("receiving the build context: %w", err)
	}
	archive, err := openArchive(file)
	if errors.Is(err, errNoArchive) && r.DockerfileText == nil {
		r.DockerfileText, err = readDockerfile(file)
		opt.LocalMounts[contextMount] = staticfs.NewFS()
		return func() {}, errors.Join(err, file.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reading the build context: %w", err), file.Close())
	}
	uploads := uploadprovider.New()
	opt.Session = append(opt.Session, uploads)
	opt.FrontendAttrs["context"] = uploads.Add(archive)
	setName(r.Dockerfile, opt)
	return func() { archive.Close(); file.Close() }, nil
}

// spool keeps a stream in a file without a name, so that nothing is left of it whatever happens.
func (b *Builder) spool(ctx context.Context, r io.Reader) (_ *os.File, err error) {
	if err := os.MkdirAll(b.o.Dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(b.o.Dir, "context-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if _, err := io.Copy(f, r); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if full := b.diskFull(err.Error(), ""); full != "" {
			err = hint.With(errdefs.ErrResourceExhausted.WithMessage(full+": "+err.Error()), "free some space on that disk, then build again")
		}
		return nil, errors.Join(err, f.Close())
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, err
}

func readDockerfile(f *os.File) ([]byte, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxDockerfile+1))
	if err == nil && len(text) > maxDockerfile {
		err = hint.With(fmt.Errorf("what came is no archive, and too long for a Dockerfile (more than %d bytes): %w", maxDockerfile, errdefs.ErrInvalidArgument),
			"send a tar archive, as tar -c . | atoll build -")
	}
	if text == nil {
		text = []byte{}
	}
	return text, err
}

var errNoArchive = fmt.Errorf("it is no tar archive: %w", errdefs.ErrInvalidArgument)

// openArchive returns the tar in f as gzip: BuildKit knows an archive by the magic number of its compression, and a plain tar only by
// a first entry without long headers.
func openArchive(f io.Reader) (io.ReadCloser, error) {
	packed := bufio.NewReaderSize(f, 64<<10)
	kind, err := compression.Detect(packed)
	if err != nil {
		return nil, err
	}
	plain, err := kind.Open(packed)
	if err != nil {
		return nil, err
	}
	tarball := bufio.NewReaderSize(plain, 64<<10)
	head, err := tarball.Peek(64 << 10)
	if errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, xz.ErrMemlimit) {
		return nil, hint.With(fmt.Errorf("unpacking it takes a window of more than %d MiB: %w: %w", compression.MaxWindow>>20, err, errdefs.ErrInvalidArgument),
			"compress it with a smaller window, as zstd does without --ultra and --long")
	}
	if _, err := tar.NewReader(bytes.NewReader(head)).Next(); err != nil {
		return nil, errNoArchive
	}
	out, in := io.Pipe()
	go func() { // ends with the archive, or when out is closed
		z, err := gzip.NewWriterLevel(in, gzip.NoCompression)
		if err == nil {
			_, err = io.Copy(z, tarball)
		}
		if err == nil {
			err = z.Close()
		}
		in.CloseWithError(err)
	}()
	return out, nil
}

// setContexts adds the named contexts.
func setContexts(contexts map[string]string, opt *client.SolveOpt) error {
	for _, name := range sortedKeys(contexts) {
		if err := setNamed(name, contexts[name], opt); err != nil {
			return fmt.Errorf("build context %s=%s: %w", name, redact(contexts[name]), err)
		}
	}
	return nil
}

func setNamed(name, value string, opt *client.SolveOpt) error {
	key := name
	if named, err := reference.ParseNormalizedNamed(name); err == nil { // a name may stand for an image of a FROM
		key = strings.TrimSuffix(reference.FamiliarString(named), ":latest")
	}
	attr := "context:" + key
	dir, isDir := strings.CutPrefix(value, "dir:")
	layout, isLayout := strings.CutPrefix(value, "oci-layout://")
	switch {
	case isDir:
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return hint.With(fmt.Errorf("no such directory: %w", errdefs.ErrInvalidArgument),
				"an image is docker-image://REFERENCE, an image layout oci-layout://PATH")
		}
		mount := key
		if mount == contextMount || mount == dockerfileMount {
			mount = "_" + mount
		}
		fs, err := fsutil.NewFS(dir)
		if err != nil {
			return err
		}
		opt.LocalMounts[mount] = fs
		opt.FrontendAttrs[attr] = "local:" + mount
	case isLayout:
		store, desc, err := openLayout(layout)
		if err != nil {
			return err
		}
		id := "layout" + fmt.Sprint(len(opt.OCIStores))
		opt.OCIStores[id], err = local.NewStore(store)
		if err != nil {
			return err
		}
		opt.FrontendAttrs[attr] = fmt.Sprintf("oci-layout://%s@%s", id, desc)
	default:
		if err := needGit(value); err != nil {
			return err
		}
		opt.FrontendAttrs[attr] = value
	}
	return nil
}

// openLayout finds the image that PATH[:TAG][@DIGEST] means in an OCI layout.
func openLayout(spec string) (dir string, d digest.Digest, err error) {
	dir, want, pinned := strings.Cut(spec, "@")
	tag := ""
	if _, statErr := os.Stat(dir); statErr != nil {
		if i := strings.LastIndexByte(dir, ':'); i > 0 {
			dir, tag = dir[:i], dir[i+1:]
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "oci-layout")); err != nil {
		return "", "", hint.With(fmt.Errorf("%s is no OCI image layout: %w: %w", dir, err, errdefs.ErrInvalidArgument), "write it as oci-layout:///PATH[:TAG][@DIGEST]")
	}
	if pinned {
		d, err := digest.Parse(want)
		if err != nil {
			return "", "", fmt.Errorf("digest %q: %w: %w", want, err, errdefs.ErrInvalidArgument)
		}
		return dir, d, nil
	}
	index := ociindex.NewStoreIndex(dir)
	if tag != "" {
		desc, err := index.Get(tag)
		if err != nil || desc == nil {
			return "", "", fmt.Errorf("%s has no image %q: %w", dir, tag, errdefs.ErrNotFound)
		}
		return dir, desc.Digest, nil
	}
	desc, err := index.GetSingle()
	if err != nil || desc == nil {
		if desc, err = index.Get("latest"); err != nil || desc == nil {
			return "", "", hint.With(fmt.Errorf("%s has several images, or none: %w", dir, errdefs.ErrInvalidArgument), "name one: oci-layout://%s:TAG or @DIGEST", dir)
		}
	}
	return dir, desc.Digest, nil
}

// needGit says what is missing before BuildKit does so in its own words.
func needGit(context string) error {
	_, isGit, err := dfgitutil.ParseGitRef(context)
	if !isGit {
		return nil
	}
	if err != nil {
		return fmt.Errorf("git repository %s: %w: %w", redact(context), err, errdefs.ErrInvalidArgument)
	}
	if _, err := exec.LookPath("git"); err != nil {
		return hint.With(fmt.Errorf("fetching a git repository needs git on the host: %w: %w", err, errdefs.ErrFailedPrecondition), "apt install git")
	}
	return nil
}

// redact takes a password out of a URL.
func redact(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.User == nil {
		return text
	}
	return u.Redacted()
}
