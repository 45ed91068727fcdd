//go:build linux

package build

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
	"github.com/moby/buildkit/client"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
	cleanTimeout = 20 * time.Second
)

// logName is the child's log, in its directory.
const logName = "child.log"

// process is a running child.
type process struct {
	client *client.Client
	stdin  io.Closer // closed: the child ends
	cmd    *exec.Cmd
	dir    string
	runc   string
	log    *slog.Logger

	mu       sync.Mutex // guards stopping
	stopping bool

	done chan struct{} // closed when the child has ended and everything of ours that served it
	err  error         // valid after done: how it ended
}

// start runs a child until it can build.
func start(ctx context.Context, o Options) (*process, error) {
	if os.Geteuid() != 0 {
		return nil, hint.With(fmt.Errorf("building needs root: %w", errdefs.ErrPermissionDenied),
			"run the daemon as root (sudo atoll …)")
	}
	runc, _ := exec.LookPath("runc") // empty where there is none
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	logFile, err := os.OpenFile(filepath.Join(o.Dir, logName), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	control, controlChild, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer controlChild.Close()
	registry, registryChild, err := socketPair()
	if err != nil {
		control.Close()
		return nil, err
	}
	defer registryChild.Close()

	args := append(append([]string(nil), o.Child[1:]...), "--dir", o.Dir, "--content", o.ContentDir, "--runc", runc,
		"--cache-size", strconv.FormatInt(o.CacheSize, 10))
	if len(o.Registries) > 0 {
		text, err := json.Marshal(o.Registries)
		if err != nil {
			return nil, err
		}
		args = append(args, "--registries", string(text))
	}
	for _, ca := range o.CA {
		args = append(args, "--ca", ca)
	}
	cmd := exec.Command(o.Child[0], args...)
	cmd.Env = cmd.Environ()
	for name, value := range o.Proxy.variables() {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = logFile
	cmd.ExtraFiles = []*os.File{controlChild, registryChild}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:      true, // a Ctrl-C at the daemon's terminal is the daemon's to handle
		Unshareflags: syscall.CLONE_NEWNS,
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, control.Close(), registry.Close())
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, control.Close(), registry.Close())
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, control.Close(), registry.Close())
	}

	p := &process{stdin: stdin, cmd: cmd, dir: o.Dir, runc: runc, log: o.Log, done: make(chan struct{})}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(stdout).ReadString('\n')
		said <- strings.TrimSpace(line)
	}()
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	var line string
	select {
	case line = <-said:
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-timeout.C:
		err = fmt.Errorf("it was not ready after %s: %w", startTimeout, errdefs.ErrUnavailable)
	}
	if err == nil && line != child.Ready {
		err = fmt.Errorf("%s: %w", line, errdefs.ErrUnavailable)
		if line == "" {
			err = fmt.Errorf("it ended without a word, see %s: %w", logFile.Name(), errdefs.ErrUnavailable)
		}
	}
	if err == nil {
		p.client, err = dial(control)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, errors.Join(err, control.Close(), registry.Close())
	}
	go p.run(control, registry, &http.Server{
		Handler:  o.Registry,
		ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	})
	o.Log.Debug("builder started", "pid", cmd.Process.Pid, "took", time.Since(began))
	return p, nil
}

// run serves the child until it ends.
func (p *process) run(control, registry net.Conn, server *http.Server) {
	var served sync.WaitGroup
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.MaxStreamWindowSize = 4 << 20
	config.LogOutput = io.Discard
	session, err := yamux.Server(registry, config)
	if err == nil {
		served.Go(func() { _ = server.Serve(session) }) // ends with the session
	}
	waitErr := p.cmd.Wait()
	// What a killed child's steps run on in is no part of it; their mounts went with its mount namespace.
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	if err := child.Clean(ctx, p.dir, p.runc); err != nil {
		p.log.Error("cleaning up after the builder", "err", err)
	}
	cancel()
	p.mu.Lock()
	if p.stopping {
		p.err = fmt.Errorf("%w: %w", errClosed, errdefs.ErrAborted)
	} else {
		p.err = hint.With(fmt.Errorf("the builder (process %d) died: %v: %w", p.cmd.Process.Pid, waitErr, errdefs.ErrUnavailable),
			"build again: it is started anew; what it said is in %s", filepath.Join(p.dir, logName))
	}
	p.mu.Unlock()
	p.client.Close()
	control.Close()
	if session != nil {
		session.Close()
	}
	registry.Close()
	served.Wait()
	close(p.done)
}

// stop ends the child: it cancels its builds, closes its files and exits.
func (p *process) stop() error {
	p.mu.Lock()
	p.stopping = true
	p.mu.Unlock()
	p.stdin.Close()
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-p.done:
		return nil
	case <-timeout.C:
	}
	err := p.cmd.Process.Kill()
	<-p.done
	return errors.Join(fmt.Errorf("the builder did not end in %s", stopTimeout), err)
}

// dial makes a BuildKit client of a connection. There is only this one, so gRPC must not give it up when idle.
func dial(conn net.Conn) (*client.Client, error) {
	conns := make(chan net.Conn, 1)
	conns <- conn
	return client.New(context.Background(), "unix:///atoll-build",
		client.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-conns:
				return c, nil
			default:
				return nil, net.ErrClosed
			}
		}),
		client.WithGRPCDialOption(grpc.WithIdleTimeout(0)),
	)
}

// socketPair returns our end and the child's. No path: none to be too long, left over, or opened by somebody else.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "builder"), os.NewFile(uintptr(fds[1]), "builder")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}
