//go:build linux

package vmexec

import (
	"context"
	"io"
	"net"
	"sync"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
)

// takeSockets takes the paths of the host's sockets out of what is said to the guest, by their numbers there.
func takeSockets(mounts []*agentv1.Mount) map[int]string {
	paths := map[int]string{}
	for i, m := range mounts {
		if m.GetSocket() {
			paths[i], m.Source = m.GetSource(), ""
		}
	}
	return paths
}

// serveSockets joins connections to a container's sockets to the host's, until ctx ends. It returns when the last has ended.
func serveSockets(ctx context.Context, agent *host.Client, container string, paths map[int]string) {
	var serving sync.WaitGroup
	for mount, path := range paths {
		serving.Go(func() {
			for {
				conn, err := agent.Accept(ctx, container, mount)
				if err != nil {
					return
				}
				serving.Go(func() { join(ctx, conn, path) })
			}
		})
	}
	serving.Wait()
}

// join carries between a connection from the guest and a socket of the host.
func join(ctx context.Context, guest io.ReadWriteCloser, path string) {
	defer guest.Close()
	socket, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return
	}
	defer socket.Close()
	defer context.AfterFunc(ctx, func() { socket.Close() })()
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		_, _ = io.Copy(socket, guest)
		if s, ok := socket.(*net.UnixConn); ok {
			_ = s.CloseWrite()
		}
	}()
	_, _ = io.Copy(guest, socket)
	if g, ok := guest.(interface{ CloseWrite() error }); ok {
		_ = g.CloseWrite()
	}
	<-asked
}
