package transport

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// VsockPort is where the agent listens when the guest has vsock.
const VsockPort = 1024

// ServeVsock accepts connections from the host on VsockPort, each a session of its own, until the listener fails.
// os.ErrNotExist: the guest has no vsock.
func ServeVsock(accept func(*Session)) error {
	if _, err := os.Stat("/dev/vsock"); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a vsock socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: VsockPort}); err != nil {
		return fmt.Errorf("binding vsock port %d: %w", VsockPort, err)
	}
	if err := unix.Listen(fd, 4); err != nil {
		return fmt.Errorf("listening on vsock port %d: %w", VsockPort, err)
	}
	for {
		nfd, peer, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accepting on vsock port %d: %w", VsockPort, err)
		}
		conn := os.NewFile(uintptr(nfd), "vsock")
		// Only the host configures this machine; processes of the guest could connect by the loopback CID.
		if vm, ok := peer.(*unix.SockaddrVM); !ok || vm.CID != unix.VMADDR_CID_HOST {
			conn.Close()
			continue
		}
		session, err := Server(io.ReadWriteCloser(conn))
		if err != nil {
			conn.Close()
			continue
		}
		accept(session)
	}
}
