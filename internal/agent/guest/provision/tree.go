package provision

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// tree is the root directory. Every path is resolved inside it, whatever links the image has.
type tree struct{ fd int }

func openTree(root string) (*tree, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: root, Err: err}
	}
	return &tree{fd}, nil
}

func (t *tree) close() { unix.Close(t.fd) }

// open opens a path. Links are followed, the last component's too unless the flags say O_NOFOLLOW.
func (t *tree) open(name string, flags int) (int, error) {
	how := &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(t.fd, "./"+name, how)
		if err == unix.EINTR || err == unix.EAGAIN { // a rename elsewhere while it looked at ".."
			continue
		}
		if err != nil {
			return -1, err
		}
		return fd, nil
	}
}

func (t *tree) openFile(name string) (*os.File, error) {
	fd, err := t.open(name, unix.O_RDONLY|unix.O_NONBLOCK) // a fifo must not hold us up
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// read returns a regular file's contents and what it is like.
func (t *tree) read(name string, most int64) ([]byte, *unix.Stat_t, error) {
	f, err := t.openFile(name)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, nil, err
	}
	if !isRegular(&st) {
		return nil, nil, errors.New("it is no regular file")
	}
	if st.Size > most {
		return nil, nil, fmt.Errorf("its %d bytes are more than %d", st.Size, most)
	}
	data, err := io.ReadAll(io.LimitReader(f, most))
	return data, &st, err
}

// exists says whether a path leads to something; what cannot be looked at does not exist.
func (t *tree) exists(name string) bool {
	fd, err := t.open(name, unix.O_PATH)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func (t *tree) isDir(name string) bool {
	fd, err := t.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// list returns the names in a directory; one that is not there has none.
func (t *tree) list(name string) ([]string, error) {
	fd, err := t.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	return d.Readdirnames(-1)
}

// place is a name in an opened directory: what it stands for is never reached through a link. Its owner closes it.
type place struct {
	dir  int
	name string
}

func (p *place) close() { unix.Close(p.dir) }

// at opens the directory of a path. Missing ones are made, 0755 and root's, when missing says so. The path "/" is ".".
func (t *tree) at(name string, missing bool) (*place, error) {
	if err := checkPath(name); err != nil {
		return nil, err
	}
	name = path.Clean(name)
	if name == "/" {
		fd, err := t.open(".", unix.O_PATH|unix.O_DIRECTORY)
		return &place{fd, "."}, err
	}
	dir, base := path.Split(name)
	open := t.dir
	if missing {
		open = func(name string) (int, error) { return t.makeDirs(name, 0) }
	}
	fd, err := open(dir)
	if err != nil {
		return nil, fmt.Errorf("its directory %q: %w", dir, err)
	}
	return &place{fd, base}, nil
}

func (t *tree) dir(name string) (int, error) { return t.open(name, unix.O_PATH|unix.O_DIRECTORY) }

func checkPath(name string) error {
	if !strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) {
		return fmt.Errorf("%q is no absolute path", name)
	}
	return nil
}

// makeDirs opens a directory, and makes those on the way to it that are missing; also where a link leads that leads nowhere yet.
func (t *tree) makeDirs(name string, links int) (int, error) {
	fd, err := t.dir(name)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	name = strings.TrimRight(name, "/")
	up, base := path.Split(name)
	if base == "" || base == ".." || base == "." {
		return -1, unix.ENOENT
	}
	parent, err := t.makeDirs(up, links)
	if err != nil {
		return -1, err
	}
	defer unix.Close(parent)
	if target, err := readlink(parent, base); err == nil {
		const mostLinks = 40 // as Linux
		if links == mostLinks {
			return -1, unix.ELOOP
		}
		if !strings.HasPrefix(target, "/") {
			target = up + "/" + target
		}
		return t.makeDirs(target, links+1)
	}
	if err := mkdirAt(parent, base, 0, 0, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	return unix.Openat(parent, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

func readlink(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// mkdirAt makes a directory that is its owner's before others may enter it.
func mkdirAt(dir int, name string, uid, gid, mode uint32) error {
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return own(fd, uid, gid, mode)
}

// own sets the owner and then the mode, as the first takes the bits 06000 away.
func own(fd int, uid, gid, mode uint32) error {
	if err := unix.Fchown(fd, int(uid), int(gid)); err != nil {
		return err
	}
	return unix.Fchmod(fd, mode&0o7777)
}

func isRegular(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFREG }
func isDir(st *unix.Stat_t) bool     { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
func isLink(st *unix.Stat_t) bool    { return st.Mode&unix.S_IFMT == unix.S_IFLNK }

// stat says what is there; nil: nothing.
func (p *place) stat() (*unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(p.dir, p.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return nil, nil
	}
	return &st, err
}

// open opens what is there, which must not be a link.
func (p *place) open(flags int) (*os.File, error) {
	fd, err := unix.Openat(p.dir, p.name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), p.name), nil
}

// remove takes away what is there, with all below it.
func (p *place) remove() error {
	if p.name == "." {
		return errors.New("the root directory itself cannot be replaced")
	}
	// The parent as a root of its own: RemoveAll then follows no link.
	parent, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", p.dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.RemoveAll(p.name)
}

// temporary is a name beside p that nothing has.
func (p *place) temporary() string { return ".atoll-" + rand.Text()[:12] }

// rename gives what has a temporary name its own. A file that was there is replaced; a directory is not.
func (p *place) rename(temporary string) error {
	err := unix.Renameat(p.dir, temporary, p.dir, p.name)
	if err != nil {
		unix.Unlinkat(p.dir, temporary, 0)
	}
	return err
}

// write makes a file whole: it gets its name when its bytes, owner and mode are right.
func (p *place) write(uid, gid, mode uint32, fill func(io.Writer) error) error {
	temporary := p.temporary()
	fd, err := unix.Openat(p.dir, temporary, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), p.name)
	err = fill(f)
	if err == nil {
		err = own(fd, uid, gid, mode)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		unix.Unlinkat(p.dir, temporary, 0)
		return err
	}
	return p.rename(temporary)
}

// symlink makes a link, in the place of any file.
func (p *place) symlink(target string, uid, gid uint32) error {
	temporary := p.temporary()
	if err := unix.Symlinkat(target, p.dir, temporary); err != nil {
		return err
	}
	if err := unix.Fchownat(p.dir, temporary, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		unix.Unlinkat(p.dir, temporary, 0)
		return err
	}
	return p.rename(temporary)
}

// put writes a small file of root's in the place of what is at the path, a link included. Missing directories are made.
func (t *tree) put(name string, data []byte, mode uint32) error {
	return t.putAs(name, data, 0, 0, mode)
}

func (t *tree) putAs(name string, data []byte, uid, gid, mode uint32) error {
	p, err := t.at(name, true)
	if err != nil {
		return err
	}
	defer p.close()
	return p.write(uid, gid, mode, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// link makes a symbolic link of root's in the place of any file. Missing directories are made.
func (t *tree) link(name, target string) error {
	p, err := t.at(name, true)
	if err != nil {
		return err
	}
	defer p.close()
	return p.symlink(target, 0, 0)
}

// remove takes a file or link away, if it is there.
func (t *tree) remove(name string) error {
	p, err := t.at(name, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	if err := unix.Unlinkat(p.dir, p.name, 0); err != unix.ENOENT {
		return err
	}
	return nil
}

// readlink returns where a link leads; empty: it is none.
func (t *tree) readlink(name string) string {
	p, err := t.at(name, false)
	if err != nil {
		return ""
	}
	defer p.close()
	target, err := readlink(p.dir, p.name)
	if err != nil {
		return ""
	}
	return target
}
