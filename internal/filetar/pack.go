package filetar

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// PackOptions say how a tree becomes a stream.
type PackOptions struct {
	Name   string // of the tree's root; default: Base of the path
	Follow bool   // where the path itself is a link
}

// Pack writes the file or tree at path as a tar stream. Sockets, which no archive can hold, are left out, and what the kernel keeps in
// file systems of its own (proc, sysfs, …) below the root of the tree is as well.
func Pack(w io.Writer, path string, o PackOptions) error {
	if o.Name == "" {
		o.Name = Base(path)
	}
	if o.Follow {
		var err error
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nameError("reading", path, err)
		}
	}
	p := &packer{out: w, tar: tar.NewWriter(w), links: map[inode]string{}, buf: make([]byte, 128<<10)}
	if err := p.add(path, o.Name, 0, true); err != nil {
		return err
	}
	return p.tar.Close()
}

type inode struct{ dev, ino uint64 }

type packer struct {
	out   io.Writer
	tar   *tar.Writer
	links map[inode]string // the names of files that have several
	buf   []byte
}

func (p *packer) add(path, name string, parent uint64, root bool) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) && !root {
		return nil // it went while the tree was walked
	}
	if err != nil {
		return nameError("reading", path, err)
	}
	st := statOf(fi)
	h := &tar.Header{Name: name, Mode: st.mode & 0o7777, Uid: st.uid, Gid: st.gid, ModTime: fi.ModTime(), Format: tar.FormatPAX}
	switch mode := fi.Mode(); {
	case mode.IsDir():
		return p.directory(path, h, st, parent, root)
	case mode.IsRegular():
		return p.file(path, h, st)
	case mode&fs.ModeSymlink != 0:
		h.Typeflag, h.Mode = tar.TypeSymlink, 0o777
		if h.Linkname, err = os.Readlink(path); err != nil {
			return nameError("reading", path, err)
		}
	case mode&fs.ModeNamedPipe != 0:
		h.Typeflag = tar.TypeFifo
	case mode&fs.ModeDevice != 0:
		h.Typeflag = tar.TypeBlock
		if mode&fs.ModeCharDevice != 0 {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = deviceNumbers(st.rdev)
	default:
		return nil
	}
	p.isLink(h, st)
	return p.header(h)
}

func (p *packer) header(h *tar.Header) error {
	if err := p.tar.WriteHeader(h); err != nil {
		return nameError("packing", h.Name, err)
	}
	return nil
}

// isLink makes h a link to a file that the stream has already.
func (p *packer) isLink(h *tar.Header, st stat) bool {
	if st.nlink < 2 {
		return false
	}
	id := inode{st.dev, st.ino}
	first, seen := p.links[id]
	if !seen {
		p.links[id] = h.Name
		return false
	}
	h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
	return true
}

func (p *packer) directory(path string, h *tar.Header, st stat, parent uint64, root bool) error {
	h.Typeflag = tar.TypeDir
	name := h.Name
	h.Name += "/"
	if err := p.attributes(path, h); err != nil {
		return err
	}
	if err := p.header(h); err != nil {
		return err
	}
	if !root && st.dev != parent && kernelOwn(path) {
		return nil
	}
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) && !root {
		return nil
	}
	if err != nil {
		return nameError("reading", path, err)
	}
	for _, e := range entries {
		if err := p.add(filepath.Join(path, e.Name()), name+"/"+e.Name(), st.dev, false); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) file(path string, h *tar.Header, st stat) error {
	h.Typeflag = tar.TypeReg
	if p.isLink(h, st) {
		return p.header(h)
	}
	// It may have become something else meanwhile, which must neither be followed nor waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return nameError("reading", path, err)
	}
	defer f.Close()
	now, err := f.Stat()
	if err != nil {
		return nameError("reading", path, err)
	}
	if !now.Mode().IsRegular() {
		return nameError("reading", path, errors.New("it has become something else"))
	}
	h.Size = now.Size()
	if err := p.attributes(path, h); err != nil {
		return err
	}
	data, sparse := extents(f, h.Size)
	if sparse {
		return p.sparse(f, h, data)
	}
	if err := p.header(h); err != nil {
		return err
	}
	return p.copy(p.tar, f, h.Name, h.Size)
}

// copy takes exactly size bytes: what a file grew by meanwhile is not of this copy, and what is missing cannot be made up.
func (p *packer) copy(w io.Writer, r io.Reader, name string, size int64) error {
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, io.LimitReader(r, size), p.buf)
	if err == nil && n < size {
		err = fmt.Errorf("it became shorter while it was read: %w", io.ErrUnexpectedEOF)
	}
	if err != nil {
		return nameError("packing", name, err)
	}
	return nil
}

func (p *packer) attributes(path string, h *tar.Header) error {
	attrs, err := xattrs(path)
	if err != nil {
		return nameError("reading the attributes of", path, err)
	}
	for k, v := range attrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+k] = v
	}
	return nil
}

const xattrPrefix = "SCHILY.xattr."
