//go:build linux

// Package nonblock reads from and writes to files that do not block, by system calls that the Go scheduler is not told of. It takes
// such a call that lasts longer than 20 µs for one that blocks and gives the processor to another thread, which with one emulated CPU
// comes to several context switches for each piece of a stream. What is called here copies some kilobytes and returns.
package nonblock

import (
	"errors"
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// File is a file opened with O_NONBLOCK that the poller knows, such as a pipe, a terminal or a virtio-serial port. Like an os.File it may
// be read and written at the same time.
type File struct {
	file *os.File
	conn syscall.RawConn
}

// New makes one; closing it is up to who has the file.
func New(f *os.File) (*File, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &File{f, conn}, nil
}

// Read waits for something to read, as os.File does.
func (f *File) Read(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	cerr := f.conn.Read(func(fd uintptr) bool {
		n, err = Read(int(fd), b)
		return !errors.Is(err, unix.EAGAIN)
	})
	switch {
	case cerr != nil:
		return 0, cerr
	case err != nil:
		return 0, &os.PathError{Op: "read", Path: f.file.Name(), Err: err}
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write writes all of b.
func (f *File) Write(b []byte) (total int, err error) {
	cerr := f.conn.Write(func(fd uintptr) bool {
		for total < len(b) {
			var n int
			n, err = call(unix.SYS_WRITE, int(fd), b[total:])
			if err != nil {
				return !errors.Is(err, unix.EAGAIN)
			}
			total += n
		}
		return true
	})
	if cerr != nil {
		return total, cerr
	}
	if err != nil {
		err = &os.PathError{Op: "write", Path: f.file.Name(), Err: err}
	}
	return total, err
}

// Read reads once; unix.EAGAIN: there is nothing to read now.
func Read(fd int, b []byte) (int, error) { return call(unix.SYS_READ, fd, b) }

// call returns a bare errno, comparable with ==.
func call(number uintptr, fd int, b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(number, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, errno
	}
}
