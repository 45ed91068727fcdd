package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/hint"
)

const (
	// daemonStart bounds the wait for a daemon that neither answers nor ends. It may have many machines to take back first.
	daemonStart = 60 * time.Second
	daemonPoll  = 10 * time.Millisecond
	logTail     = 4 << 10 // bytes of daemon.log that explain a daemon that ended
)

// connect returns the client of the daemon, which it starts where it is this home's own and does not run.
func (e *environment) connect(ctx context.Context) (*client.Client, error) {
	if e.client != nil {
		return e.client, nil
	}
	cfg, err := e.config()
	if err != nil {
		return nil, err
	}
	c, err := client.New(cfg.Host)
	if err != nil {
		return nil, err
	}
	if err := listening(ctx, cfg.Host); err != nil {
		switch {
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
			return nil, fmt.Errorf("connecting to the daemon at %s: %w", cfg.Host, err)
		case cfg.HostChosen || len(e.DaemonCmd) == 0:
			return nil, hint.With(fmt.Errorf("connecting to the daemon at %s: %w: %w", cfg.Host, err, errdefs.ErrUnavailable),
				"see whether that daemon runs, or unset ATOLL_HOST and leave out --host to use your own")
		}
		if err := startDaemon(ctx, c, cfg, e.DaemonCmd); err != nil {
			return nil, err
		}
	}
	e.client = c
	return c, nil
}

// listening is nil when somebody takes connections at host.
func listening(ctx context.Context, host string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", strings.TrimPrefix(host, "unix://"))
	if err != nil {
		return err
	}
	return conn.Close()
}

// startDaemon starts the daemon and waits until it answers. Of several commands that do so at once only one gets the lock; the
// others wait for its daemon.
func startDaemon(ctx context.Context, c *client.Client, cfg config.Config, argv []string) error {
	if err := os.MkdirAll(cfg.Home, 0o700); err != nil {
		return hint.With(fmt.Errorf("starting the daemon: %w", err), "set ATOLL_HOME to a directory that you can write to")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, daemonStart, fmt.Errorf("no answer for %s", daemonStart))
	defer cancel()
	lock, err := os.OpenFile(filepath.Join(cfg.Home, "start.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	defer lock.Close() // and with it the lock goes

	poll := time.NewTicker(daemonPoll)
	defer poll.Stop()
	for syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the daemon that another command starts: %w", context.Cause(ctx))
		}
	}
	if c.Ping(ctx) == nil {
		return nil
	}

	d, err := spawn(cfg, argv)
	if err != nil {
		return err
	}
	for {
		select {
		case <-poll.C:
			if c.Ping(ctx) == nil {
				return nil
			}
		case err := <-d.ended:
			// It may have found another that is ahead of it.
			if c.Ping(ctx) == nil {
				return nil
			}
			return d.explain(fmt.Errorf("starting the daemon: it ended at once: %w", err))
		case <-ctx.Done():
			return d.explain(fmt.Errorf("starting the daemon: %w", context.Cause(ctx)))
		}
	}
}

// daemon is a daemon that was just started.
type daemon struct {
	ended chan error
	log   string
	from  int64 // where its part of the log begins
}

func spawn(cfg config.Config, argv []string) (*daemon, error) {
	d := &daemon{ended: make(chan error, 1), log: filepath.Join(cfg.Home, "daemon.log")}
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("starting the daemon: %w", err)
	}
	defer log.Close()
	if d.from, err = log.Seek(0, io.SeekEnd); err != nil {
		return nil, fmt.Errorf("starting the daemon: %w", err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = cfg.Home // not a directory that somebody may want to unmount
	cmd.Env = append(cmd.Environ(), "ATOLL_HOME="+cfg.Home)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the daemon: %w", err)
	}
	go func() { // ends with the daemon or with this process
		err := cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		d.ended <- err
	}()
	return d, nil
}

// explain adds the end of what the daemon said.
func (d *daemon) explain(err error) error {
	err = hint.With(err, "all that it said is in %s", d.log)
	f, openErr := os.Open(d.log)
	if openErr != nil {
		return err
	}
	defer f.Close()
	from := d.from
	if end, seekErr := f.Seek(0, io.SeekEnd); seekErr == nil {
		from = max(from, end-logTail)
	}
	said, readErr := io.ReadAll(io.NewSectionReader(f, from, logTail))
	if said = bytes.TrimSpace(said); readErr != nil || len(said) == 0 {
		return err
	}
	return fmt.Errorf("%w\n%s", err, said)
}
