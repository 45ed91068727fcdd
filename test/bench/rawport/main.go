//go:build linux

// Command rawport is the init of the guest that test/bench compares streams with: it moves bytes over the virtio-serial port with no
// protocol above it. It takes 'w' or 'r' and a size of 8 bytes, writes or reads so much, and says 'k' after reading.
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	err := serve()
	fmt.Fprintln(os.Stderr, "rawport:", err)
	os.Exit(1)
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
	buf := make([]byte, 64<<10)
	for {
		head := make([]byte, 9)
		if _, err := io.ReadFull(port, head); err != nil {
			time.Sleep(time.Millisecond) // no host yet
			continue
		}
		left := int64(binary.BigEndian.Uint64(head[1:]))
		if head[0] == 'w' {
			for left > 0 {
				n, err := port.Write(buf[:min(left, int64(len(buf)))])
				if err != nil {
					return err
				}
				left -= int64(n)
			}
			continue
		}
		for left > 0 {
			n, err := port.Read(buf[:min(left, int64(len(buf)))])
			if err != nil {
				return err
			}
			left -= int64(n)
		}
		if _, err := port.Write([]byte("k")); err != nil {
			return err
		}
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
