package rootdisk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	diskSuffix       = ".erofs"
	recordSuffix     = ".json" // of an image, written last
	diskRecordSuffix = ".disk.json"
	tempPrefix       = ".tmp-"
	oldVeritySuffix  = ".verity" // version 0.1 had a hash tree in a file of its own, and the disk in one named by the image
)

// Store is a directory of root disks: each image has a record that names its disks, and images share them.
type Store struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	locks map[string]*lock // guarded by mu
}

// lock is held by whoever makes the root of one image, or one disk.
type lock struct {
	held  chan struct{}
	users int // guarded by Store.mu
}

// Open makes the directory where it is missing and removes what dead processes left half-written in it, and what older versions made.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the root disk store: %w", err)
	}
	s := &Store{dir: dir, log: log, locks: map[string]*lock{}}
	if err := s.sweep(); err != nil {
		return nil, fmt.Errorf("opening the root disk store: %w", err)
	}
	return s, nil
}

// sweep removes temporary files and disks that no image uses, except those that somebody has locked: a living process makes or is
// about to use them. Which are used is asked of the images' records, so a crash leaves no wrong count.
func (s *Store) sweep() error {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	used, err := s.Users()
	if err != nil {
		return err
	}
	for _, file := range files {
		name := file.Name()
		key, isDisk := strings.CutSuffix(name, diskSuffix)
		if old := strings.HasSuffix(name, oldVeritySuffix); !old && !strings.HasPrefix(name, tempPrefix) && (!isDisk || used[key] > 0) {
			continue
		}
		f, err := os.Open(filepath.Join(s.dir, name))
		if err != nil {
			continue // gone meanwhile
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			s.sweepLocked(f, key)
		}
		f.Close()
	}
	return nil
}

// sweepLocked looks once more, under the file's lock: whoever uses a disk holds it until the image's record is there.
func (s *Store) sweepLocked(f *os.File, key string) {
	used, err := s.Users()
	if err != nil || used[key] > 0 || !isStill(f) {
		return
	}
	s.log.Debug("removing a root disk that no image uses", "file", f.Name())
	os.Remove(s.diskRecord(key))
	os.Remove(f.Name())
}

// isStill says whether an open file is what its name leads to.
func isStill(f *os.File) bool {
	open, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(f.Name())
	return err == nil && os.SameFile(open, named)
}

// record is what is stored of an image.
type record struct {
	ImageDigest digest.Digest `json:"imageDigest"`
	Disks       []string      `json:"disks"` // keys, the lowest first
}

func (s *Store) imageRecord(img digest.Digest) string {
	return filepath.Join(s.dir, img.Algorithm().String()+"-"+img.Encoded()+recordSuffix)
}

func (s *Store) diskRecord(key string) string { return filepath.Join(s.dir, key+diskRecordSuffix) }
func (s *Store) diskPath(key string) string   { return filepath.Join(s.dir, key+diskSuffix) }

// Get returns the root of an image; errdefs.ErrNotFound when there is none yet.
func (s *Store) Get(img digest.Digest) (Root, error) {
	if err := img.Validate(); err != nil {
		return Root{}, fmt.Errorf("root disk of image %q: %w: %w", img, err, errdefs.ErrInvalidArgument)
	}
	var r record
	switch data, err := os.ReadFile(s.imageRecord(img)); {
	case errors.Is(err, fs.ErrNotExist):
		return Root{}, fmt.Errorf("root disk of image %s: %w", img, errdefs.ErrNotFound)
	case err != nil:
		return Root{}, fmt.Errorf("root disk of image %s: %w", img, err)
	case json.Unmarshal(data, &r) != nil || r.ImageDigest != img || len(r.Disks) == 0:
		return Root{}, fmt.Errorf("root disk of image %s is damaged: %w", img, errdefs.ErrNotFound)
	}
	root := Root{ImageDigest: img}
	for _, key := range r.Disks {
		d, err := s.disk(key)
		if err != nil {
			return Root{}, fmt.Errorf("root disk of image %s: %w", img, err)
		}
		root.Disks = append(root.Disks, d)
	}
	return root, nil
}

// disk returns a disk that is there. A record or file that was damaged or taken away counts as missing: Ensure then makes both anew.
func (s *Store) disk(key string) (Disk, error) {
	d := Disk{Path: s.diskPath(key)}
	data, err := os.ReadFile(s.diskRecord(key))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Disk{}, err
	}
	st, statErr := os.Stat(d.Path)
	if err != nil || json.Unmarshal(data, &d) != nil || statErr != nil || st.Size() != d.FileSize() || d.Key != key {
		return Disk{}, fmt.Errorf("%s is missing or damaged: %w", d.Path, errdefs.ErrNotFound)
	}
	return d, nil
}

// Ensure returns the root of an image and makes first what is missing of it; of callers at the same time one does the work.
// Layers are bottom first. Disks of other images that hold the same layers are used. progress, which may be nil, hears how many
// stored bytes of the layers have been read.
func (s *Store) Ensure(ctx context.Context, img digest.Digest, layers []Layer, progress func(done int64)) (Root, error) {
	if r, err := s.Get(img); !errdefs.IsNotFound(err) {
		return r, err
	}
	unlock, err := s.lock(ctx, img.String())
	if err != nil {
		return Root{}, fmt.Errorf("making the root disk of image %s: %w", img, err)
	}
	defer unlock()
	if r, err := s.Get(img); err == nil {
		return r, nil
	}
	start := time.Now()
	r := Root{ImageDigest: img}
	if r.Disks, err = s.assemble(ctx, img, layers, s.plan(layers), adder(progress)); err != nil {
		if err := s.sweep(); err != nil {
			s.log.Error("removing what a failed conversion left", "image", img, "err", err)
		}
		return Root{}, fmt.Errorf("making the root disk of image %s: %w", img, err)
	}
	s.log.Debug("root disk made", "image", img, "size", r.Size(), "disks", len(r.Disks), "took", time.Since(start))
	return r, nil
}

func (s *Store) plan(layers []Layer) []run {
	return plan(layers, func(r run) bool {
		for _, leans := range []bool{false, true} {
			if _, err := os.Stat(s.diskRecord(key(layers, r, leans))); err == nil {
				return true
			}
		}
		return false
	})
}

// assemble finds or makes the disks of an image, one for each run, and records them.
func (s *Store) assemble(ctx context.Context, img digest.Digest, layers []Layer, runs []run, progress func(int)) ([]Disk, error) {
	// In the order of their keys, lest two images wait for each other.
	var keys []string
	for _, r := range runs {
		keys = append(keys, key(layers, r, false))
	}
	for _, k := range slices.Compact(slices.Sorted(slices.Values(keys))) {
		unlock, err := s.lock(ctx, k)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	a := &assembly{s: s, layers: layers, progress: progress, pieces: make([]piece, len(runs))}
	defer a.close()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(2, runtime.GOMAXPROCS(0))) // those below begin first, so nobody waits for one that waits for its turn
	for i, r := range runs {
		a.pieces[i] = piece{run: r, done: make(chan struct{})}
		g.Go(func() error { return a.make(ctx, i) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var disks []Disk
	r := record{ImageDigest: img}
	for _, p := range a.pieces {
		if p.disk.HidesBelow {
			disks, r.Disks = nil, nil
		}
		disks, r.Disks = append(disks, p.disk), append(r.Disks, p.disk.Key)
	}
	return disks, s.writeJSON(s.imageRecord(img), r)
}

// assembly is the making of one image's disks, from the bottom up and several at a time.
type assembly struct {
	s        *Store
	layers   []Layer
	progress func(int)
	pieces   []piece
}

// piece is one disk of an assembly.
type piece struct {
	run  run
	done chan struct{} // closed when what follows is set
	disk Disk
	file *os.File // locked against sweep
	err  error
}

func (a *assembly) close() {
	for _, p := range a.pieces {
		if p.file != nil {
			p.file.Close()
		}
	}
}

func (a *assembly) make(ctx context.Context, i int) error {
	p := &a.pieces[i]
	defer close(p.done)
	for _, leans := range []bool{false, true} {
		if p.disk, p.file = a.s.hold(key(a.layers, p.run, leans)); p.file != nil {
			return nil
		}
	}
	var below func() (stack, error)
	if p.run.from > 0 {
		below = sync.OnceValues(func() (stack, error) { return a.below(ctx, i) })
	}
	p.disk, p.file, p.err = a.s.make(ctx, a.layers, p.run, below, a.progress)
	return p.err
}

// below waits for the disks under the i-th and opens them, the topmost first.
func (a *assembly) below(ctx context.Context, i int) (stack, error) {
	var st stack
	for i--; i >= 0; i-- {
		p := &a.pieces[i]
		select {
		case <-p.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if p.err != nil {
			return nil, p.err
		}
		r, err := newReader(p.file, p.disk.Size)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.disk.Path, err)
		}
		st = append(st, r)
		if p.disk.HidesBelow {
			break
		}
	}
	return st, nil
}

// hold opens a disk that is there and keeps it from being swept; nil when it is not there.
func (s *Store) hold(key string) (Disk, *os.File) {
	f, err := os.Open(s.diskPath(key))
	if err != nil {
		return Disk{}, nil
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_SH) == nil && isStill(f) {
		if d, err := s.disk(key); err == nil {
			return d, f
		}
	}
	f.Close()
	return Disk{}, nil
}

// make makes one disk and leaves its file locked against sweep.
func (s *Store) make(ctx context.Context, layers []Layer, r run, below func() (stack, error), progress func(int)) (Disk, *os.File, error) {
	own := key(layers, r, false)
	d := Disk{}
	f, err := s.write(s.diskPath(own), func(f *os.File) (string, error) {
		m, err := build(ctx, f, uuid(seed(own, "uuid")), layers[r.from:r.to], below, progress)
		if err != nil {
			return "", err
		}
		verity, err := seal(ctx, f, m.size, own)
		if err != nil {
			return "", err
		}
		k := key(layers, r, m.leans)
		d = Disk{Key: k, Path: s.diskPath(k), Size: m.size, Entries: m.entries, Verity: verity, HasRoot: m.hasRoot, HidesBelow: m.hides}
		for _, l := range layers[r.from:r.to] {
			d.Layers = append(d.Layers, l.Digest)
		}
		return d.Path, nil
	})
	if err != nil {
		return Disk{}, nil, err
	}
	if err := s.writeJSON(s.diskRecord(d.Key), d); err != nil {
		return Disk{}, nil, errors.Join(err, f.Close())
	}
	// From here on others may use it too; also this very image, which may have the same layer twice.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		return Disk{}, nil, errors.Join(err, f.Close())
	}
	return d, f, nil
}

// Remove lets go of the root of an image and deletes its disks, but those that other images use. errdefs.ErrNotFound when there is none.
func (s *Store) Remove(img digest.Digest) error {
	if err := img.Validate(); err != nil {
		return fmt.Errorf("removing the root disk of image %q: %w: %w", img, err, errdefs.ErrInvalidArgument)
	}
	unlock, err := s.lock(context.Background(), img.String())
	if err != nil {
		return err
	}
	defer unlock()
	err = os.Remove(s.imageRecord(img))
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	if err == nil {
		err = s.sweep()
	}
	if err != nil {
		return fmt.Errorf("removing the root disk of image %s: %w", img, err)
	}
	return nil
}

// List returns the roots of all images, by digest.
func (s *Store) List() ([]Root, error) {
	images, err := s.records()
	if err != nil {
		return nil, fmt.Errorf("listing root disks: %w", err)
	}
	var roots []Root
	for _, i := range images {
		r, err := s.Get(i.ImageDigest)
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing root disks: %w", err)
		}
		roots = append(roots, r)
	}
	return roots, nil
}

// Users returns how many images use each disk, by its key.
func (s *Store) Users() (map[string]int, error) {
	images, err := s.records()
	if err != nil {
		return nil, fmt.Errorf("reading the records of root disks: %w", err)
	}
	used := map[string]int{}
	for _, i := range images {
		for _, key := range i.Disks {
			used[key]++
		}
	}
	return used, nil
}

func (s *Store) records() ([]record, error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var images []record
	for _, file := range files {
		name := file.Name()
		if !strings.HasSuffix(name, recordSuffix) || strings.HasSuffix(name, diskRecordSuffix) || strings.HasPrefix(name, tempPrefix) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(s.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		var r record
		if json.Unmarshal(data, &r) == nil { // a damaged one counts for nothing, as in Get
			images = append(images, r)
		}
	}
	return images, nil
}

// lock waits for the right to write an image's record, or a disk.
func (s *Store) lock(ctx context.Context, what string) (unlock func(), err error) {
	s.mu.Lock()
	l := s.locks[what]
	if l == nil {
		l = &lock{held: make(chan struct{}, 1)}
		s.locks[what] = l
	}
	l.users++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(s.locks, what)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}

func (s *Store) writeJSON(path string, v any) error {
	f, err := s.write(path, func(f *os.File) (string, error) { return path, json.NewEncoder(f).Encode(v) })
	if err != nil {
		return err
	}
	return f.Close()
}

// write makes a file whole or not at all: fill writes a temporary file and says what its name is to be. It comes back open and locked
// against sweep.
func (s *Store) write(path string, fill func(*os.File) (string, error)) (_ *os.File, err error) {
	f, err := s.temp()
	if err != nil {
		return nil, explain(path, err)
	}
	temp := f.Name()
	defer func() {
		if err != nil {
			os.Remove(temp)
			f.Close()
		}
	}()
	name, err := fill(f)
	if err != nil {
		return nil, explain(path, err)
	}
	if err := f.Sync(); err != nil {
		return nil, explain(path, err)
	}
	if err := os.Rename(temp, name); err != nil {
		return nil, err
	}
	return f, s.syncDir()
}

// temp makes a file that is locked as long as it is open, so that another process's sweep can tell that we live.
func (s *Store) temp() (*os.File, error) {
	for {
		f, err := os.CreateTemp(s.dir, tempPrefix)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			os.Remove(f.Name())
			return nil, errors.Join(err, f.Close())
		}
		// Swept between the two calls: once more.
		if _, err := os.Stat(f.Name()); err == nil {
			return f, nil
		}
		f.Close()
	}
}

func (s *Store) syncDir() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// explain adds what is free to an error of a full disk.
func explain(path string, err error) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return err
	}
	dir := filepath.Dir(path)
	var st syscall.Statfs_t
	if e := syscall.Statfs(dir, &st); e != nil {
		return errors.Join(err, e)
	}
	free := float64(st.Bavail) * float64(st.Bsize) / (1 << 20)
	err = fmt.Errorf("writing %s (%.1f MiB free there): %w: %w", path, free, err, errdefs.ErrResourceExhausted)
	return hint.With(err, "free some space on the file system of %s, for example with: atoll image rm", dir)
}

// adder turns what was read into how much was read in all; it may be called from several goroutines.
func adder(progress func(done int64)) func(int) {
	if progress == nil {
		return func(int) {}
	}
	var mu sync.Mutex
	var sum int64 // guarded by mu
	return func(n int) {
		mu.Lock()
		defer mu.Unlock()
		if sum += int64(n); n > 0 {
			progress(sum)
		}
	}
}
