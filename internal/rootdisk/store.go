package rootdisk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	diskSuffix   = ".erofs"
	veritySuffix = ".verity"
	recordSuffix = ".json" // written last: a disk without its record does not exist
	tempPrefix   = ".tmp-"
)

// Disk is a finished root disk. Its file never changes; a machine that has it open keeps it when it is removed.
type Disk struct {
	Path        string        `json:"-"`
	Size        int64         `json:"size"`
	ImageDigest digest.Digest `json:"imageDigest"`
	Verity      *Verity       `json:"verity,omitempty"` // nil until prepared
	Entries     int           `json:"entries"`          // names in it
}

// Store is a directory of root disks, one per image digest.
type Store struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	locks map[digest.Digest]*lock // guarded by mu
}

// lock is held by whoever writes the files of one image.
type lock struct {
	held  chan struct{}
	users int // guarded by Store.mu
}

// Open makes the directory where it is missing and removes what dead processes left half-written in it.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the root disk store: %w", err)
	}
	s := &Store{dir: dir, log: log, locks: map[digest.Digest]*lock{}}
	if err := s.sweep(); err != nil {
		return nil, fmt.Errorf("opening the root disk store: %w", err)
	}
	return s, nil
}

// sweep removes temporary files and disks without a record, except those that a living process has locked.
func (s *Store) sweep() error {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		name := file.Name()
		stem, isDisk := strings.CutSuffix(name, diskSuffix)
		if !isDisk {
			stem, isDisk = strings.CutSuffix(name, veritySuffix)
		}
		if !strings.HasPrefix(name, tempPrefix) && !isDisk {
			continue
		}
		f, err := os.Open(filepath.Join(s.dir, name))
		if err != nil {
			continue // gone meanwhile
		}
		// The record is looked for under the lock: its writer holds it until the record is there.
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_, err := os.Stat(filepath.Join(s.dir, stem+recordSuffix))
			if !isDisk || errors.Is(err, fs.ErrNotExist) {
				s.log.Debug("removing a half-written root disk", "file", f.Name())
				os.Remove(f.Name())
			}
		}
		f.Close()
	}
	return nil
}

func (s *Store) path(img digest.Digest, suffix string) string {
	return filepath.Join(s.dir, img.Algorithm().String()+"-"+img.Encoded()+suffix)
}

// Get returns the disk of an image; errdefs.ErrNotFound when there is none yet.
func (s *Store) Get(img digest.Digest) (Disk, error) {
	if err := img.Validate(); err != nil {
		return Disk{}, fmt.Errorf("root disk of image %q: %w: %w", img, err, errdefs.ErrInvalidArgument)
	}
	d := Disk{Path: s.path(img, diskSuffix)}
	record, err := os.ReadFile(s.path(img, recordSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return Disk{}, fmt.Errorf("root disk of image %s: %w", img, errdefs.ErrNotFound)
	}
	if err != nil {
		return Disk{}, fmt.Errorf("root disk of image %s: %w", img, err)
	}
	// A record or disk that was damaged or taken away counts as missing: Ensure then makes both anew.
	st, statErr := os.Stat(d.Path)
	if err := json.Unmarshal(record, &d); err != nil || statErr != nil || st.Size() != d.Size || d.ImageDigest != img {
		return Disk{}, fmt.Errorf("root disk of image %s is damaged: %w", img, errdefs.ErrNotFound)
	}
	if d.Verity != nil {
		d.Verity.Path = s.path(img, veritySuffix)
	}
	return d, nil
}

// Ensure returns the disk of an image and makes it first where it is missing; of callers at the same time one does the work.
// Layers are bottom first. progress, which may be nil, hears how many stored bytes of the layers have been read.
func (s *Store) Ensure(ctx context.Context, img digest.Digest, layers []Layer, progress func(done int64)) (Disk, error) {
	if d, err := s.Get(img); !errdefs.IsNotFound(err) {
		return d, err
	}
	unlock, err := s.lock(ctx, img)
	if err != nil {
		return Disk{}, fmt.Errorf("making the root disk of image %s: %w", img, err)
	}
	defer unlock()
	if d, err := s.Get(img); err == nil {
		return d, nil
	}
	start := time.Now()
	d := Disk{Path: s.path(img, diskSuffix), ImageDigest: img}
	err = s.write(d.Path, func(f *os.File) error {
		var err error
		d.Size, d.Entries, err = build(ctx, f, seed(img, "uuid"), layers, progress)
		return err
	}, func() error { return s.record(d) })
	if err != nil {
		return Disk{}, fmt.Errorf("making the root disk of image %s: %w", img, err)
	}
	s.log.Debug("root disk made", "image", img, "size", d.Size, "entries", d.Entries, "took", time.Since(start))
	return d, nil
}

func build(ctx context.Context, f *os.File, seed [32]byte, layers []Layer, progress func(int64)) (int64, int, error) {
	fs := newErofs(f)
	defer fs.out.stop()
	flat := newFlattener(fs, progress)
	if err := flat.flatten(ctx, layers); err != nil {
		return 0, 0, err
	}
	return fs.finish(flat.root, uuid(seed))
}

// PrepareVerity makes the dm-verity hash tree of an image's disk where it is missing. The same image has the same root hash.
func (s *Store) PrepareVerity(ctx context.Context, img digest.Digest) (Disk, error) {
	unlock, err := s.lock(ctx, img)
	if err != nil {
		return Disk{}, fmt.Errorf("making the hash tree of image %s: %w", img, err)
	}
	defer unlock()
	d, err := s.Get(img)
	if err != nil {
		return Disk{}, err
	}
	if d.Verity != nil {
		if _, err := os.Stat(d.Verity.Path); err == nil {
			return d, nil
		}
	}
	if err := s.writeVerity(ctx, &d); err != nil {
		return Disk{}, fmt.Errorf("making the hash tree of image %s: %w", img, err)
	}
	return d, nil
}

func (s *Store) writeVerity(ctx context.Context, d *Disk) error {
	data, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	defer data.Close()
	salt, id := seed(d.ImageDigest, "salt"), uuid(seed(d.ImageDigest, "verity"))
	path := s.path(d.ImageDigest, veritySuffix)
	return s.write(path, func(f *os.File) error {
		root, err := writeVerity(ctx, data, d.Size, f, salt[:], id[:])
		if err != nil {
			return err
		}
		d.Verity = &Verity{Path: path, RootHash: hex.EncodeToString(root), Salt: hex.EncodeToString(salt[:]), DataBlocks: d.Size / blockSize}
		return nil
	}, func() error { return s.record(*d) })
}

// Remove deletes the disk of an image; errdefs.ErrNotFound when there is none.
func (s *Store) Remove(img digest.Digest) error {
	if err := img.Validate(); err != nil {
		return fmt.Errorf("removing the root disk of image %q: %w: %w", img, err, errdefs.ErrInvalidArgument)
	}
	unlock, err := s.lock(context.Background(), img)
	if err != nil {
		return err
	}
	defer unlock()
	err = os.Remove(s.path(img, recordSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	for _, suffix := range []string{diskSuffix, veritySuffix} {
		if e := os.Remove(s.path(img, suffix)); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		return fmt.Errorf("removing the root disk of image %s: %w", img, err)
	}
	return nil
}

// List returns all disks, by digest.
func (s *Store) List() ([]Disk, error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing root disks: %w", err)
	}
	var disks []Disk
	for _, file := range files {
		stem, ok := strings.CutSuffix(file.Name(), recordSuffix)
		algorithm, hash, cut := strings.Cut(stem, "-")
		if !ok || !cut || strings.HasPrefix(stem, tempPrefix) {
			continue
		}
		d, err := s.Get(digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hash))
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing root disks: %w", err)
		}
		disks = append(disks, d)
	}
	return disks, nil
}

// lock waits for the right to write an image's files.
func (s *Store) lock(ctx context.Context, img digest.Digest) (unlock func(), err error) {
	s.mu.Lock()
	l := s.locks[img]
	if l == nil {
		l = &lock{held: make(chan struct{}, 1)}
		s.locks[img] = l
	}
	l.users++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(s.locks, img)
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

func (s *Store) record(d Disk) error {
	return s.write(s.path(d.ImageDigest, recordSuffix), func(f *os.File) error {
		return json.NewEncoder(f).Encode(d)
	}, func() error { return nil })
}

// write makes a file whole or not at all: fill writes a temporary file, which is synced and renamed; then commit runs while
// the file is still locked against sweep.
func (s *Store) write(path string, fill func(*os.File) error, commit func() error) (err error) {
	f, err := s.temp()
	if err != nil {
		return s.explain(path, err)
	}
	defer f.Close()
	temp := f.Name()
	defer func() {
		if err != nil {
			os.Remove(temp)
		}
	}()
	if err := fill(f); err != nil {
		return s.explain(path, err)
	}
	if err := f.Sync(); err != nil {
		return s.explain(path, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	if err := s.syncDir(); err != nil {
		return err
	}
	return commit()
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
func (s *Store) explain(path string, err error) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return err
	}
	var st syscall.Statfs_t
	if e := syscall.Statfs(s.dir, &st); e != nil {
		return errors.Join(err, e)
	}
	free := float64(st.Bavail) * float64(st.Bsize) / (1 << 20)
	err = fmt.Errorf("writing %s (%.1f MiB free there): %w: %w", path, free, err, errdefs.ErrResourceExhausted)
	return hint.With(err, "free some space on the file system of %s, for example with: atoll image rm", s.dir)
}

// seed derives identifiers from the image, so that making its disk again gives the same bytes.
func seed(img digest.Digest, what string) [32]byte {
	return sha256.Sum256([]byte("atoll root disk " + what + " " + img.String()))
}

// uuid makes a version 8 UUID: 122 bits of our own choice.
func uuid(seed [32]byte) (u [16]byte) {
	copy(u[:], seed[:])
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}
