//go:build !linux

package filetar

import (
	"archive/tar"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// stat is what os.FileInfo has no word for.
type stat struct {
	mode                  int64
	uid, gid              int
	dev, ino, nlink, rdev uint64
}

func statOf(fi fs.FileInfo) stat {
	st := fi.Sys().(*syscall.Stat_t)
	return stat{mode: int64(st.Mode), uid: int(st.Uid), gid: int(st.Gid), dev: uint64(st.Dev), ino: st.Ino, nlink: uint64(st.Nlink), rdev: uint64(st.Rdev)}
}

func deviceNumbers(uint64) (major, minor int64) { return 0, 0 }

func kernelOwn(string) bool { return false }

func extents(*os.File, int64) ([]extent, bool) { return nil, false }

func xattrs(string) (map[string]string, error) { return nil, nil }

func setXattrs(*os.Root, string, *tar.Header) error { return nil }

func setTime(dir *os.Root, name string, t time.Time) error {
	if fi, err := dir.Lstat(name); err != nil || fi.Mode()&fs.ModeSymlink != 0 {
		return err
	}
	return dir.Chtimes(name, timeOf(t), timeOf(t))
}

func makeNode(*os.Root, string, *tar.Header) error {
	return errors.New("it is a special file, which is made on Linux only")
}
