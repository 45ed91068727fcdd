package filetar

import (
	"archive/tar"
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stat is what os.FileInfo has no word for.
type stat struct {
	mode                  int64
	uid, gid              int
	dev, ino, nlink, rdev uint64
}

func statOf(fi fs.FileInfo) stat {
	st := fi.Sys().(*syscall.Stat_t)
	return stat{mode: int64(st.Mode), uid: int(st.Uid), gid: int(st.Gid), dev: st.Dev, ino: st.Ino, nlink: uint64(st.Nlink), rdev: st.Rdev}
}

func deviceNumbers(rdev uint64) (major, minor int64) {
	return int64(unix.Major(rdev)), int64(unix.Minor(rdev))
}

// kernelOwn says whether a mount holds no files of the machine's but what the kernel makes up.
func kernelOwn(path string) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false
	}
	switch int64(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.DEVPTS_SUPER_MAGIC, unix.DEBUGFS_MAGIC,
		unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC, unix.PSTOREFS_MAGIC, unix.EFIVARFS_MAGIC, unix.SELINUX_MAGIC, mqueueMagic, fusectlMagic, configfsMagic:
		return true
	case unix.TMPFS_MAGIC:
		return path == "/dev" // devtmpfs
	}
	return false
}

// Of linux/ipc/mqueue.c, fs/fuse/fuse_i.h and fs/configfs/mount.c.
const (
	mqueueMagic   = 0x19800202
	fusectlMagic  = 0x65735543
	configfsMagic = 0x62656570
)

// extents are the parts of a file that are no holes, and whether there is a hole at all.
func extents(f *os.File, size int64) (data []extent, sparse bool) {
	for at := int64(0); at < size; {
		from, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // holes up to the end
			sparse = true
			break
		}
		var to int64
		if err == nil {
			to, err = f.Seek(from, unix.SEEK_HOLE)
		}
		if err != nil || len(data) >= maxExtents { // the file system knows no holes, or too many
			data, sparse = nil, false
			break
		}
		to = min(to, size)
		sparse = sparse || from > at
		data = append(data, extent{from, to - from})
		at = to
	}
	if _, err := f.Seek(0, 0); err != nil {
		return nil, false
	}
	return data, sparse
}

// maxExtents keeps the table of a file's holes small: archive/tar reads one of up to 1 MiB.
const maxExtents = 20000

// wanted are the attributes that are a user's, or part of a program. The others are of the system that the file is on.
func wanted(attr string) bool {
	return strings.HasPrefix(attr, "user.") || attr == "security.capability"
}

func xattrs(path string) (map[string]string, error) {
	n, err := unix.Llistxattr(path, nil)
	if err != nil || n == 0 {
		return nil, ignore(err)
	}
	list := make([]byte, n)
	if n, err = unix.Llistxattr(path, list); err != nil {
		return nil, ignore(err)
	}
	found := map[string]string{}
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if !wanted(name) {
			continue
		}
		value := make([]byte, 64<<10) // the kernel's most
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			if ignore(err) == nil {
				continue
			}
			return nil, err
		}
		found[name] = string(value[:n])
	}
	return found, nil
}

// ignore passes over what only says that there are no attributes, or none any more.
func ignore(err error) error {
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ERANGE) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPERM) {
		return nil
	}
	return err
}

func setXattrs(dir *os.Root, name string, h *tar.Header) error {
	for k, v := range h.PAXRecords {
		attr, ok := strings.CutPrefix(k, xattrPrefix)
		if !ok || !wanted(attr) || h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
			continue
		}
		f, err := dir.Open(name)
		if err != nil {
			return err
		}
		err = unix.Fsetxattr(int(f.Fd()), attr, []byte(v), 0)
		f.Close()
		if ignore(err) != nil {
			return err
		}
	}
	return nil
}

func setTime(dir *os.Root, name string, t time.Time) error {
	ts, err := unix.TimeToTimespec(timeOf(t))
	if err != nil {
		return err
	}
	return at(dir, func(fd int) error {
		return unix.UtimesNanoAt(fd, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
}

func makeNode(dir *os.Root, name string, h *tar.Header) error {
	kind := uint32(unix.S_IFIFO)
	switch h.Typeflag {
	case tar.TypeChar:
		kind = unix.S_IFCHR
	case tar.TypeBlock:
		kind = unix.S_IFBLK
	}
	return at(dir, func(fd int) error {
		return unix.Mknodat(fd, name, kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	})
}
