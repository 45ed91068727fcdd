package mounts

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// Volumes makes the directories that the image declares as such. One for which the image has no content lies on the scratch disk itself, not
// in the overlay: programs that make overlays of their own, as Docker does in /var/lib/docker, cannot have them on another. All stay writable
// when the root is to be made read-only, and their content is where it always was.
func (r *Root) Volumes(paths []string, readOnlyRoot bool) error {
	for _, p := range paths {
		if err := os.MkdirAll(p, 0o755); err != nil {
			return fmt.Errorf("making volume %s: %w", p, reason(err))
		}
		source, err := r.beside(p)
		if err != nil {
			return fmt.Errorf("making volume %s: %w", p, reason(err))
		}
		if source == "" {
			if !readOnlyRoot {
				continue
			}
			source = p // a mount of its own, of the same file system
		}
		if err := unix.Mount(source, p, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mounting volume %s: %w", p, err)
		}
	}
	return nil
}

// volumeMark is on a directory of the scratch disk that is, or was at an earlier boot, mounted as a volume.
const volumeMark = "trusted.atoll.volume"

// beside returns the directory of the scratch disk that holds all of a directory of the overlay; "" where the root disks have a part in it.
func (r *Root) beside(dir string) (string, error) {
	if r == nil || r.scratch < 0 {
		return "", nil
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	upper := fdPath(r.scratch) + "/upper" + real
	if _, err := unix.Getxattr(upper, volumeMark, nil); err == nil {
		return upper, nil
	}
	if empty, err := isEmpty(real); !empty {
		return "", err
	}
	st, err := os.Stat(real)
	if err != nil {
		return "", err
	}
	if err := os.Chmod(real, st.Mode()); err != nil { // which brings a directory of the root disks up
		return "", err
	}
	// Not empty: something of the root disks was deleted here, and would be there again.
	if empty, err := isEmpty(upper); !empty {
		return "", err
	}
	return upper, unix.Setxattr(upper, volumeMark, []byte("1"), 0)
}

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if _, err = f.Readdirnames(1); errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// Tmpfs mounts empty file systems in memory, the outer before the inner. A directory that is there lends its mode, as with Docker.
func Tmpfs(mounts []*agentv1.Tmpfs) error {
	byPath := slices.Clone(mounts)
	slices.SortStableFunc(byPath, func(a, b *agentv1.Tmpfs) int { return strings.Compare(a.GetPath(), b.GetPath()) })
	for _, m := range byPath {
		if err := mountTmpfs(m.GetPath(), m.GetOptions()); err != nil {
			return fmt.Errorf("mounting a tmpfs on %s (%s): %w", m.GetPath(), m.GetOptions(), err)
		}
	}
	return nil
}

func mountTmpfs(path, options string) error {
	flags, data := mountOptions(options)
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		err = os.MkdirAll(path, 0o755)
	case err == nil:
		data = append([]string{fmt.Sprintf("mode=%o", st.Mode&0o7777)}, data...)
	}
	if err != nil {
		return reason(err)
	}
	if path == shm {
		if err := unix.Unmount(path, 0); err != nil {
			return err
		}
	}
	return unix.Mount("tmpfs", path, "tmpfs", flags, strings.Join(data, ","))
}

// mountOptions are the flags among the options of a mount, and the others; the last of contradictory ones counts.
func mountOptions(options string) (flags uintptr, data []string) {
	for o := range strings.SplitSeq(options, ",") {
		switch o {
		case "", "defaults":
		case "ro":
			flags |= unix.MS_RDONLY
		case "rw":
			flags &^= unix.MS_RDONLY
		case "nosuid":
			flags |= unix.MS_NOSUID
		case "suid":
			flags &^= unix.MS_NOSUID
		case "nodev":
			flags |= unix.MS_NODEV
		case "dev":
			flags &^= unix.MS_NODEV
		case "noexec":
			flags |= unix.MS_NOEXEC
		case "exec":
			flags &^= unix.MS_NOEXEC
		case "sync":
			flags |= unix.MS_SYNCHRONOUS
		case "async":
			flags &^= unix.MS_SYNCHRONOUS
		case "dirsync":
			flags |= unix.MS_DIRSYNC
		case "noatime":
			flags |= unix.MS_NOATIME
		case "atime":
			flags &^= unix.MS_NOATIME
		case "nodiratime":
			flags |= unix.MS_NODIRATIME
		case "diratime":
			flags &^= unix.MS_NODIRATIME
		case "relatime":
			flags |= unix.MS_RELATIME
		case "norelatime":
			flags &^= unix.MS_RELATIME
		case "strictatime":
			flags |= unix.MS_STRICTATIME
		case "nostrictatime":
			flags &^= unix.MS_STRICTATIME
		default:
			data = append(data, o)
		}
	}
	return flags, data
}

// reason is an error without the operation and the path, which the caller says.
func reason(err error) error {
	var e *fs.PathError
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}
