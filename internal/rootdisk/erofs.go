package rootdisk

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The on-disk format is Linux' fs/erofs/erofs_fs.h as kernel 5.15 has it: uncompressed, extended inodes, no shared xattrs.
const (
	blockSize       = 4096
	erofsMagic      = 0xE0F5E1E2
	superOffset     = 1024
	superSize       = 128
	inodeSize       = 64
	inodeAlign      = 32 // a node id counts these
	nlinkOffset     = 44 // of i_nlink in the extended inode
	direntSize      = 12
	layoutPlain     = 0
	layoutInline    = 2
	xattrHeaderSize = 12
	maxBlocks       = math.MaxUint32
	openMetaBlocks  = 16
	writeBufferSize = 1 << 20
	holeSize        = 64 << 10 // runs of zeros from this size on stay holes in the file
)

// inode is a file's metadata and where it lies on the disk. Hard links share one.
type inode struct {
	mode      uint16
	uid, gid  uint32
	mtime     int64
	mtimeNsec uint32
	rdev      uint32
	xattrs    []byte // as on the disk
	target    string // of a symlink
	nlink     uint32 // counted when the directories are written
	at        place
	same      *inode // a hard link's promise, once its target is known
}

// real follows the promises of hard links.
func (i *inode) real() *inode {
	for i.same != nil {
		i = i.same
	}
	return i
}

func (i *inode) isDir() bool { return i.mode&unix.S_IFMT == unix.S_IFDIR }

// place is a position within the metadata; its address is known when its block has been given one.
type place struct {
	block *metaBlock
	off   int
}

func (p place) offset() int64 { return int64(p.block.addr)*blockSize + int64(p.off) }
func (p place) nid() uint64   { return uint64(p.offset() / inodeAlign) }

// metaBlock collects inodes with their xattrs and the tails of their data. One that holds big xattrs has several blocks.
type metaBlock struct {
	buf  []byte // all of it, zeros behind used; nil once written
	used int
	addr uint32
}

func (m *metaBlock) free() int { return len(m.buf) - m.used }

// erofs writes a file system in one pass: whole blocks of data go out as they come, inodes and tails are packed into blocks of
// their own among them, and directories, which need everyone's node id, come last. Memory use does not grow with the data.
type erofs struct {
	out  *blockWriter
	root *metaBlock   // block 0: superblock and root inode, whose id must fit in 16 bits
	open []*metaBlock // not written yet; a few, so that tails of all sizes find a gap
	ids  uint32
}

func newErofs(f *os.File) *erofs {
	e := &erofs{
		out:  newBlockWriter(f),
		root: &metaBlock{buf: make([]byte, blockSize), used: superOffset + superSize},
	}
	e.out.append(e.root.buf) // keeps the place; written last
	return e
}

// addFile stores a regular file of the given size.
func (e *erofs) addFile(i *inode, size int64, r io.Reader) error {
	start := e.out.blocks()
	full, tail := size/blockSize, int(size%blockSize)
	if err := e.out.copy(r, full*blockSize); err != nil {
		return err
	}
	inline := tail
	if inodeSize+len(i.xattrs)+tail > blockSize { // no room beside the xattrs: the tail gets a block too
		block := make([]byte, blockSize)
		if _, err := io.ReadFull(r, block[:tail]); err != nil {
			return noEOF(err)
		}
		e.out.append(block)
		inline = 0
	}
	data, err := e.add(i, size, uint32(start), inline)
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(r, data); err != nil {
		return noEOF(err)
	}
	return e.out.err()
}

// addSpecial stores everything that is neither a regular file nor a directory.
func (e *erofs) addSpecial(i *inode) error {
	if inodeSize+len(i.xattrs)+len(i.target) > blockSize {
		return e.addFile(i, int64(len(i.target)), strings.NewReader(i.target))
	}
	data, err := e.add(i, int64(len(i.target)), 0, len(i.target))
	if err != nil {
		return err
	}
	copy(data, i.target)
	return nil
}

// add places an inode whose whole blocks begin at start, and returns where its inline bytes go.
func (e *erofs) add(i *inode, size int64, start uint32, inline int) ([]byte, error) {
	if e.out.blocks() >= maxBlocks {
		return nil, errors.New("the root disk would be larger than 16 TiB")
	}
	i.at = e.place(inodeSize + len(i.xattrs) + inline)
	return e.encode(i, size, start, inline), nil
}

// place finds room for n bytes of metadata: the fullest open block that still has it, else a new one.
func (e *erofs) place(n int) place {
	var best *metaBlock
	for _, m := range e.open {
		if m.free() >= n && (best == nil || m.free() < best.free()) {
			best = m
		}
	}
	if best == nil {
		best = &metaBlock{buf: make([]byte, (n+blockSize-1)/blockSize*blockSize)}
		if len(e.open) == openMetaBlocks {
			fullest := slices.MinFunc(e.open, func(a, b *metaBlock) int { return cmp.Compare(a.free(), b.free()) })
			e.flush(fullest)
			e.open = slices.DeleteFunc(e.open, func(m *metaBlock) bool { return m == fullest })
		}
		e.open = append(e.open, best)
	}
	return best.take(n)
}

func (m *metaBlock) take(n int) place {
	p := place{m, m.used}
	m.used = min(len(m.buf), (m.used+n+inodeAlign-1)/inodeAlign*inodeAlign)
	return p
}

func (e *erofs) flush(m *metaBlock) {
	m.addr = uint32(e.out.blocks())
	e.out.append(m.buf)
	m.buf = nil
}

// encode writes the inode and its xattrs at its place and returns the room for its inline bytes behind them.
func (e *erofs) encode(i *inode, size int64, start uint32, inline int) []byte {
	b := i.at.block.buf[i.at.off:]
	le := binary.LittleEndian
	format := uint16(1 | layoutPlain<<1)
	if inline > 0 {
		format = 1 | layoutInline<<1
	}
	le.PutUint16(b[0:], format)
	if n := len(i.xattrs); n > 0 {
		le.PutUint16(b[2:], uint16((n-xattrHeaderSize)/4+1))
	}
	le.PutUint16(b[4:], i.mode)
	le.PutUint64(b[8:], uint64(size))
	le.PutUint32(b[16:], start)
	if t := i.mode & unix.S_IFMT; t == unix.S_IFCHR || t == unix.S_IFBLK {
		le.PutUint32(b[16:], i.rdev)
	}
	e.ids++
	le.PutUint32(b[20:], e.ids) // what stat shows on 32-bit systems
	le.PutUint32(b[24:], i.uid)
	le.PutUint32(b[28:], i.gid)
	le.PutUint64(b[32:], uint64(i.mtime))
	le.PutUint32(b[40:], i.mtimeNsec)
	le.PutUint32(b[nlinkOffset:], max(i.nlink, 1))
	n := inodeSize + copy(b[inodeSize:], i.xattrs)
	if !i.isDir() {
		i.xattrs = nil // a directory's are looked at once more
	}
	return b[n : n+inline]
}

// dirLayout is a directory's contents before the node ids in it are known.
type dirLayout struct {
	node   *node
	names  []string // sorted by bytes, with . and ..
	blocks []int    // index of the first name behind each block
	size   int64
	tail   int    // bytes that lie beside the inode; 0 when the last block is a whole one
	inline []byte // their place
}

func layoutDir(n *node) dirLayout {
	d := dirLayout{node: n, names: append(make([]string, 0, len(n.kids)+2), ".", "..")}
	for name := range n.kids {
		d.names = append(d.names, name)
	}
	slices.Sort(d.names)
	used := 0
	for i, name := range d.names {
		if used+direntSize+len(name) > blockSize {
			d.blocks = append(d.blocks, i)
			used = 0
		}
		used += direntSize + len(name)
	}
	d.size = int64(len(d.blocks)*blockSize + used)
	d.blocks = append(d.blocks, len(d.names))
	return d
}

// finish writes the directories under root, every link count and the superblock. It returns the disk's size and how many
// names it has. Nothing may be added after it.
func (e *erofs) finish(root *node, uuid [16]byte) (size int64, entries int, err error) {
	for _, m := range e.open {
		e.flush(m)
	}
	e.open = nil
	dirs, linked, err := e.placeDirs(root)
	if err != nil {
		return 0, 0, err
	}
	// All blocks from here on are kept until the end of this function, so their addresses can be given at once.
	metas := e.open
	next := e.out.blocks()
	for _, m := range metas {
		m.addr = uint32(next)
		next += int64(len(m.buf) / blockSize)
	}
	for k := range dirs {
		d := &dirs[k]
		d.inline = e.encode(d.node.ino, d.size, uint32(next), d.tail)
		next += (d.size - int64(d.tail) + blockSize - 1) / blockSize
		entries += len(d.names) - 2
	}
	if next >= maxBlocks {
		return 0, 0, errors.New("the root disk would be larger than 16 TiB")
	}
	var data [][]byte
	for k := range dirs {
		data = append(data, dirs[k].fill()...)
	}
	for _, m := range metas {
		e.out.append(m.buf)
	}
	for _, block := range data {
		e.out.append(block)
	}
	blocks := e.out.blocks()
	if err := e.out.finish(); err != nil {
		return 0, 0, err
	}
	var nlink [4]byte
	for _, ino := range linked {
		binary.LittleEndian.PutUint32(nlink[:], ino.nlink)
		if _, err := e.out.f.WriteAt(nlink[:], ino.at.offset()+nlinkOffset); err != nil {
			return 0, 0, err
		}
	}
	e.encodeSuper(root.ino.at.nid(), uint32(blocks), uuid)
	if _, err := e.out.f.WriteAt(e.root.buf, 0); err != nil {
		return 0, 0, err
	}
	return blocks * blockSize, entries, nil
}

// placeDirs finds a place for every directory's inode, counts links, and returns the inodes whose count on the disk is wrong.
func (e *erofs) placeDirs(root *node) (dirs []dirLayout, linked []*inode, err error) {
	for queue := []*node{root}; len(queue) > 0; queue = queue[1:] {
		n := queue[0]
		d := layoutDir(n)
		n.ino.nlink = 2
		for _, name := range d.names { // in their order: the same tree gives the same bytes
			kid := n.kids[name]
			if kid == nil { // . and ..
				continue
			}
			if kid.ino.isDir() {
				n.ino.nlink++
				queue = append(queue, kid)
				continue
			}
			ino := kid.ino.real()
			if ino.nlink++; ino.nlink == 2 {
				linked = append(linked, ino)
			}
		}
		need, room := inodeSize+len(n.ino.xattrs), blockSize
		if n == root {
			if room = e.root.free(); need > room {
				return nil, nil, errors.New("the extended attributes of the root directory are too long")
			}
		}
		if tail := int(d.size % blockSize); need+tail <= room {
			d.tail = tail
		}
		n.ino.at = e.placeDir(n == root, need+d.tail)
		dirs = append(dirs, d)
	}
	return dirs, linked, nil
}

// placeDir is place without a limit of open blocks: directories are kept until all their ids are known.
func (e *erofs) placeDir(root bool, need int) place {
	if root {
		return e.root.take(need)
	}
	if k := len(e.open); k > 0 && e.open[k-1].free() >= need {
		return e.open[k-1].take(need)
	}
	m := &metaBlock{buf: make([]byte, (need+blockSize-1)/blockSize*blockSize)}
	e.open = append(e.open, m)
	return m.take(need)
}

// fill writes the directory's entries: the last block inline where it has a place there, the others are returned.
func (d *dirLayout) fill() (blocks [][]byte) {
	first := 0
	for k, end := range d.blocks {
		block := d.inline
		if k < len(d.blocks)-1 || d.tail == 0 {
			block = make([]byte, blockSize)
			blocks = append(blocks, block)
		}
		name := (end - first) * direntSize
		for i, s := range d.names[first:end] {
			nid, kind := d.entry(s)
			b := block[i*direntSize:]
			binary.LittleEndian.PutUint64(b, nid)
			binary.LittleEndian.PutUint16(b[8:], uint16(name))
			b[10] = kind
			name += copy(block[name:], s)
		}
		first = end
	}
	return blocks
}

func (d *dirLayout) entry(name string) (nid uint64, kind byte) {
	n := d.node
	switch name {
	case ".":
	case "..":
		if n.parent != nil {
			n = n.parent
		}
	default:
		n = n.kids[name]
	}
	ino := n.ino.real()
	return ino.at.nid(), fileTypes[ino.mode&unix.S_IFMT]
}

var fileTypes = map[uint16]byte{
	unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFCHR: 3, unix.S_IFBLK: 4, unix.S_IFIFO: 5, unix.S_IFSOCK: 6, unix.S_IFLNK: 7,
}

func (e *erofs) encodeSuper(rootNID uint64, blocks uint32, uuid [16]byte) {
	const compatChecksum, compatMtime = 1, 2
	b := e.root.buf[superOffset:]
	le := binary.LittleEndian
	le.PutUint32(b[0:], erofsMagic)
	le.PutUint32(b[8:], compatChecksum|compatMtime)
	b[12] = 12 // log2 of the block size
	le.PutUint16(b[14:], uint16(rootNID))
	le.PutUint64(b[16:], uint64(e.ids))
	le.PutUint32(b[36:], blocks)
	copy(b[48:], uuid[:])
	// The checksum covers the rest of block 0 and has no final inversion.
	le.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// xattrPrefixes are the namespaces the format knows; the whole name of an ACL is its prefix.
var xattrPrefixes = []struct {
	prefix string
	index  byte
	whole  bool
}{
	{"user.", 1, false},
	{"system.posix_acl_access", 2, true},
	{"system.posix_acl_default", 3, true},
	{"trusted.", 4, false},
	{"security.", 6, false},
}

// The overlay's own attributes (fs/overlayfs/overlayfs.h). An image's are not taken over: they would say something about disks that
// the image knows nothing of.
const (
	overlayPrefix = "trusted.overlay."
	overlayOpaque = "trusted.overlay.opaque" // "y": nothing beneath this directory is seen
	// overlayOrigin, even empty, has overlayfs filter the names of a directory that is in one layer only: else the whiteouts that
	// it has in vain would be listed (ovl_get_inode: "non-merge dir that may have whiteouts").
	overlayOrigin = "trusted.overlay.origin"
)

const overlayIndex = 4 // of trusted.

// addXattr adds an attribute to encoded ones.
func addXattr(b []byte, name, value string) ([]byte, error) {
	more, err := encodeXattrs(map[string]string{name: value}, true)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return more, nil
	}
	b = append(slices.Clone(b), more[xattrHeaderSize:]...)
	return b, checkXattrs(b)
}

// withoutOverlay returns encoded attributes without the overlay's own.
func withoutOverlay(b []byte) []byte {
	var kept []byte
	eachXattr(b, func(index byte, name, _ string, raw []byte) {
		if index == overlayIndex && strings.HasPrefix("trusted."+name, overlayPrefix) {
			return
		}
		if kept == nil {
			kept = make([]byte, xattrHeaderSize)
		}
		kept = append(kept, raw...)
	})
	return kept
}

func isOpaque(b []byte) (opaque bool) {
	eachXattr(b, func(index byte, name, value string, _ []byte) {
		opaque = opaque || index == overlayIndex && "trusted."+name == overlayOpaque && value == "y"
	})
	return opaque
}

// eachXattr goes through encoded attributes and ends where they make no sense. raw is one as it lies there, with its padding.
func eachXattr(b []byte, fn func(index byte, name, value string, raw []byte)) {
	if len(b) < xattrHeaderSize {
		return
	}
	for b = b[xattrHeaderSize:]; len(b) >= 4; {
		nameEnd := 4 + int(b[0])
		end := nameEnd + int(binary.LittleEndian.Uint16(b[2:]))
		whole := (end + 3) &^ 3
		if whole > len(b) {
			return
		}
		fn(b[1], string(b[4:nameEnd]), string(b[nameEnd:end]), b[:whole])
		b = b[whole:]
	}
}

// encodeXattrs makes what follows an inode. Namespaces that no Linux file system stores are left out, as tar does, and so are the
// overlay's own unless they are wanted.
func encodeXattrs(attrs map[string]string, overlay bool) ([]byte, error) {
	var b []byte
	names := make([]string, 0, len(attrs))
	for name := range attrs {
		if overlay || !strings.HasPrefix(name, overlayPrefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		value := attrs[name]
		for _, p := range xattrPrefixes {
			rest, ok := strings.CutPrefix(name, p.prefix)
			if !ok || p.whole != (rest == "") {
				continue
			}
			if len(rest) > 255 || len(value) > math.MaxUint16 {
				return nil, fmt.Errorf("extended attribute %.40q is too long", name)
			}
			if b == nil {
				b = make([]byte, xattrHeaderSize)
			}
			b = append(b, byte(len(rest)), p.index)
			b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
			b = append(append(b, rest...), value...)
			for len(b)%4 != 0 {
				b = append(b, 0)
			}
		}
	}
	return b, checkXattrs(b)
}

func checkXattrs(b []byte) error {
	if len(b) > xattrHeaderSize+4*(math.MaxUint16-1) {
		return errors.New("the extended attributes are too long together")
	}
	return nil
}

// blockWriter appends blocks to a file; another goroutine does the writing.
type blockWriter struct {
	f      *os.File
	buf    []byte
	sent   int64 // bytes handed to the goroutine
	full   chan []byte
	empty  chan []byte
	failed chan error // what the goroutine ended with, on an error
	done   chan struct{}
	first  error
}

func newBlockWriter(f *os.File) *blockWriter {
	w := &blockWriter{
		f:      f,
		buf:    make([]byte, 0, writeBufferSize),
		full:   make(chan []byte, 2),
		empty:  make(chan []byte, 2),
		failed: make(chan error, 1),
		done:   make(chan struct{}),
	}
	w.empty <- make([]byte, 0, writeBufferSize)
	w.empty <- make([]byte, 0, writeBufferSize)
	go w.run()
	return w
}

func (w *blockWriter) run() {
	defer close(w.done)
	var off int64
	var failed bool
	for buf := range w.full {
		if !failed {
			if err := writeSparse(w.f, buf, off); err != nil {
				w.failed <- err
				failed = true
			}
			// Starts the disk early, so that the fsync at the end finds little left to do. Only a hint: no error matters.
			unix.SyncFileRange(int(w.f.Fd()), off, int64(len(buf)), unix.SYNC_FILE_RANGE_WRITE)
		}
		off += int64(len(buf))
		w.empty <- buf[:0]
	}
}

// blocks is how many have been appended: the address of the next.
func (w *blockWriter) blocks() int64 { return (w.sent + int64(len(w.buf))) / blockSize }

func (w *blockWriter) send() {
	w.sent += int64(len(w.buf))
	w.full <- w.buf
	w.buf = <-w.empty
}

// append adds whole blocks.
func (w *blockWriter) append(b []byte) {
	for len(b) > 0 {
		n := min(len(b), cap(w.buf)-len(w.buf))
		w.buf = append(w.buf, b[:n]...)
		b = b[n:]
		if len(w.buf) == cap(w.buf) {
			w.send()
		}
	}
}

// copy reads n bytes, a multiple of the block size, straight into the buffer.
func (w *blockWriter) copy(r io.Reader, n int64) error {
	for n > 0 {
		k := len(w.buf)
		m := int(min(n, int64(cap(w.buf)-k)))
		if _, err := io.ReadFull(r, w.buf[k:k+m]); err != nil {
			return noEOF(err)
		}
		w.buf = w.buf[:k+m]
		n -= int64(m)
		if len(w.buf) == cap(w.buf) {
			w.send()
			if err := w.err(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *blockWriter) err() error {
	select {
	case err := <-w.failed:
		w.first = err
	default:
	}
	return w.first
}

// finish writes what is left, gives the file its length, and ends the goroutine.
func (w *blockWriter) finish() error {
	size := w.blocks() * blockSize
	w.send()
	w.stop()
	if err := w.err(); err != nil {
		return err
	}
	return w.f.Truncate(size)
}

// stop ends the goroutine; it may be called again.
func (w *blockWriter) stop() {
	select {
	case <-w.done:
	default:
		close(w.full)
		<-w.done
	}
}

var zeros [holeSize]byte

// writeSparse writes b at off and leaves out long runs of zeros; the file reads as zeros there.
func writeSparse(f *os.File, b []byte, off int64) error {
	start := 0
	for i := 0; i < len(b); i += holeSize {
		piece := b[i:min(i+holeSize, len(b))]
		if !bytes.Equal(piece, zeros[:len(piece)]) {
			continue
		}
		if i > start {
			if _, err := f.WriteAt(b[start:i], off+int64(start)); err != nil {
				return err
			}
		}
		start = i + len(piece)
	}
	if start == len(b) {
		return nil
	}
	_, err := f.WriteAt(b[start:], off+int64(start))
	return err
}

// noEOF: the end of the stream within a file is never an orderly one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
