//go:build linux

// Package child is the process that runs builds: it owns BuildKit's state directory and its mounts live in a mount namespace of its
// own, so that nothing of them is left when it dies. Package build starts it and is its only client; the two talk over two inherited
// sockets: BuildKit's gRPC on one, the image store's registry (the parent serves) on the other. Imported by cmd/atoll alone.
package child

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atollvm/atoll/internal/image"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/log"
	"github.com/hashicorp/yamux"
	"github.com/moby/buildkit/util/grpcerrors"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// The descriptors that the parent hands over.
const (
	controlFD  = 3 // BuildKit's gRPC: the child serves
	registryFD = 4 // HTTP over yamux: the parent serves
)

// Ready is what the child prints on stdout once it can build. Any other line says why it cannot.
const Ready = "ready"

// lockName is the file in the state directory whose lock makes a builder its owner.
const lockName = "lock"

// lockWait bounds the wait for a dying predecessor on the same directory.
const lockWait = 3 * time.Second

// Run is the child's main. It ends when ctx does, when a SIGTERM comes, or when stdin, which the parent holds, is closed.
func Run(ctx context.Context, args []string) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	err := run(ctx, args)
	if err != nil {
		fmt.Println(strings.ReplaceAll(err.Error(), "\n", " "))
	}
	return err
}

func run(ctx context.Context, args []string) (err error) {
	var dir, contentDir, runc string
	var cacheSize int64
	var cas []string
	var registries map[string]image.Registry
	flags := flag.NewFlagSet("build-child", flag.ContinueOnError)
	flags.StringVar(&dir, "dir", "", "state directory")
	flags.StringVar(&contentDir, "content", "", "root of the image store's content")
	flags.StringVar(&runc, "runc", "", "path of runc; empty: there is none")
	flags.Int64Var(&cacheSize, "cache-size", 0, "bytes that the cache may grow to; 0: by the disk's size")
	flags.Func("ca", "PEM file of a certificate authority to trust beside the system's", func(path string) error {
		cas = append(cas, path)
		return nil
	})
	flags.Func("registries", "how registries are reached, as JSON by host", func(text string) error {
		return json.Unmarshal([]byte(text), &registries)
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := log.SetLevel("warn"); err != nil {
		return err
	}

	// First of all, so that no process started from here inherits them.
	control, err := inherited(controlFD)
	if err != nil {
		return err
	}
	registry, err := inherited(registryFD)
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, filepath.Join(dir, lockName))
	if err != nil {
		return err
	}
	defer unlock()
	// BuildKit mounts in os.TempDir: ours can be emptied without asking who else uses it.
	tmp := filepath.Join(dir, "tmp")
	if err := os.Setenv("TMPDIR", tmp); err != nil {
		return err
	}
	if err := errors.Join(cleanLocked(ctx, dir, runc), emptyDir(tmp), emptyDir(vmDir(dir))); err != nil {
		return fmt.Errorf("cleaning up after the previous builder: %w", err)
	}
	authorities, err := readAuthorities(cas)
	if err != nil {
		return err
	}
	if err := authorities.trust(tmp); err != nil {
		return fmt.Errorf("trusting more certificate authorities: %w", err)
	}

	session, err := yamux.Client(registry, muxConfig())
	if err != nil {
		return err
	}
	defer session.Close()

	vms := newVMs(dir, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	defer vms.wait()
	c, err := newController(ctx, options{
		dir: dir, contentDir: contentDir, runc: runc, cacheSize: cacheSize, authorities: authorities, store: newStore(session, registries), vms: vms,
	})
	if err != nil {
		return fmt.Errorf("opening the build cache in %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()

	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(grpcerrors.UnaryServerInterceptor),
		grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.WaitForHandlers(true), // so that the cache is closed after the last step has ended
	)
	c.Register(server)
	l := newListener(control)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	fmt.Println(Ready)

	<-ctx.Done()
	server.Stop()
	if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// lock takes the state directory. BuildKit's own bbolt files would block a second process for ever.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(lockWait)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			_ = f.Truncate(0)
			_, _ = fmt.Fprintf(f, "%d", os.Getpid())
			return func() { f.Close() }, nil
		}
		select {
		case <-tick.C:
		case <-deadline:
			owner, _ := io.ReadAll(f)
			f.Close()
			return nil, fmt.Errorf("locking %s: process %s builds in this directory: %w", path, owner, err)
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		}
	}
}

// muxConfig is yamux without its keepalives: the other end is on this machine, and a suspended one must not lose the session.
func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.MaxStreamWindowSize = 4 << 20
	c.LogOutput = io.Discard
	return c
}

func inherited(fd uintptr) (net.Conn, error) {
	f := os.NewFile(fd, "parent")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("opening descriptor %d: was this started by the daemon? %w", fd, err)
	}
	return c, nil
}

// listener hands out its one connection, then waits to be closed.
type listener struct {
	conns  chan net.Conn
	addr   net.Addr
	once   sync.Once
	closed chan struct{}
}

func newListener(c net.Conn) *listener {
	l := &listener{conns: make(chan net.Conn, 1), addr: c.LocalAddr(), closed: make(chan struct{})}
	l.conns <- c
	return l
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return l.addr }
