package filetar

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// UnpackOptions say what of a stream is taken.
type UnpackOptions struct {
	// Name is what the stream's one tree is to be called, instead of what the stream calls it; "." has only its contents unpacked.
	// Empty: the stream may hold anything, under its own names.
	Name          string
	Owners        bool // the stream's, and extended attributes; else the files belong to whoever unpacks
	Trusted       bool // the stream may make devices, and programs that run as their owner
	NoReplaceKind bool // a directory never replaces a file, nor the other way round
	// FollowLinks goes along links that lie in the directory, as long as they stay inside it. For who unpacks a friend's stream; a stranger's
	// brings its own links, to whatever lies beside its tree.
	FollowLinks bool
	// Left is told of each file that was left out, its name quoted. May be nil.
	Left func(name, why string)
}

// Unpack writes what a tar stream holds below the directory dir, which must be there. Each file is there whole or not at all: it gets its
// name when it is complete. The end of ctx ends it also within a file that is one endless hole.
func Unpack(ctx context.Context, r io.Reader, dir string, o UnpackOptions) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nameError("unpacking in", dir, err)
	}
	u := &unpacker{UnpackOptions: o, cancelled: ctx.Err, path: dir, root: root, buf: make([]byte, 128<<10)}
	defer func() { err = errors.Join(err, u.close()) }()
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return u.finishDirectories()
		}
		if err != nil {
			return fmt.Errorf("reading the tar stream: %w", err)
		}
		if err := u.entry(h, in); err != nil {
			return err
		}
	}
}

type unpacker struct {
	UnpackOptions
	cancelled func() error
	path      string
	root      *os.Root
	buf       []byte
	tree      string // what the stream calls its one tree

	parent   string   // where dir is
	dir      *os.Root // the directory that was last worked in
	finished []finish // directories get their modes and times last, since these change, or forbid, what goes on inside
}

type finish struct {
	name string
	h    *tar.Header
}

func (u *unpacker) close() error {
	if u.dir != nil {
		u.dir.Close()
	}
	return u.root.Close()
}

var errLeaves = errors.New("the name leads out of the directory")

// place is where an entry goes, relative to the directory; "." is that itself.
func (u *unpacker) place(name string) (string, error) {
	if slices.Contains(strings.Split(name, "/"), "..") {
		return "", errLeaves
	}
	if u.Name != "" {
		first, rest, _ := strings.Cut(strings.TrimLeft(name, "/"), "/")
		switch {
		case u.tree == "":
			u.tree = first
		case u.tree != first:
			return "", errors.New("the stream holds more than one tree")
		}
		name = u.Name + "/" + rest
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		name = "."
	}
	return name, nil
}

// in opens the directory of that name, which is made where it is missing.
func (u *unpacker) in(name string) (*os.Root, error) {
	if u.dir != nil && u.parent == name {
		return u.dir, nil
	}
	dir, err := u.open(name, true)
	if err != nil {
		return nil, nameError("opening directory", name, err)
	}
	if u.dir != nil {
		u.dir.Close()
	}
	u.parent, u.dir = name, dir
	return dir, nil
}

func (u *unpacker) open(name string, missing bool) (*os.Root, error) {
	if !u.FollowLinks {
		return u.walk(name, missing)
	}
	stat, open := u.root.Stat, u.root.OpenRoot
	mkdir := func() error { return u.root.MkdirAll(name, 0o755) }
	if u.path == "/" { // nothing is outside
		stat = func(name string) (fs.FileInfo, error) { return os.Stat("/" + name) }
		open = func(name string) (*os.Root, error) { return os.OpenRoot("/" + name) }
		mkdir = func() error { return os.MkdirAll("/"+name, 0o755) }
	}
	there, err := stat(name)
	if missing && errors.Is(err, fs.ErrNotExist) {
		if err = mkdir(); err == nil {
			there, err = stat(name)
		}
	}
	switch {
	case err != nil:
		return nil, err
	case !there.IsDir():
		return nil, syscall.ENOTDIR // os.Root would wait for a writer of a pipe
	}
	return open(name)
}

var errLink = errors.New("a symbolic link is on the way there, which is not followed")

// walk opens a directory one component at a time, none of them a link.
func (u *unpacker) walk(name string, missing bool) (*os.Root, error) {
	dir, err := u.root.OpenRoot(".")
	for component := range strings.SplitSeq(name, "/") {
		if err != nil {
			return nil, err
		}
		up := dir
		dir, err = step(up, component, missing)
		up.Close()
	}
	return dir, err
}

func step(up *os.Root, name string, missing bool) (*os.Root, error) {
	there, err := up.Lstat(name)
	if missing && errors.Is(err, fs.ErrNotExist) {
		if err := up.Mkdir(name, 0o755); err != nil {
			return nil, err
		}
		there, err = up.Lstat(name)
	}
	switch {
	case err != nil:
		return nil, err
	case there.Mode()&fs.ModeSymlink != 0:
		return nil, errLink
	case !there.IsDir():
		return nil, syscall.ENOTDIR // os.Root would wait for a writer of a pipe
	}
	dir, err := up.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	// What was opened is what was looked at, also where somebody puts a link in between.
	if opened, err := dir.Stat("."); err != nil || !os.SameFile(there, opened) {
		dir.Close()
		return nil, errors.Join(errLink, err)
	}
	return dir, nil
}

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	name, err := u.place(h.Name)
	if err != nil {
		return nameError("unpacking", h.Name, err)
	}
	if name == "." {
		if h.Typeflag == tar.TypeDir {
			return nil // as it is
		}
		return nameError("unpacking", h.Name, errors.New("it would replace the directory"))
	}
	if why := u.unwanted(h); why != "" {
		if u.Left != nil {
			u.Left(fmt.Sprintf("%q", name), why)
		}
		return nil
	}
	dir, err := u.in(path.Dir(name))
	if err != nil {
		return err
	}
	base := path.Base(name)
	there, err := dir.Lstat(base)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nameError("unpacking", name, err)
	}
	if err := u.makeRoom(dir, base, name, there, h.Typeflag == tar.TypeDir); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		if err := dir.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nameError("making directory", name, err)
		}
		u.finished = append(u.finished, finish{name, h})
		return nil
	}
	// Under a name of its own first.
	temp := ".atoll-" + rand.Text()[:16]
	if err := u.make(dir, temp, h, content); err != nil {
		_ = dir.Remove(temp)
		return nameError("unpacking", name, err)
	}
	err = dir.Rename(temp, base)
	_ = dir.Remove(temp) // a rename between two links to one file does nothing
	if err != nil {
		return nameError("unpacking", name, err)
	}
	return nil
}

// unwanted says why an entry is left out.
func (u *unpacker) unwanted(h *tar.Header) string {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo:
		return ""
	case tar.TypeChar, tar.TypeBlock:
		if u.Trusted {
			return ""
		}
		return "a device"
	case tar.TypeXGlobalHeader:
		return "a comment of the archive"
	}
	return fmt.Sprintf("of an unknown kind, %q", h.Typeflag)
}

// makeRoom takes away what must not be merged with or replaced by a rename.
func (u *unpacker) makeRoom(dir *os.Root, base, name string, there fs.FileInfo, isDir bool) error {
	if there == nil || there.IsDir() == isDir {
		return nil
	}
	if u.NoReplaceKind {
		if isDir {
			return fmt.Errorf("cannot overwrite non-directory %q with a directory", name)
		}
		return fmt.Errorf("cannot overwrite directory %q with a non-directory", name)
	}
	if err := dir.RemoveAll(base); err != nil {
		return nameError("replacing", name, err)
	}
	return nil
}

// make makes a file that is no directory, with all that belongs to it.
func (u *unpacker) make(dir *os.Root, name string, h *tar.Header, content io.Reader) error {
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(u.fill(f, content, h.Size), f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := dir.Symlink(h.Linkname, name); err != nil {
			return err
		}
	case tar.TypeLink:
		return u.link(dir, name, h)
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		if err := makeNode(dir, name, h); err != nil {
			return err
		}
	}
	return u.adorn(dir, name, h)
}

// link makes a hard link to what the stream held before.
func (u *unpacker) link(dir *os.Root, name string, h *tar.Header) error {
	target, err := u.place(h.Linkname)
	if err != nil {
		return err
	}
	from := dir
	if path.Dir(target) != u.parent {
		if from, err = u.open(path.Dir(target), false); err != nil {
			return fmt.Errorf("finding %q, which it is a hard link to: %w", target, err)
		}
		defer from.Close()
	}
	return linkBetween(from, path.Base(target), dir, name)
}

func linkBetween(from *os.Root, target string, to *os.Root, name string) error {
	return at(from, func(fromFD int) error {
		return at(to, func(toFD int) error { return unix.Linkat(fromFD, target, toFD, name, 0) })
	})
}

// at calls do with the descriptor of a directory.
func at(dir *os.Root, do func(fd int) error) error {
	f, err := dir.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	return do(int(f.Fd()))
}

// fill writes a file's content. Blocks of zeros become holes.
func (u *unpacker) fill(f *os.File, content io.Reader, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		if err := u.cancelled(); err != nil {
			return err
		}
		n, err := io.ReadFull(content, u.buf[:min(size-at, int64(len(u.buf)))])
		if err != nil {
			return fmt.Errorf("reading the tar stream: %w", err)
		}
		for _, e := range written(u.buf[:n]) {
			if _, err := f.WriteAt(u.buf[e.offset:e.offset+e.size], at+e.offset); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	return nil
}

const page = 4096

// written is the parts of p that are not pages of zeros.
func written(p []byte) (runs []extent) {
	for at := 0; at < len(p); at += page {
		b := p[at:min(at+page, len(p))]
		if bytes.Equal(b, zeros[:len(b)]) {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1].offset+runs[n-1].size == int64(at) {
			runs[n-1].size += int64(len(b))
		} else {
			runs = append(runs, extent{int64(at), int64(len(b))})
		}
	}
	return runs
}

var zeros = make([]byte, page)

// adorn gives a file its owner, mode, attributes and time, in the order in which none undoes another.
func (u *unpacker) adorn(dir *os.Root, name string, h *tar.Header) error {
	if u.Owners {
		if err := dir.Lchown(name, h.Uid, h.Gid); err != nil && !(errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0) {
			return err
		}
	}
	if h.Typeflag != tar.TypeSymlink {
		mode := fs.FileMode(h.Mode & 0o777)
		if h.Mode&0o1000 != 0 {
			mode |= fs.ModeSticky
		}
		if u.Trusted && h.Mode&0o4000 != 0 {
			mode |= fs.ModeSetuid
		}
		if u.Trusted && h.Mode&0o2000 != 0 {
			mode |= fs.ModeSetgid
		}
		if err := dir.Chmod(name, mode); err != nil {
			return err
		}
	}
	if u.Owners {
		if err := setXattrs(dir, name, h); err != nil {
			return err
		}
	}
	return setTime(dir, name, h.ModTime)
}

// finishDirectories goes from the inside out.
func (u *unpacker) finishDirectories() error {
	for _, f := range slices.Backward(u.finished) {
		dir, err := u.in(path.Dir(f.name))
		if err != nil {
			return err
		}
		if fi, err := dir.Lstat(path.Base(f.name)); err != nil || !fi.IsDir() {
			continue // the stream itself replaced it
		}
		if err := u.adorn(dir, path.Base(f.name), f.h); err != nil {
			return nameError("unpacking", f.name, err)
		}
	}
	return nil
}

// timeOf keeps times that the kernel cannot hold from being an error.
func timeOf(t time.Time) time.Time {
	if y := t.Year(); y < 1902 || y > 2400 {
		return time.Unix(0, 0)
	}
	return t
}
