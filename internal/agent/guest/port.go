package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollvm/atoll/internal/agent/guest/nonblock"
	"golang.org/x/sys/unix"
)

// portName is what the VMM calls the agent's virtio-serial port.
const portName = "atoll.agent"

// openPort waits for the port, which the kernel finds some time after its driver is there.
func openPort() (*port, error) {
	const dir = "/sys/class/virtio-ports"
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); <-tick.C {
		ports, _ := os.ReadDir(dir)
		for _, p := range ports {
			name, _ := os.ReadFile(dir + "/" + p.Name() + "/name")
			if strings.TrimSpace(string(name)) != portName {
				continue
			}
			fd, err := unix.Open("/dev/"+p.Name(), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err == unix.ENOENT {
				continue // devtmpfs is a moment behind sysfs
			}
			if err != nil {
				return nil, &os.PathError{Op: "opening", Path: "/dev/" + p.Name(), Err: err}
			}
			return newPort(fd, p.Name())
		}
	}
	return nil, errors.New("there is no virtio-serial port named " + portName)
}

// port is a virtio-serial port whose reads wait for a host.
type port struct {
	*os.File
	out     *nonblock.File
	leaving atomic.Bool
	parked  chan struct{} // closed when nothing more is read; made by leave

	writing sync.Mutex // held for ever once muted
}

func newPort(fd int, name string) (*port, error) {
	f := os.NewFile(uintptr(fd), name)
	out, err := nonblock.New(f)
	if err != nil {
		return nil, fmt.Errorf("taking port %s: %w", name, err)
	}
	return &port{File: f, out: out}, nil
}

// leave ends reading: what the host sends from now on is for the next process that has the port. The reader waits for ever.
func (p *port) leave() {
	p.parked = make(chan struct{})
	p.leaving.Store(true)
	p.SetReadDeadline(time.Unix(1, 0))
	<-p.parked
}

// mute ends writing, after what is being written.
func (p *port) mute() { p.writing.Lock() }

func (p *port) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	return p.out.Write(b)
}

// Read treats the end of the file, which is how the driver says that no host is connected, as nothing to read yet: the next host's
// coming is an edge that wakes the poller.
func (p *port) Read(b []byte) (n int, err error) {
	conn, err := p.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := conn.Read(func(fd uintptr) bool {
		n, err = readAll(int(fd), b)
		return n > 0 || err != nil && !errors.Is(err, unix.EAGAIN)
	})
	if cerr != nil && p.leaving.Load() {
		close(p.parked)
		select {}
	}
	if cerr != nil {
		return 0, cerr
	}
	return max(n, 0), err
}

// portBuffer is what the driver hands out with one read at most.
const portBuffer = 4 << 10

// readAll reads what is there, which takes as many reads as the driver has buffers filled. One that is not full is the last.
func readAll(fd int, b []byte) (n int, err error) {
	for n < len(b) {
		m, err := nonblock.Read(fd, b[n:])
		if n > 0 && (m <= 0 || err != nil) {
			return n, nil // the next read says it again
		}
		if err != nil {
			return 0, err
		}
		n += m
		if m < portBuffer {
			break
		}
	}
	return n, nil
}
