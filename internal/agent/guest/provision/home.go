package provision

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	sudoersDir = "/etc/sudoers.d/"
	mostKeys   = 1 << 20 // bytes of an image's authorized_keys
)

// settle gives a user what is outside the files of accounts.
func (r *Provisioner) settle(c *account, defs loginDefs) error {
	if c.isNew && !c.GetSystem() {
		if err := r.subordinate(c, defs); err != nil {
			return err
		}
	}
	if err := r.makeHome(c, defs); err != nil {
		return fmt.Errorf("its home %q: %w", c.home, err)
	}
	if err := r.authorizeKeys(c); err != nil {
		return fmt.Errorf("its SSH keys: %w", err)
	}
	if err := r.allowSudo(c); err != nil {
		return fmt.Errorf("its sudo rules: %w", err)
	}
	return nil
}

// makeHome makes the home of a new user, from the skeleton, and takes that of another along when it moves or changes hands.
func (r *Provisioner) makeHome(c *account, defs loginDefs) error {
	if c.oldHome != "" {
		if err := r.moveHome(c); err != nil {
			return err
		}
	}
	if c.oldUID != 0 {
		if err := r.handOver(c.home, c.oldUID, c.uid); err != nil {
			return err
		}
	}
	if !c.isNew || c.GetNoCreateHome() || r.root.exists(c.home) {
		return nil
	}
	p, err := r.root.at(c.home, true)
	if err != nil {
		return err
	}
	defer p.close()
	mode := defs.number("HOME_MODE", 0o777&^defs.number("UMASK", 0o022))
	if err := mkdirAt(p.dir, p.name, c.uid, c.gid, mode); err != nil {
		return err
	}
	return r.copyTree("/etc/skel", c.home, func(*unix.Stat_t) (uint32, uint32) { return c.uid, c.gid })
}

// moveHome moves a home to where there is none.
func (r *Provisioner) moveHome(c *account) error {
	from, err := r.root.at(c.oldHome, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer from.close()
	if st, err := from.stat(); err != nil || st == nil || !isDir(st) || from.name == "." || st.Uid != c.uid && st.Uid != c.oldUID || r.root.exists(c.home) {
		return err
	}
	to, err := r.root.at(c.home, true)
	if err != nil {
		return err
	}
	defer to.close()
	if err := unix.Renameat(from.dir, from.name, to.dir, to.name); !errors.Is(err, unix.EXDEV) {
		return err
	}
	// A directory of the image itself cannot be renamed in every overlay.
	st, err := from.stat()
	if err != nil {
		return err
	}
	if err := mkdirAt(to.dir, to.name, st.Uid, st.Gid, st.Mode); err != nil {
		return err
	}
	if err := r.copyTree(c.oldHome, c.home, func(st *unix.Stat_t) (uint32, uint32) { return st.Uid, st.Gid }); err != nil {
		return err
	}
	return from.remove()
}

// handOver gives what one user has in a directory to another.
func (r *Provisioner) handOver(name string, from, to uint32) error {
	p, err := r.root.at(name, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.close()
	return p.handOver(from, to)
}

func (p *place) handOver(from, to uint32) error {
	st, err := p.stat()
	if err != nil || st == nil {
		return err
	}
	if st.Uid == from {
		if err := unix.Fchownat(p.dir, p.name, int(to), -1, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if !isDir(st) {
		return nil
	}
	d, err := p.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := (&place{int(d.Fd()), name}).handOver(from, to); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies what is in a directory: directories, files and links. Not the copy itself, where an image's links lead from one into
// the other.
func (r *Provisioner) copyTree(from, to string, owner func(*unix.Stat_t) (uid, gid uint32)) error {
	fd, err := r.root.dir(to)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	c := copying{Provisioner: r, owner: owner}
	if err := unix.Fstat(fd, &c.copy); err != nil {
		return err
	}
	return c.directory(from, to)
}

type copying struct {
	*Provisioner
	copy  unix.Stat_t
	owner func(*unix.Stat_t) (uid, gid uint32)
}

func (c *copying) directory(from, to string) error {
	names, err := c.root.list(from)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := c.node(path.Join(from, name), path.Join(to, name)); err != nil {
			return fmt.Errorf("copying %q: %w", name, err)
		}
	}
	return nil
}

func (c *copying) node(from, to string) error {
	src, err := c.root.at(from, false)
	if err != nil {
		return err
	}
	defer src.close()
	dst, err := c.root.at(to, false)
	if err != nil {
		return err
	}
	defer dst.close()
	st, err := src.stat()
	if err != nil || st == nil {
		return err
	}
	uid, gid := c.owner(st)
	switch {
	case st.Dev == c.copy.Dev && st.Ino == c.copy.Ino:
		return nil
	case isDir(st):
		if err := mkdirAt(dst.dir, dst.name, uid, gid, st.Mode); err != nil {
			return err
		}
		return c.directory(from, to)
	case isLink(st):
		target, err := readlink(src.dir, src.name)
		if err != nil {
			return err
		}
		return dst.symlink(target, uid, gid)
	case isRegular(st):
		return dst.write(uid, gid, st.Mode, func(w io.Writer) error { return src.copyTo(w) })
	}
	return nil // nobody keeps sockets and devices there
}

// removeHome takes away what a removed user had, as userdel does: its home only when that is its own.
func (r *Provisioner) removeHome(c *account) error {
	if err := errors.Join(r.root.remove(sudoersFile(c.GetName())), r.root.remove("/var/mail/"+c.GetName())); err != nil {
		return err
	}
	p, err := r.root.at(c.home, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("its home: %w", err)
	}
	defer p.close()
	st, err := p.stat()
	if err != nil || st == nil || !isDir(st) || st.Uid != c.uid || p.name == "." {
		return err
	}
	return p.remove()
}

// authorizeKeys adds keys to those that are there.
func (r *Provisioner) authorizeKeys(c *account) error {
	if len(c.GetSshAuthorizedKeys()) == 0 {
		return nil
	}
	dir := path.Join(c.home, ".ssh")
	p, err := r.root.at(dir, true)
	if err != nil {
		return err
	}
	defer p.close()
	d, err := p.sshDir(c.uid, c.gid)
	if err != nil {
		return fmt.Errorf("%q: %w", dir, err)
	}
	defer d.Close()
	file := place{int(d.Fd()), "authorized_keys"}
	if err := file.addKeys(c); err != nil {
		return fmt.Errorf("%q: %w", path.Join(dir, file.name), err)
	}
	return nil
}

// sshDir opens a user's .ssh, which is made where it is missing. It is the user's to change at any time, and what is done there is done as
// root: no link of it is followed.
func (p *place) sshDir(uid, gid uint32) (*os.File, error) {
	st, err := p.stat()
	switch {
	case err != nil:
		return nil, err
	case st == nil:
		if err := mkdirAt(p.dir, p.name, uid, gid, 0o700); err != nil {
			return nil, err
		}
	case isLink(st):
		return nil, errUsersLink
	}
	d, err := p.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	if err := own(int(d.Fd()), uid, gid, 0o700); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

var (
	errUsersLink = errors.New("it is a symbolic link, which is not followed where its user could have made it")
	errHardLink  = errors.New("it is a hard link to a file that may be another's")
)

// usersFile reads a file that a user could have put there, as root but not through links; nothing when there is none.
func (p *place) usersFile(most int64) ([]byte, error) {
	there, err := p.stat()
	switch {
	case err != nil || there == nil:
		return nil, err
	case isLink(there):
		return nil, errUsersLink
	}
	f, err := p.open(unix.O_RDONLY | unix.O_NONBLOCK) // a fifo must not hold us up
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	switch {
	case !isRegular(&st):
		return nil, errors.New("it is no regular file")
	case st.Nlink > 1:
		return nil, errHardLink
	case st.Size > most:
		return nil, fmt.Errorf("its %d bytes are more than %d", st.Size, most)
	}
	return io.ReadAll(io.LimitReader(f, most))
}

func (p *place) addKeys(c *account) error {
	old, err := p.usersFile(mostKeys)
	if err != nil {
		return err
	}
	text := string(old)
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	have := strings.Split(text, "\n")
	for _, key := range c.GetSshAuthorizedKeys() {
		key = strings.TrimSpace(key)
		if !slices.Contains(have, key) {
			have = append(have, key)
			text += key + "\n"
		}
	}
	return p.write(c.uid, c.gid, 0o600, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
}

// sudoersFile is where a user's rules are. sudo leaves files with a dot or a tilde in their names alone.
func sudoersFile(user string) string {
	return sudoersDir + "90-atoll-" + strings.ReplaceAll(user, ".", "=2e")
}

func (r *Provisioner) allowSudo(c *account) error {
	if len(c.GetSudo()) == 0 {
		return nil
	}
	var b strings.Builder
	for _, rule := range c.GetSudo() {
		// A name with a dollar or the like is quoted for sudoers(5).
		b.WriteString(strings.ReplaceAll(c.GetName(), "$", `\$`) + " " + rule + "\n")
	}
	file := sudoersFile(c.GetName())
	if err := r.root.put(file, []byte(b.String()), 0o440); err != nil {
		return err
	}
	visudo := r.binary("visudo")
	if visudo == "" || r.o.Run == nil {
		return nil
	}
	// One wrong line and sudo refuses to work for everybody.
	var says strings.Builder
	if err := r.exec("visudo", []string{visudo, "-cf", file}, nil, func(p []byte) { says.Write(p) }); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(says.String()))
	}
	return nil
}

// subordinate gives a user numbers for user namespaces of its own, where the image has the files for it.
func (r *Provisioner) subordinate(c *account, defs loginDefs) error {
	for _, kind := range []string{"UID", "GID"} {
		file := "/etc/sub" + strings.ToLower(kind)
		count := defs.number("SUB_"+kind+"_COUNT", 65536)
		data, st, err := r.root.read(file, maxTable)
		if errors.Is(err, fs.ErrNotExist) || count == 0 {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading %s: %w", file, err)
		}
		next, mine := uint64(defs.number("SUB_"+kind+"_MIN", 100000)), false
		for line := range strings.Lines(string(data)) {
			e := strings.Split(strings.TrimSpace(line), ":")
			if len(e) != 3 {
				continue
			}
			start, err1 := strconv.ParseUint(e[1], 10, 32)
			n, err2 := strconv.ParseUint(e[2], 10, 32)
			if err1 == nil && err2 == nil {
				next = max(next, start+n)
			}
			mine = mine || e[0] == c.GetName()
		}
		if mine || next+uint64(count) > 1<<32-1 {
			continue
		}
		if len(data) > 0 && data[len(data)-1] != '\n' {
			data = append(data, '\n')
		}
		data = fmt.Appendf(data, "%s:%d:%d\n", c.GetName(), next, count)
		if err := r.rewrite(file, data, st.Uid, st.Gid, st.Mode); err != nil {
			return fmt.Errorf("writing %s: %w", file, err)
		}
	}
	return nil
}
