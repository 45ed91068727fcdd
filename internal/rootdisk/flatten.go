package rootdisk

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutMeta   = ".wh..wh." // aufs' own files, of no use to anyone else
	maxPath        = 4095       // PATH_MAX without its NUL: what no process could name
	maxName        = 255
	xattrRecord    = "SCHILY.xattr."
)

// Layer is one layer of an image. Open gives the blob's bytes as they are stored, compressed or not, and may be called twice.
type Layer struct {
	Digest    digest.Digest
	MediaType string // only for messages: what the blob starts with decides
	Size      int64  // of the blob: which layers get a disk of their own depends on it
	Open      func() (io.ReadCloser, error)
}

// flattener merges layers, top first, each read once: what an upper layer hides is never stored. Layers that lie above others keep
// what hides those: whiteouts and opaque directories in overlayfs' form.
type flattener struct {
	fs       *erofs
	root     *node
	wants    map[string]*want  // by path: targets of hard links that nothing stored yet
	links    map[string]string // hard links of the present layer that did not get into the tree
	progress func(int)         // bytes of blobs, second looks not counted

	below   func() (stack, error) // what lies below, once it is there; nil at the bottom
	leans   bool                  // something was taken from there
	hasRoot bool                  // a layer has an entry for the root directory
	left    budget
	hidden  *inode // the whiteout, which all names of hidden files share
}

// want is the promise to a hard link whose target is hidden from the tree or in a lower layer.
type want struct {
	ino   *inode
	from  string
	layer digest.Digest
}

func newFlattener(fs *erofs, below func() (stack, error), progress func(int)) *flattener {
	return &flattener{fs: fs, root: newDir(nil, 0), wants: map[string]*want{}, below: below, progress: progress, left: budget{maxMemory, maxData}}
}

// flatten reads all layers, given bottom first, and leaves the tree in f.root.
func (f *flattener) flatten(ctx context.Context, layers []Layer) error {
	for depth := range layers {
		l := layers[len(layers)-1-depth]
		if err := f.apply(ctx, l, depth); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, zstd.ErrCRCMismatch) {
				err = hint.With(err, "the stored layer is damaged: remove the image and pull or build it again")
			}
			return fmt.Errorf("layer %s (%s): %w", l.Digest, l.MediaType, err)
		}
	}
	for _, target := range slices.Sorted(maps.Keys(f.wants)) { // in order: the same layers give the same bytes
		w := f.wants[target]
		if err := f.fetch(target, w); err != nil {
			return fmt.Errorf("layer %s: hard link %q: %w", w.layer, w.from, err)
		}
	}
	return f.complete(f.root, "", false)
}

// fetch copies the target of a hard link from below: links do not lead from one disk to another.
func (f *flattener) fetch(target string, w *want) error {
	var found stored
	if f.below != nil {
		below, err := f.below()
		if err != nil {
			return err
		}
		if found, _, err = below.lookup(target); err != nil {
			return err
		}
	}
	switch found.mode & unix.S_IFMT {
	case 0:
		return fmt.Errorf("no layer has its target %q: %w", target, errdefs.ErrInvalidArgument)
	case unix.S_IFDIR:
		return fmt.Errorf("it is to a directory: %w", errdefs.ErrInvalidArgument)
	}
	f.leans = true
	copyMetadata(w.ino, found)
	w.ino.rdev = found.rdev
	switch found.mode & unix.S_IFMT {
	case unix.S_IFREG:
		return f.fs.addFile(w.ino, found.size, found.data)
	case unix.S_IFLNK:
		to, err := io.ReadAll(io.LimitReader(found.data, maxPath+1))
		if err != nil {
			return err
		}
		w.ino.target = string(to)
	}
	return f.fs.addSpecial(w.ino)
}

func copyMetadata(to *inode, from stored) {
	to.mode, to.uid, to.gid, to.mtime, to.mtimeNsec = from.mode, from.uid, from.gid, from.mtime, from.mtimeNsec
	to.xattrs = withoutOverlay(from.xattrs)
}

// complete makes the tree beneath a directory what goes on the disk: directories that no layer described get the metadata that they
// have below, or 0755 and root; whiteouts stay where they hide something below. cut: nothing below is seen here.
func (f *flattener) complete(n *node, name string, cut bool) (err error) {
	cut = cut || n.cut != noCut || f.below == nil
	if n.ino == nil {
		n.ino = &inode{mode: unix.S_IFDIR | 0o755}
		if !cut && n != f.root { // the root's is looked for when disks are joined
			if err := f.inherit(n.ino, name); err != nil {
				return err
			}
		}
	}
	whiteouts := false
	for base, kid := range n.kids {
		switch {
		case kid.gone && cut:
			delete(n.kids, base)
		case kid.gone:
			if f.hidden == nil {
				f.hidden = &inode{mode: unix.S_IFCHR}
				if err := f.fs.addSpecial(f.hidden); err != nil {
					return err
				}
			}
			kid.ino, whiteouts = f.hidden, true
		case kid.kids != nil:
			if err := f.complete(kid, path.Join(name, base), cut); err != nil {
				return err
			}
		}
	}
	if n.cut != noCut && f.below != nil && n != f.root {
		if n.ino.xattrs, err = addXattr(n.ino.xattrs, overlayOpaque, "y"); err != nil {
			return err
		}
	}
	if whiteouts {
		n.ino.xattrs, err = addXattr(n.ino.xattrs, overlayOrigin, "")
	}
	return err
}

// inherit gives a directory the metadata that it has below.
func (f *flattener) inherit(ino *inode, name string) error {
	below, err := f.below()
	if err != nil {
		return err
	}
	f.leans = true
	found, _, err := below.lookup(name)
	if err != nil {
		return err
	}
	if found.isDir() {
		copyMetadata(ino, found)
	}
	return nil
}

func (f *flattener) apply(ctx context.Context, l Layer, depth int) error {
	f.links = map[string]string{}
	older := make(map[string]bool, len(f.wants))
	for target := range f.wants {
		older[target] = true
	}
	if err := each(ctx, l, f.progress, func(h *tar.Header, name string, r io.Reader) error {
		return f.entry(h, name, r, depth, l.Digest)
	}); err != nil {
		return err
	}
	if err := f.resolveLinks(depth); err != nil {
		return err
	}
	// A link of this layer whose target came earlier in it and was hidden: only now is it known that its data is needed.
	missing := 0
	for target := range f.wants {
		if !older[target] {
			missing++
		}
	}
	if missing == 0 {
		return nil
	}
	return each(ctx, l, func(int) {}, func(h *tar.Header, name string, r io.Reader) error {
		w := f.wants[name]
		if w == nil || h.Typeflag == tar.TypeLink {
			return nil
		}
		if h.Typeflag == tar.TypeDir {
			return fmt.Errorf("hard link %q is to a directory: %w", w.from, errdefs.ErrInvalidArgument)
		}
		if err := f.store(w.ino, h, r); err != nil {
			return err
		}
		delete(f.wants, name)
		if missing--; missing == 0 {
			return errEnough
		}
		return nil
	})
}

// resolveLinks follows hard links to hidden hard links of the same layer.
func (f *flattener) resolveLinks(depth int) error {
	for start, w := range f.wants {
		target, seen := start, map[string]bool{}
		for next, ok := f.links[target]; ok; next, ok = f.links[target] {
			if seen[target] {
				return fmt.Errorf("hard link %q: %w", w.from, errLinkCycle)
			}
			seen[target] = true
			target = next
		}
		if target == start {
			continue
		}
		delete(f.wants, start)
		ino, err := f.linked(target, w.from, depth, w.layer)
		if err != nil {
			return fmt.Errorf("hard link %q: %w", w.from, err)
		}
		if ino == w.ino {
			return fmt.Errorf("hard link %q: %w", w.from, errLinkCycle)
		}
		w.ino.same = ino
	}
	return nil
}

// lookup finds a name in the tree as it is now, or nil.
func (f *flattener) lookup(name string) *node {
	n := f.root
	for part := range strings.SplitSeq(name, "/") {
		if n = n.kids[part]; n == nil {
			return nil
		}
	}
	return n
}

var errLinkCycle = fmt.Errorf("its targets lead back to itself: %w", errdefs.ErrInvalidArgument)

var errEnough = errors.New("enough read")

// each calls fn for every entry of a layer, with its cleaned name, "." for the root. fn may end it by errEnough.
func each(ctx context.Context, l Layer, count func(int), fn func(h *tar.Header, name string, r io.Reader) error) error {
	blob, err := l.Open()
	if err != nil {
		return fmt.Errorf("opening it: %w", err)
	}
	defer blob.Close()
	stream, err := decompress(&counter{blob, count})
	if err != nil {
		return err
	}
	ahead := newReadAhead(ctx, stream)
	defer ahead.Close()
	tr := tar.NewReader(ahead)
	for entries := 0; ; entries++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if entries == 0 && errors.Is(err, tar.ErrHeader) {
				return fmt.Errorf("neither gzip, zstd nor tar: %w", errdefs.ErrInvalidArgument)
			}
			return fmt.Errorf("reading the archive after %d entries: %w", entries, noEOF(err))
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := cleanName(h.Name)
		if err == nil {
			err = fn(h, name, &untilDone{ctx, tr})
		}
		if errors.Is(err, errEnough) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
	// The compressed stream's checksum stands at its end, behind the archive's padding.
	if _, err := io.Copy(io.Discard, ahead); err != nil {
		return fmt.Errorf("reading the end of it: %w", err)
	}
	return nil
}

// cleanName gives the name relative to the image's root.
func cleanName(name string) (string, error) {
	if name == "" || strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("empty name or NUL in it: %w", errdefs.ErrInvalidArgument)
	}
	if len(name) > maxPath {
		return "", fmt.Errorf("name of %d bytes, %d are the most: %w", len(name), maxPath, errdefs.ErrInvalidArgument)
	}
	clean := strings.TrimPrefix(path.Clean(name), "/")
	if clean == "" {
		clean = "."
	}
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fmt.Errorf("name leads out of the image: %w", errdefs.ErrInvalidArgument)
	}
	for part := range strings.SplitSeq(clean, "/") {
		if len(part) > maxName {
			return "", fmt.Errorf("name with a part of %d bytes, %d are the most: %w", len(part), maxName, errdefs.ErrInvalidArgument)
		}
	}
	return clean, nil
}

// entry puts one tar entry into the tree unless an upper layer hides it.
func (f *flattener) entry(h *tar.Header, name string, r io.Reader, depth int, layer digest.Digest) error {
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("the root is not a directory: %w", errdefs.ErrInvalidArgument)
		}
		return f.rootEntry(h, depth)
	}
	base := path.Base(name)
	parent, err := f.root.dir(strings.Split(path.Dir(name), "/"), depth, &f.left)
	if errdefs.IsResourceExhausted(err) {
		return err
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	// Whatever it is, it may leave its name behind; what it replaces is not given back.
	if err := f.left.spend(nodeCost + int64(len(name)+len(h.Linkname))); err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return whiteout(parent, base, depth)
	}
	if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 { // overlayfs' own whiteout, which is seen by nobody
		if parent != nil {
			parent.whiteout(base, depth)
		}
		return nil
	}
	if h.Typeflag == tar.TypeLink {
		return f.hardLink(parent, h, name, depth, layer)
	}
	show := parent != nil && parent.visible(base, depth, h.Typeflag == tar.TypeDir)
	w := f.wants[name]
	if !show && w == nil {
		return nil
	}
	ino := &inode{}
	if w != nil {
		if ino = w.ino; h.Typeflag == tar.TypeDir {
			return fmt.Errorf("hard link %q is to a directory: %w", w.from, errdefs.ErrInvalidArgument)
		}
	}
	if err := f.store(ino, h, r); err != nil {
		return err
	}
	delete(f.wants, name)
	if show {
		parent.put(base, depth, ino)
	}
	return nil
}

func (f *flattener) rootEntry(h *tar.Header, depth int) error {
	if f.root.cut < depth || f.root.ino != nil && f.root.meta != depth {
		return nil
	}
	ino := &inode{}
	if err := f.store(ino, h, nil); err != nil {
		return err
	}
	f.root.ino, f.root.meta, f.hasRoot = ino, depth, true
	return nil
}

// whiteout handles the names that stand for what is not there. parent is nil where an upper layer hides it.
func whiteout(parent *node, base string, depth int) error {
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	switch {
	case hidden == "" || hidden == "." || hidden == "..":
		return fmt.Errorf("whiteout of nothing: %w", errdefs.ErrInvalidArgument)
	case parent == nil:
	case base == whiteoutOpaque:
		parent.hide(depth)
	case strings.HasPrefix(base, whiteoutMeta):
	default:
		parent.whiteout(hidden, depth)
	}
	return nil
}

func (f *flattener) hardLink(parent *node, h *tar.Header, name string, depth int, layer digest.Digest) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return fmt.Errorf("its target %.200q: %w", h.Linkname, err)
	}
	if target == name || target == "." {
		return fmt.Errorf("hard link to itself or to a directory: %w", errdefs.ErrInvalidArgument)
	}
	base := path.Base(name)
	if parent == nil || !parent.visible(base, depth, false) {
		f.links[name] = target
		return nil
	}
	ino, err := f.linked(target, name, depth, layer)
	if err != nil {
		return err
	}
	// Others may wait for this very name: they get what it gets.
	if w := f.wants[name]; w != nil {
		if w.ino == ino {
			return errLinkCycle
		}
		w.ino.same = ino
		delete(f.wants, name)
	}
	parent.put(base, depth, ino)
	return nil
}

// linked is the inode of a hard link's target: one of the same layer, or a promise.
func (f *flattener) linked(target, from string, depth int, layer digest.Digest) (*inode, error) {
	if n := f.lookup(target); n != nil && n.layer == depth && !n.gone {
		if n.kids != nil {
			return nil, fmt.Errorf("hard link to directory %q: %w", target, errdefs.ErrInvalidArgument)
		}
		return n.ino.real(), nil
	}
	w := f.wants[target]
	if w == nil {
		w = &want{ino: &inode{}, from: from, layer: layer}
		f.wants[target] = w
	}
	return w.ino, nil
}

// store fills ino from the header and writes it, with the file's data, unless it is a directory: those come last.
func (f *flattener) store(ino *inode, h *tar.Header, r io.Reader) error {
	kind, ok := tarTypes[h.Typeflag]
	if !ok {
		return fmt.Errorf("entry of unknown type %q: %w", h.Typeflag, errdefs.ErrInvalidArgument)
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= math.MaxUint32 || int64(h.Gid) >= math.MaxUint32 {
		return fmt.Errorf("owner %d:%d out of range: %w", h.Uid, h.Gid, errdefs.ErrInvalidArgument)
	}
	attrs := map[string]string{}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, xattrRecord); ok {
			attrs[name] = value
		}
	}
	xattrs, err := encodeXattrs(attrs, false)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	ino.mode = kind | uint16(h.Mode&0o7777)
	ino.uid, ino.gid = uint32(h.Uid), uint32(h.Gid)
	ino.mtime, ino.mtimeNsec = h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())
	ino.xattrs = xattrs
	switch kind {
	case unix.S_IFDIR:
		return f.left.spend(int64(len(xattrs))) // kept until the end
	case unix.S_IFREG:
		if err := f.left.write(h.Size); err != nil {
			return err
		}
		return f.fs.addFile(ino, h.Size, r)
	case unix.S_IFLNK:
		if h.Linkname == "" || len(h.Linkname) > maxPath {
			return fmt.Errorf("symbolic link to %d bytes: %w", len(h.Linkname), errdefs.ErrInvalidArgument)
		}
		ino.target = h.Linkname
	case unix.S_IFCHR, unix.S_IFBLK:
		if uint64(h.Devmajor) > 0xfff || uint64(h.Devminor) > 0xfffff {
			return fmt.Errorf("device %d:%d out of range: %w", h.Devmajor, h.Devminor, errdefs.ErrInvalidArgument)
		}
		minor := uint32(h.Devminor)
		ino.rdev = minor&0xff | uint32(h.Devmajor)<<8 | minor&^0xff<<12
	}
	return f.fs.addSpecial(ino)
}

var tarTypes = map[byte]uint16{
	tar.TypeReg: unix.S_IFREG, tar.TypeCont: unix.S_IFREG, tar.TypeGNUSparse: unix.S_IFREG,
	tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeFifo: unix.S_IFIFO,
	tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK,
}

// decompress looks at the first bytes; what is neither gzip nor zstd is taken for tar.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 256<<10)
	magic, err := b.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("decompressing gzip: %w", noEOF(err))
		}
		return z, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(2), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, fmt.Errorf("decompressing zstd: %w", noEOF(err))
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// counter tells how much was read.
type counter struct {
	r     io.Reader
	count func(int)
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.count(n)
	return n, err
}

// untilDone ends with its context: the holes of a sparse file are read from nowhere, and may be long.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u *untilDone) Read(b []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.r.Read(b)
}

// readAhead lets decompression run beside the reader of its output.
type readAhead struct {
	chunks chan chunk
	free   chan []byte
	stop   context.CancelFunc
	chunk
	full []byte // the buffer of the present chunk
}

type chunk struct {
	data []byte
	err  error // behind data
}

func newReadAhead(ctx context.Context, r io.ReadCloser) *readAhead {
	const buffers, size = 4, 256 << 10
	ctx, stop := context.WithCancel(ctx)
	a := &readAhead{chunks: make(chan chunk, buffers), free: make(chan []byte, buffers), stop: stop}
	for range buffers {
		a.free <- make([]byte, size)
	}
	go func() {
		defer close(a.chunks)
		defer r.Close()
		for {
			select {
			case <-ctx.Done():
				a.chunks <- chunk{err: context.Cause(ctx)}
				return
			case buf := <-a.free:
				var n int
				var err error
				for n < len(buf) && err == nil { // not io.ReadFull: it would hide how the stream ended
					var k int
					k, err = r.Read(buf[n:])
					n += k
				}
				a.chunks <- chunk{buf[:n], err}
				if err != nil {
					return
				}
			}
		}
	}()
	return a
}

func (a *readAhead) Read(b []byte) (int, error) {
	for len(a.data) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		if a.full != nil {
			a.free <- a.full
		}
		c, ok := <-a.chunks
		if !ok {
			return 0, io.EOF
		}
		a.chunk, a.full = c, c.data[:cap(c.data)]
		if cap(c.data) == 0 {
			a.full = nil
		}
	}
	n := copy(b, a.data)
	a.data = a.data[n:]
	return n, nil
}

// Close ends the goroutine and waits for it.
func (a *readAhead) Close() error {
	a.stop()
	for range a.chunks {
	}
	return nil
}
