package rootdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// reader reads a file system that erofs wrote: what a run needs to know of those below it. A damaged file is an error, no crash.
type reader struct {
	r    io.ReaderAt
	size int64
	root uint64
}

var errDamaged = fmt.Errorf("the root disk is damaged: %w", errdefs.ErrDataLoss)

func newReader(r io.ReaderAt, size int64) (*reader, error) {
	var sb [superSize]byte
	if err := readFullAt(r, sb[:], superOffset); err != nil {
		return nil, fmt.Errorf("reading the superblock: %w", err)
	}
	le := binary.LittleEndian
	if le.Uint32(sb[0:]) != erofsMagic || sb[12] != 12 || int64(le.Uint32(sb[36:]))*blockSize > size {
		return nil, errDamaged
	}
	return &reader{r, size, uint64(le.Uint16(sb[14:]))}, nil
}

// stored is an inode as it lies on the disk.
type stored struct {
	inode
	nid  uint64
	size int64
	data io.Reader // of a file, link or directory; to be read once
}

func (r *reader) inode(nid uint64) (stored, error) {
	if nid > uint64(r.size)/inodeAlign {
		return stored{}, errDamaged
	}
	off := int64(nid) * inodeAlign
	var b [inodeSize]byte
	if err := readFullAt(r.r, b[:], off); err != nil {
		return stored{}, err
	}
	le := binary.LittleEndian
	s := stored{nid: nid, size: int64(le.Uint64(b[8:]))}
	s.mode, s.uid, s.gid = le.Uint16(b[4:]), le.Uint32(b[24:]), le.Uint32(b[28:])
	s.mtime, s.mtimeNsec, s.nlink = int64(le.Uint64(b[32:])), le.Uint32(b[40:]), le.Uint32(b[nlinkOffset:])
	layout := le.Uint16(b[0:])
	if layout != 1|layoutPlain<<1 && layout != 1|layoutInline<<1 || s.size < 0 || s.size > maxBlocks*blockSize {
		return stored{}, errDamaged
	}
	off += inodeSize
	if n := le.Uint16(b[2:]); n > 0 {
		s.xattrs = make([]byte, xattrHeaderSize+4*(int(n)-1))
		if err := readFullAt(r.r, s.xattrs, off); err != nil {
			return stored{}, err
		}
		off += int64(len(s.xattrs))
	}
	start := int64(le.Uint32(b[16:])) * blockSize
	switch s.mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		s.rdev = le.Uint32(b[16:])
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		whole, tail := s.size, int64(0)
		if layout == 1|layoutInline<<1 {
			whole, tail = s.size/blockSize*blockSize, s.size%blockSize
		}
		if whole > 0 && start+whole > r.size || off+tail > r.size {
			return stored{}, errDamaged
		}
		s.data = io.MultiReader(io.NewSectionReader(r.r, start, whole), io.NewSectionReader(r.r, off, tail))
	}
	return s, nil
}

// find looks for a name in a directory.
func (r *reader) find(dir stored, name string) (s stored, found bool, err error) {
	var nid uint64
	err = r.names(dir, func(n string, id uint64) error {
		if n == name {
			nid, found = id, true
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) || !found {
		return stored{}, false, err
	}
	s, err = r.inode(nid)
	return s, true, err
}

// names calls fn for all names of a directory, dots included, in their order.
func (r *reader) names(dir stored, fn func(name string, nid uint64) error) error {
	if !dir.isDir() || dir.size > math.MaxInt32 {
		return errDamaged
	}
	var buf [blockSize]byte
	for left := dir.size; left > 0; left -= blockSize {
		b := buf[:min(left, blockSize)]
		if _, err := io.ReadFull(dir.data, b); err != nil {
			return noEOF(err)
		}
		if len(b) < direntSize {
			return errDamaged
		}
		le := binary.LittleEndian
		count := int(le.Uint16(b[8:])) / direntSize
		if count == 0 || count*direntSize > len(b) {
			return errDamaged
		}
		for i := range count {
			e := b[i*direntSize:]
			from, to := int(le.Uint16(e[8:])), len(b)
			if i < count-1 {
				to = int(le.Uint16(e[direntSize+8:]))
			}
			if from < count*direntSize || to < from || to > len(b) {
				return errDamaged
			}
			name, _, _ := bytes.Cut(b[from:to], []byte{0}) // a block's end is padded
			if err := fn(string(name), le.Uint64(e)); err != nil {
				return err
			}
		}
	}
	return nil
}

// stack is disks joined as overlayfs does it, the topmost first.
type stack []*reader

// lookup finds what a name is in the joined tree. found is false where there is nothing.
func (s stack) lookup(name string) (result stored, found bool, err error) {
	type level struct {
		r   *reader
		dir stored
	}
	var dirs []level
	for _, r := range s {
		root, err := r.inode(r.root)
		if err != nil {
			return stored{}, false, err
		}
		dirs = append(dirs, level{r, root})
	}
	if len(dirs) == 0 {
		return stored{}, false, nil
	}
	result = dirs[0].dir
	for part := range strings.SplitSeq(name, "/") {
		var next []level
		found = false
		for _, d := range dirs {
			ino, ok, err := d.r.find(d.dir, part)
			if err != nil {
				return stored{}, false, err
			}
			if !ok {
				continue
			}
			if ino.isWhiteout() || found && !ino.isDir() {
				break
			}
			if !found {
				result, found = ino, true
			}
			if !ino.isDir() {
				break
			}
			next = append(next, level{d.r, ino})
			if isOpaque(ino.xattrs) {
				break
			}
		}
		if !found {
			return stored{}, false, nil
		}
		dirs = next
	}
	return result, true, nil
}

func (i *inode) isWhiteout() bool { return i.mode&unix.S_IFMT == unix.S_IFCHR && i.rdev == 0 }
