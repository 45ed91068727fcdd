package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/hint"
)

const (
	stall    = 30 * time.Second // a transfer that brings nothing for so long is broken
	attempts = 3                // of one download, each going on where the last one stopped
)

// small fetches a file that is not in the cache and whose size nothing vouches for.
func (a *Archive) small(ctx context.Context, url string) ([]byte, error) {
	body, _, err := a.get(ctx, url, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	data, err := io.ReadAll(io.LimitReader(body, releaseMax+1))
	if err != nil {
		return nil, unreachable(url, err)
	}
	if len(data) > releaseMax {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", url, releaseMax, errdefs.ErrDataLoss)
	}
	return data, nil
}

// get requests url from byte offset on. resumed tells whether the server did start there.
func (a *Archive) get(ctx context.Context, url string, offset int64) (body io.ReadCloser, resumed bool, err error) {
	resp, err := request(ctx, a.HTTP, url, offset)
	if err != nil {
		return nil, false, err
	}
	return resp.Body, resp.StatusCode == http.StatusPartialContent, nil
}

func request(ctx context.Context, client *http.Client, url string, offset int64) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("mirror %q: %w: %w", url, err, errdefs.ErrInvalidArgument)
	}
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	resp, err := client.Do(req)
	if err != nil {
		cancel(nil)
		return nil, unreachable(url, err)
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
		watch := time.AfterFunc(stall, func() { cancel(fmt.Errorf("nothing came for %s", stall)) })
		resp.Body = &watchedBody{resp.Body, ctx, watch, cancel}
		return resp, nil
	}
	resp.Body.Close()
	cancel(nil)
	if resp.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("%s: %w", url, errdefs.ErrNotFound)
	}
	return nil, unreachable(url, errors.New(resp.Status))
}

func unreachable(url string, err error) error {
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("fetching %s: %w", url, err)
	}
	return hint.With(fmt.Errorf("fetching %s: %w: %w", url, err, errdefs.ErrUnavailable),
		"check the network (and http_proxy, where there is a proxy), or name another Debian mirror with --mirror")
}

// watchedBody ends a transfer that stalls.
type watchedBody struct {
	io.ReadCloser
	ctx    context.Context
	watch  *time.Timer
	cancel context.CancelCauseFunc
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.watch.Reset(stall)
	if err != nil && !errors.Is(err, io.EOF) && b.ctx.Err() != nil {
		err = context.Cause(b.ctx)
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.watch.Stop()
	b.cancel(nil)
	return b.ReadCloser.Close()
}

// download puts url at dst, whole and with the right hash, or not at all.
func (a *Archive) download(ctx context.Context, url, dst string, want file, progress func(done, total int64)) error {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	part, err := lockPart(ctx, dst+".part")
	if err != nil {
		return err
	}
	defer part.Close()
	if sum, err := hashFile(dst); err == nil && sum == want.sha256 {
		os.Remove(part.Name())
		progress(want.size, want.size)
		return nil
	}
	for try := 1; ; try++ {
		err = a.fill(ctx, url, part, want, progress)
		if err == nil {
			break
		}
		// What came so far stays for the next attempt or the next call.
		if try == attempts || ctx.Err() != nil || !errdefs.IsUnavailable(err) {
			return err
		}
		a.Log.Debug("download interrupted", "url", url, "attempt", try, "error", err)
	}
	sum, err := hashFile(part.Name())
	if err != nil {
		return err
	}
	if sum != want.sha256 {
		os.Remove(part.Name())
		return hint.With(fmt.Errorf("%s has SHA256 %s, the index says %s: %w", url, sum, want.sha256, errdefs.ErrDataLoss),
			"the mirror or something on the way to it changed the file: try again, or use another mirror, such as %s", DefaultMirror)
	}
	if err := part.Sync(); err != nil {
		return err
	}
	return os.Rename(part.Name(), dst)
}

// fill completes part to the wanted size.
func (a *Archive) fill(ctx context.Context, url string, part *os.File, want file, progress func(done, total int64)) error {
	done, err := part.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if done == want.size {
		return nil
	}
	if done > want.size {
		done = 0
	}
	body, resumed, err := a.get(ctx, url, done)
	if err != nil {
		return err
	}
	defer body.Close()
	if !resumed {
		done = 0
	}
	if err := part.Truncate(done); err != nil {
		return err
	}
	if _, err := part.Seek(done, io.SeekStart); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := body.Read(buf)
		if done+int64(n) > want.size {
			part.Truncate(0)
			return fmt.Errorf("%s is longer than the %d bytes of the index: %w", url, want.size, errdefs.ErrDataLoss)
		}
		if _, err := part.Write(buf[:n]); err != nil {
			return noSpace(part.Name(), err)
		}
		done += int64(n)
		progress(done, want.size)
		if err == io.EOF && done == want.size {
			return nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return unreachable(url, err)
		}
	}
}

func noSpace(path string, err error) error {
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	return hint.With(fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted), "make room on the file system of %s", filepath.Dir(path))
}

// lockPart opens the partial file for one process at a time.
func lockPart(ctx context.Context, path string) (*os.File, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) { // else the one before has renamed or removed it
			return f, nil
		}
		f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for another download of %s: %w", path, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func isAt(f *os.File, path string) bool {
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(opened, there)
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Get requests a file that no index vouches for: the caller verifies it. size is -1 where the server does not say. A transfer that stalls
// ends. errdefs.ErrNotFound, ErrUnavailable.
func Get(ctx context.Context, client *http.Client, url string) (body io.ReadCloser, size int64, err error) {
	resp, err := request(ctx, client, url, 0)
	if err != nil {
		return nil, 0, err
	}
	return resp.Body, resp.ContentLength, nil
}
