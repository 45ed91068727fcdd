//go:build linux

package child

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	continuity "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	"golang.org/x/sys/unix"
)

// bundlePaths are where trusted certificate authorities are, as Debian and Alpine, Red Hat, and SUSE have them. Elsewhere they are links to these.
var bundlePaths = []string{
	"/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	"/etc/pki/tls/certs/ca-bundle.crt",
	"/etc/ssl/ca-bundle.pem",
	"/etc/ssl/cert.pem",
}

// maxBundle bounds what is read of an image's bundle, with the authorities; Debian's has 220 kB.
const maxBundle = 16 << 20

// authorities are the certificates that are trusted beside the system's, as one PEM text between two lines of our own.
type authorities []byte

const (
	authoritiesBegin = "\n# certificate authorities of the host, for this build step only\n"
	authoritiesEnd   = "# end of the host's certificate authorities\n"
)

func readAuthorities(paths []string) (authorities, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	text := bytes.NewBufferString(authoritiesBegin)
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("reading certificate authorities: %w", err)
		}
		found := false
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type == "CERTIFICATE" {
				found = true
				if err := pem.Encode(text, block); err != nil {
					return nil, err
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("reading certificate authorities: %s has no certificate in PEM", path)
		}
	}
	text.WriteString(authoritiesEnd)
	return text.Bytes(), nil
}

// trust makes this process, and those that it starts, trust the authorities: FROM, ADD, git. Our mount namespace is our own, so the
// host's bundle can be covered.
func (a authorities) trust(dir string) error {
	if a == nil {
		return nil
	}
	covered := false
	for _, path := range bundlePaths {
		real, err := filepath.EvalSymlinks(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if real != path { // a link to another of the list, or into a place that no program names
			continue
		}
		merged, err := a.merged(dir, real)
		if err != nil {
			return err
		}
		if err := unix.Mount(merged, real, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", real, err)
		}
		covered = true
	}
	if covered {
		return nil
	}
	merged, err := a.merged(dir, os.DevNull)
	if err != nil {
		return err
	}
	return os.Setenv("SSL_CERT_FILE", merged)
}

func (a authorities) merged(dir, bundle string) (string, error) {
	data, err := os.ReadFile(bundle)
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, "ca-*.pem")
	if err != nil {
		return "", err
	}
	_, err = f.Write(append(data, a...))
	return f.Name(), errors.Join(err, f.Chmod(0o644), f.Close())
}

// trustingExecutor runs each step with the authorities in the bundle of its image. They are in the file, and not mounted over it,
// because update-ca-certificates replaces the file, which a mount forbids. After the step they are cut out of the bundles again, and a
// file that is as it was has its old time: the differ then sees no change. What a step copies of a bundle to another place keeps them.
type trustingExecutor struct {
	executor.Executor
	authorities authorities
}

func withAuthorities(e executor.Executor, a authorities) executor.Executor {
	if a == nil {
		return e
	}
	return &trustingExecutor{Executor: e, authorities: a}
}

func (e *trustingExecutor) Run(ctx context.Context, id string, rootfs executor.Mount, mounts []executor.Mount, process executor.ProcessInfo, started chan<- struct{}) (rec resourcestypes.Recorder, err error) {
	if rootfs.Readonly || process.Meta.ReadonlyRootFS {
		return e.Executor.Run(ctx, id, rootfs, mounts, process, started)
	}
	added := map[string]change{}
	if err := withRoot(ctx, rootfs, func(root string) error { return e.authorities.add(root, added) }); err != nil {
		return nil, fmt.Errorf("adding certificate authorities: %w", err)
	}
	// Also after a failure: BuildKit may show such a root to a debugger. A killed builder's root is thrown away.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		cutErr := withRoot(ctx, rootfs, func(root string) error { return e.authorities.cut(root, added) })
		if cutErr != nil {
			err = errors.Join(err, fmt.Errorf("taking certificate authorities away: %w", cutErr))
		}
	}()
	return e.Executor.Run(ctx, id, rootfs, mounts, process, started)
}

// withRoot mounts a step's root for a moment.
func withRoot(ctx context.Context, m executor.Mount, f func(root string) error) error {
	ref, err := m.Src.Mount(ctx, false)
	if err != nil {
		return err
	}
	mounts, release, err := ref.Mount()
	if err != nil {
		return err
	}
	var inner error // apart: who reads it has no use for the directory that the wrapping names
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		var inside string
		if inside, inner = continuity.RootPath(root, m.Selector); inner == nil {
			inner = f(inside)
		}
		return nil
	})
	err = errors.Join(inner, err)
	if release != nil {
		err = errors.Join(err, release())
	}
	return err
}

// change is what add did to a bundle. One that was too large got nothing.
type change struct {
	before, after time.Time
	tooLarge      bool
}

// add appends the authorities to the bundles that a root has, and remembers them by their paths in it.
func (a authorities) add(root string, added map[string]change) error {
	for _, path := range bundlePaths {
		file, info, err := findBundle(root, path)
		if err != nil {
			return err
		}
		inside := strings.TrimPrefix(file, root)
		if _, again := added[inside]; info == nil || again {
			continue
		}
		if info.Size()+int64(len(a)) > maxBundle {
			added[inside] = change{tooLarge: true}
			continue
		}
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|syscall.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(a)
		after, statErr := f.Stat()
		if err := errors.Join(err, statErr, f.Close()); err != nil {
			return err
		}
		added[inside] = change{before: info.ModTime(), after: after.ModTime()}
	}
	return nil
}

// cut takes the authorities out of every bundle, also one that the step has copied or written anew from ours.
func (a authorities) cut(root string, added map[string]change) error {
	for _, path := range bundlePaths {
		file, info, err := findBundle(root, path)
		if err != nil {
			return err
		}
		if info == nil {
			continue
		}
		inside := strings.TrimPrefix(file, root)
		if info.Size() > maxBundle {
			if added[inside].tooLarge {
				continue
			}
			return fmt.Errorf("%s has grown to %d bytes, more than the %d that they are cut out of: %w", inside, info.Size(), maxBundle, errdefs.ErrResourceExhausted)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if !bytes.Contains(data, a) {
			continue
		}
		rest := bytes.ReplaceAll(data, a, nil)
		if err := os.WriteFile(file, rest, info.Mode().Perm()); err != nil {
			return err
		}
		when := info.ModTime()
		if c, ok := added[inside]; ok && when.Equal(c.after) {
			when = c.before
		}
		if err := os.Chtimes(file, when, when); err != nil {
			return err
		}
	}
	return nil
}

// findBundle finds a bundle inside a root, which may try to lead out of itself by links. No info: there is none.
func findBundle(root, path string) (string, fs.FileInfo, error) {
	file, err := continuity.RootPath(root, path)
	if err != nil {
		return "", nil, err
	}
	info, err := os.Lstat(file)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return file, nil, nil
	}
	if err != nil || !info.Mode().IsRegular() {
		return file, nil, err
	}
	return file, info, nil
}
