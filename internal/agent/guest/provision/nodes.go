package provision

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

// node is a name in a directory: what a path comes down to when all links before its last component are resolved.
type node struct {
	dev, ino uint64
	name     string
}

// place finds what a node's path stands for. Two different paths that come down to the same are an oversight, and one would undo the other.
func (r *Provisioner) place(n *agentv1.Node) (*place, error) {
	p, err := r.root.at(n.GetPath(), true)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(p.dir, &st); err != nil {
		p.close()
		return nil, err
	}
	key := node{st.Dev, st.Ino, p.name}
	if other, ok := r.done[key]; ok && other != path.Clean(n.GetPath()) {
		p.close()
		return nil, fmt.Errorf("%q leads to the same place", other)
	}
	r.done[key] = path.Clean(n.GetPath())
	return p, nil
}

// cleared is place, and what is there: nothing any more, where the node is to replace it.
func (r *Provisioner) cleared(n *agentv1.Node) (*place, *unix.Stat_t, error) {
	p, err := r.place(n)
	if err != nil {
		return nil, nil, err
	}
	st, err := p.stat()
	if err == nil && st != nil && n.GetOverwrite() {
		st, err = nil, p.remove()
	}
	if err != nil {
		p.close()
		return nil, nil, err
	}
	return p, st, nil
}

// owner says whose a node is to be; byDefault: whose it is without being asked.
func (r *Provisioner) owner(user, group *agentv1.Owner, byDefault *unix.Stat_t) (uid, gid uint32, err error) {
	if byDefault != nil {
		uid, gid = byDefault.Uid, byDefault.Gid
	}
	if uid, err = r.ownerID(user, passwdFile, uid); err != nil {
		return 0, 0, fmt.Errorf("its user: %w", err)
	}
	if gid, err = r.ownerID(group, groupFile, gid); err != nil {
		return 0, 0, fmt.Errorf("its group: %w", err)
	}
	return uid, gid, nil
}

func (r *Provisioner) ownerID(o *agentv1.Owner, file string, byDefault uint32) (uint32, error) {
	switch {
	case o.GetName() == "" && (o == nil || o.Id == nil):
		return byDefault, nil
	case o.Id != nil:
		return o.GetId(), nil
	}
	t, err := r.readTable(file)
	if err != nil {
		return 0, err
	}
	return t.id(o.GetName())
}

func depth(n *agentv1.Node) int { return strings.Count(path.Clean(n.GetPath()), "/") }

// directories makes directories, those above before those below.
func (r *Provisioner) directories() error {
	all := slices.Clone(r.GetDirectories())
	slices.SortStableFunc(all, func(a, b *agentv1.Directory) int { return depth(a.GetNode()) - depth(b.GetNode()) })
	for _, d := range all {
		if err := r.directory(d.GetNode()); err != nil {
			return element("directory", d.GetNode().GetPath(), err)
		}
	}
	return nil
}

func (r *Provisioner) directory(n *agentv1.Node) error {
	p, st, err := r.cleared(n)
	if err != nil {
		return err
	}
	defer p.close()
	if st != nil && !isDir(st) {
		return errors.New("there is something else, and overwrite is not set")
	}
	uid, gid, err := r.owner(n.GetUser(), n.GetGroup(), st)
	if err != nil {
		return err
	}
	if st == nil {
		mode := uint32(0o755)
		if n.Mode != nil {
			mode = n.GetMode()
		}
		return mkdirAt(p.dir, p.name, uid, gid, mode)
	}
	return p.adjust(n, st, uid, gid)
}

// adjust gives what is there its owner and mode.
func (p *place) adjust(n *agentv1.Node, st *unix.Stat_t, uid, gid uint32) error {
	mode := st.Mode
	if n.Mode != nil {
		mode = n.GetMode()
	}
	f, err := p.open(unix.O_RDONLY | unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer f.Close()
	return own(int(f.Fd()), uid, gid, mode)
}

// files writes files in the order of the message, which is that of the streamed pieces.
func (r *Provisioner) files() error {
	for _, f := range r.GetFiles() {
		do := r.file
		if f.GetDefer() {
			do = r.deferFile
		}
		if err := do(f); err != nil {
			return element("file", f.GetNode().GetPath(), err)
		}
	}
	return nil
}

func (r *Provisioner) file(f *agentv1.File) error {
	return r.writeFile(f, r.contents.copy)
}

// writeFile writes a file whose streamed pieces come from a source.
func (r *Provisioner) writeFile(f *agentv1.File, source func(io.Writer, uint64) error) error {
	n := f.GetNode()
	p, err := r.place(n)
	if err != nil {
		return err
	}
	defer p.close()
	st, err := p.stat()
	if err != nil {
		return err
	}
	contents := f.GetHasContents() || len(f.GetContents()) > 0
	if st != nil && n.GetOverwrite() {
		// A file keeps its name until it is replaced; of anything else nothing may be left.
		if !isRegular(st) {
			if err := p.remove(); err != nil {
				return err
			}
		}
		st, contents = nil, true
	}
	switch {
	case st == nil:
		contents = true // an empty file, where nothing else is asked for
	case !isRegular(st):
		return errors.New("there is something that is no regular file, and overwrite is not set")
	case contents:
		return errors.New("there is a file already, and overwrite is not set")
	}
	uid, gid, err := r.owner(n.GetUser(), n.GetGroup(), st)
	if err != nil {
		return err
	}
	if !contents && len(f.GetAppend()) == 0 {
		return p.adjust(n, st, uid, gid)
	}
	mode := uint32(0o644)
	switch {
	case n.Mode != nil:
		mode = n.GetMode()
	case st != nil:
		mode = st.Mode
	}
	return p.write(uid, gid, mode, func(w io.Writer) error {
		if !contents {
			if err := p.copyTo(w); err != nil {
				return err
			}
		}
		for _, piece := range slices.Concat(f.GetContents(), f.GetAppend()) {
			if err := writePiece(w, piece, source); err != nil {
				return err
			}
		}
		return nil
	})
}

func writePiece(w io.Writer, piece *agentv1.Piece, source func(io.Writer, uint64) error) error {
	switch k := piece.GetKind().(type) {
	case *agentv1.Piece_Inline:
		_, err := w.Write(k.Inline)
		return err
	case *agentv1.Piece_Streamed:
		return source(w, k.Streamed)
	}
	return errors.New("a piece of it is neither inline nor streamed")
}

// copyTo writes what is there so far.
func (p *place) copyTo(w io.Writer) error {
	old, err := p.open(unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer old.Close()
	_, err = io.Copy(w, old)
	return err
}

// contentStream is the host's frames with the streamed pieces.
type contentStream struct{ r io.Reader }

// copy writes the next piece, which must have that size.
func (s *contentStream) copy(w io.Writer, size uint64) error {
	if s.r == nil {
		return errors.New("its contents do not come with the configuration")
	}
	for left := size; ; {
		c := &agentv1.Content{}
		if err := transport.ReadMsg(s.r, c); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("receiving its contents, %d bytes before their end: %w", left, err)
		}
		n := uint64(len(c.GetData()))
		if n > left || c.GetEnd() && n < left {
			return fmt.Errorf("its contents are not the %d bytes that were announced", size)
		}
		if _, err := w.Write(c.GetData()); err != nil {
			return err
		}
		left -= n
		if c.GetEnd() {
			return nil
		}
	}
}

// deferredFile is a file that is written after the packages; its streamed pieces came before.
type deferredFile struct {
	*agentv1.File
	spool *os.File // nil: none is streamed
}

func (d deferredFile) close() {
	if d.spool != nil {
		d.spool.Close()
	}
}

// deferFile keeps a file's streamed pieces in a file without a name.
func (r *Provisioner) deferFile(f *agentv1.File) error {
	d := deferredFile{File: f}
	for _, piece := range slices.Concat(f.GetContents(), f.GetAppend()) {
		if _, ok := piece.GetKind().(*agentv1.Piece_Streamed); !ok {
			continue
		}
		if d.spool == nil {
			spool, err := r.root.nameless()
			if err != nil {
				return err
			}
			d.spool = spool
		}
		if err := r.contents.copy(d.spool, piece.GetStreamed()); err != nil {
			d.close()
			return err
		}
	}
	r.deferred = append(r.deferred, d)
	return nil
}

// nameless makes a file that goes when it is closed.
func (t *tree) nameless() (*os.File, error) {
	fd, err := t.dir(".")
	if err != nil {
		return nil, err
	}
	p := &place{dir: fd}
	defer p.close()
	p.name = p.temporary()
	f, err := p.open(unix.O_RDWR | unix.O_CREAT | unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	if err := unix.Unlinkat(p.dir, p.name, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (r *Provisioner) deferredFiles() error {
	for _, d := range r.deferred {
		if d.spool != nil {
			if _, err := d.spool.Seek(0, io.SeekStart); err != nil {
				return err
			}
		}
		err := r.writeFile(d.File, func(w io.Writer, size uint64) error {
			_, err := io.CopyN(w, d.spool, int64(size))
			return err
		})
		if err != nil {
			return element("file", d.GetNode().GetPath(), err)
		}
	}
	return nil
}

// links makes links: hard ones last, as they may be to what is deeper.
func (r *Provisioner) links() error {
	all := slices.Clone(r.GetLinks())
	slices.SortStableFunc(all, func(a, b *agentv1.Link) int {
		switch {
		case a.GetHard() && !b.GetHard():
			return 1
		case b.GetHard() && !a.GetHard():
			return -1
		}
		return depth(a.GetNode()) - depth(b.GetNode())
	})
	for _, l := range all {
		if err := r.link(l); err != nil {
			return element("link", l.GetNode().GetPath(), err)
		}
	}
	return nil
}

func (r *Provisioner) link(l *agentv1.Link) error {
	n := l.GetNode()
	if l.GetTarget() == "" || strings.ContainsRune(l.GetTarget(), 0) {
		return errors.New("it has no target")
	}
	p, st, err := r.cleared(n)
	if err != nil {
		return err
	}
	defer p.close()
	if l.GetHard() {
		return r.hardLink(p, st, l.GetTarget())
	}
	if st != nil {
		if !isLink(st) {
			return errors.New("there is something that is no link, and overwrite is not set")
		}
		if target, err := readlink(p.dir, p.name); err != nil || path.Clean(target) != path.Clean(l.GetTarget()) {
			return errors.New("there is a link to something else, and overwrite is not set")
		}
		return nil
	}
	uid, gid, err := r.owner(n.GetUser(), n.GetGroup(), nil)
	if err != nil {
		return err
	}
	return p.symlink(l.GetTarget(), uid, gid)
}

// hardLink links to a file, or to a link itself.
func (r *Provisioner) hardLink(p *place, st *unix.Stat_t, target string) error {
	to, err := r.root.at(target, false)
	if err != nil {
		return fmt.Errorf("its target %q: %w", target, err)
	}
	defer to.close()
	if st == nil {
		if err := unix.Linkat(to.dir, to.name, p.dir, p.name, 0); err != nil {
			return fmt.Errorf("its target %q: %w", target, err)
		}
		return nil
	}
	same, err := to.stat()
	if err != nil {
		return err
	}
	if same == nil || same.Dev != st.Dev || same.Ino != st.Ino {
		return errors.New("there is something else than its target, and overwrite is not set")
	}
	return nil
}
