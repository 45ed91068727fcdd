//go:build linux

// Command rawport is the init of the guest that test/bench compares streams with: it moves bytes over the virtio-serial port with no
// protocol above it. It takes an order, a letter and a size of 8 bytes: 'w' it writes so much, 'r' it reads so much and says 'k' after;
// 'W' and 'R' do the same for a process at the other end of a pipe.
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const piece = 64 << 10

func main() {
	if len(os.Args) == 3 {
		os.Exit(child(os.Args[1], os.Args[2]))
	}
	err := serve()
	fmt.Fprintln(os.Stderr, "rawport:", err)
	os.Exit(1)
}

// child is the process at the end of the pipe: dd, in both directions.
func child(kind, size string) int {
	left, _ := strconv.ParseInt(size, 10, 64)
	buf := make([]byte, piece)
	if kind == "R" {
		for {
			n, err := unix.Read(0, buf)
			if n <= 0 || err != nil {
				return 0
			}
		}
	}
	zero, err := unix.Open("/dev/zero", unix.O_RDONLY, 0)
	if err != nil {
		return 1
	}
	for left > 0 {
		n, err := unix.Read(zero, buf[:min(left, piece)])
		if err != nil {
			return 1
		}
		for b := buf[:n]; len(b) > 0; {
			n, err := unix.Write(1, b)
			if err != nil {
				return 1
			}
			b, left = b[n:], left-int64(n)
		}
	}
	return 0
}

func serve() error {
	for _, m := range []struct{ source, target, kind string }{{"dev", "/dev", "devtmpfs"}, {"sysfs", "/sys", "sysfs"}} {
		_ = os.MkdirAll(m.target, 0o755)
		_ = unix.Mount(m.source, m.target, m.kind, 0, "") // the kernel may have mounted it already
	}
	port, err := open()
	if err != nil {
		return err
	}
	for {
		head := make([]byte, 9)
		if _, err := io.ReadFull(port, head); err != nil {
			time.Sleep(time.Millisecond) // no host yet
			continue
		}
		if err := obey(port, head[0], int64(binary.BigEndian.Uint64(head[1:]))); err != nil {
			return err
		}
	}
}

func obey(port *os.File, kind byte, size int64) error {
	switch kind {
	case 'w':
		buf := make([]byte, piece)
		return move(func() (int, error) { return port.Write(buf) }, size)
	case 'r':
		buf := make([]byte, piece)
		if err := move(func() (int, error) { return port.Read(buf) }, size); err != nil {
			return err
		}
	default:
		if err := relay(port, string(kind), size); err != nil {
			return err
		}
	}
	if kind == 'W' {
		return nil
	}
	_, err := port.Write([]byte("k"))
	return err
}

func move(do func() (int, error), left int64) error {
	for left > 0 {
		n, err := do()
		if err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

func relay(port *os.File, kind string, size int64) error {
	cmd := exec.Command("/init", kind, fmt.Sprint(size))
	buf := make([]byte, piece)
	if kind == "W" {
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		if err := move(pass(port, out, buf), size); err != nil {
			return err
		}
		return cmd.Wait()
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	gathered := bufio.NewWriterSize(in, piece) // a read of the port gives 4 KiB, and each write may cost two context switches
	if err := move(pass(gathered, port, buf[:4<<10]), size); err != nil {
		return err
	}
	if err := gathered.Flush(); err != nil {
		return err
	}
	in.Close()
	return cmd.Wait()
}

func pass(to io.Writer, from io.Reader, buf []byte) func() (int, error) {
	return func() (int, error) {
		n, err := from.Read(buf)
		if err != nil {
			return 0, err
		}
		return to.Write(buf[:n])
	}
}

func open() (*os.File, error) {
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if text, _ := os.ReadFile(n); strings.TrimSpace(string(text)) == "atoll.agent" {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		time.Sleep(time.Millisecond)
	}
}
