//go:build linux

// Command fscheck does to a directory what the programs of a build do to files, and says how each went: the same words wherever a
// build runs. What it makes stays there. With the argument -agent it asks the SSH agent of its environment for its keys instead.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Args[1] == "-agent" {
		fmt.Println(askAgent(os.Getenv("SSH_AUTH_SOCK")))
		return
	}
	if err := os.MkdirAll(os.Args[1], 0o755); err == nil {
		err = os.Chdir(os.Args[1])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	unix.Umask(0)
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"modes", modes}, {"owners", owners}, {"links", links}, {"devices", devices}, {"times", times}, {"xattrs", xattrs}, {"capability", capability},
		{"sparse", sparse}, {"mmap", mmap}, {"unlinked", unlinked}, {"rename", rename}, {"flock", flock}, {"append", appending}, {"truncate", truncate},
		{"readdir", readdir}, {"names", names}, {"sync", syncing}, {"busy text", busyText},
	} {
		if err := c.do(); err != nil {
			fmt.Printf("%s: %v\n", c.name, err)
			continue
		}
		fmt.Printf("%s: ok\n", c.name)
	}
}

func write(name string, data string, mode os.FileMode) error {
	return errors.Join(os.WriteFile(name, []byte(data), 0o600), os.Chmod(name, mode))
}

// askAgent asks for the keys that the agent has: draft-miller-ssh-agent, sections 3 and 4.4.
func askAgent(socket string) string {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	const request, answer = 11, 12
	if _, err := conn.Write([]byte{0, 0, 0, 1, request}); err != nil {
		return err.Error()
	}
	head := make([]byte, 9)
	if _, err := io.ReadFull(conn, head); err != nil || head[4] != answer {
		return fmt.Sprintf("answer %v: %v", head, err)
	}
	return fmt.Sprintf("the agent has %d keys", binary.BigEndian.Uint32(head[5:]))
}

func modes() error {
	var errs []error
	for i, m := range []os.FileMode{0, 0o644, 0o755 | os.ModeSetuid, 0o2755&0o777 | os.ModeSetgid, 0o400} {
		errs = append(errs, write(fmt.Sprint("mode", i), "x", m))
	}
	errs = append(errs, os.Mkdir("sticky", 0o777), os.Chmod("sticky", 0o777|os.ModeSticky))
	// Writing takes the set-user-ID bit away, even for root without CAP_FSETID; with it, it stays.
	errs = append(errs, write("suid", "x", 0o755|os.ModeSetuid))
	return errors.Join(errs...)
}

func owners() error {
	err := errors.Join(write("owned", "x", 0o644), os.Chown("owned", 1234, 4321), os.Symlink("nowhere", "owned-link"), os.Lchown("owned-link", 5, 6))
	info, statErr := os.Lstat("owned-link")
	if statErr != nil {
		return statErr
	}
	fmt.Println("  link's size", info.Size())
	return err
}

func links() error {
	err := errors.Join(write("one", "linked", 0o644), os.Link("one", "two"), os.Symlink("../../../../../../etc/passwd", "up"), os.Symlink("/etc/passwd", "absolute"))
	var st unix.Stat_t
	if statErr := unix.Stat("two", &st); statErr != nil {
		return statErr
	}
	fmt.Println("  links", st.Nlink)
	return err
}

func devices() error {
	return errors.Join(unix.Mkfifo("fifo", 0o640), unix.Mknod("null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod("block", unix.S_IFBLK|0o600, int(unix.Mkdev(7, 200))), unix.Mknod("socket", unix.S_IFSOCK|0o600, 0))
}

func times() error {
	when := time.Unix(1234567890, 123456789)
	err := errors.Join(write("timed", "x", 0o644), os.Chtimes("timed", when, when))
	info, statErr := os.Stat("timed")
	if statErr != nil {
		return statErr
	}
	fmt.Println("  modified", info.ModTime().UnixNano())
	return err
}

func xattrs() error {
	err := errors.Join(write("attributed", "x", 0o644), unix.Setxattr("attributed", "user.colour", []byte("green"), 0))
	value := make([]byte, 64)
	n, getErr := unix.Getxattr("attributed", "user.colour", value)
	fmt.Printf("  %s\n", value[:max(n, 0)])
	return errors.Join(err, getErr)
}

func capability() error {
	// cap_net_bind_service=ep, as setcap writes it.
	data := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	return errors.Join(write("capable", "x", 0o755), unix.Setxattr("capable", "security.capability", data, 0))
}

func sparse() error {
	f, err := os.Create("sparse")
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("end"), 64<<20)
	var st unix.Stat_t
	if statErr := unix.Fstat(int(f.Fd()), &st); statErr != nil {
		return statErr
	}
	fmt.Println("  small on disk:", st.Blocks*512 < 1<<20)
	return errors.Join(err, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 4096), f.Close())
}

func mmap() error {
	if err := write("mapped", string(make([]byte, 8192)), 0o644); err != nil {
		return err
	}
	f, err := os.OpenFile("mapped", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m[4096:], "through memory")
	err = errors.Join(unix.Munmap(m), f.Close())
	data, readErr := os.ReadFile("mapped")
	if !bytes.HasPrefix(data[4096:], []byte("through memory")) {
		return errors.New("what was written to memory is not in the file")
	}
	return errors.Join(err, readErr)
}

// unlinked is what tmpfile does.
func unlinked() error {
	f, err := os.CreateTemp(".", "gone")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	if _, err := f.WriteString("still there"); err != nil {
		return err
	}
	if _, err := f.Stat(); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(0o640), f.Truncate(5), f.Sync()); err != nil {
		return err
	}
	data := make([]byte, 16)
	n, err := f.ReadAt(data, 0)
	if n != 5 {
		return err
	}
	return nil
}

func rename() error {
	err := errors.Join(write("old", "old", 0o644), write("new", "new", 0o600), os.Rename("new", "old"))
	exchange := errors.Join(write("a", "a", 0o644), write("b", "b", 0o644), unix.Renameat2(unix.AT_FDCWD, "a", unix.AT_FDCWD, "b", unix.RENAME_EXCHANGE))
	over := unix.Renameat2(unix.AT_FDCWD, "a", unix.AT_FDCWD, "b", unix.RENAME_NOREPLACE)
	fmt.Println("  over another:", over)
	f, openErr := os.Open("old")
	if openErr != nil {
		return openErr
	}
	defer f.Close()
	return errors.Join(err, exchange, os.Mkdir("dir", 0o755), os.Rename("dir", "moved"), os.Rename("old", filepath.Join("moved", "old")))
}

func flock() error {
	a, err := os.Create("lock")
	if err != nil {
		return err
	}
	b, err := os.Open("lock")
	if err != nil {
		return err
	}
	err = unix.Flock(int(a.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	fmt.Println("  taken:", unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	region := unix.Flock_t{Type: unix.F_WRLCK, Len: 10}
	return errors.Join(err, unix.FcntlFlock(a.Fd(), unix.F_SETLK, &region), a.Close(), b.Close())
}

func appending() error {
	for range 3 {
		f, err := os.OpenFile("appended", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		if _, err := f.WriteString("line\n"); err != nil {
			return err
		}
		f.Close()
	}
	return nil
}

func truncate() error {
	return errors.Join(write("cut", "0123456789", 0o644), os.Truncate("cut", 4), write("grown", "x", 0o644), os.Truncate("grown", 10000))
}

func readdir() error {
	if err := os.Mkdir("many", 0o755); err != nil {
		return err
	}
	for i := range 100 {
		if err := os.WriteFile(fmt.Sprintf("many/%d", i), nil, 0o644); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir("many")
	fmt.Println("  entries", len(entries))
	for _, e := range entries[:50] {
		err = errors.Join(err, os.Remove("many/"+e.Name()))
	}
	entries, readErr := os.ReadDir("many")
	fmt.Println("  entries", len(entries))
	return errors.Join(err, readErr)
}

func names() error {
	long := string(bytes.Repeat([]byte("n"), 255))
	return errors.Join(write(long, "x", 0o644), write("a\nb\\c \xff", "x", 0o644), os.Remove(long))
}

func syncing() error {
	f, err := os.Create("synced")
	if err != nil {
		return err
	}
	_, err = f.WriteString("x")
	d, openErr := os.Open(".")
	if openErr != nil {
		return openErr
	}
	return errors.Join(err, f.Sync(), unix.Fdatasync(int(f.Fd())), d.Sync(), f.Close(), d.Close())
}

func busyText() error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.WriteFile("program", self, 0o755); err != nil {
		return err
	}
	info, err := os.Stat("program")
	if err != nil {
		return err
	}
	fmt.Println("  executable:", info.Mode())
	return os.Remove("program")
}
