// Package cli is the atoll command: one file per command, each turning flags into calls of the daemon's API and the answers into
// output. It holds no state and decides nothing that the daemon could decide. Results go to Env.Stdout, all else to Env.Stderr.
// Imported by cmd/atoll only. Main is not safe for concurrent use within one process: it takes the process's signals.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/hint"
)

// Env is the world outside of the command line.
type Env struct {
	Stdin     io.Reader // a terminal is recognised by its file descriptor
	Stdout    io.Writer
	Stderr    io.Writer
	LookupEnv func(string) (string, bool)
	Version   Version
	DaemonCmd []string         // argv of this host's daemon in the foreground, which is started when none answers; empty: none is
	Extra     []*cobra.Command // commands of other rooms, such as daemon
}

// Version is this binary's.
type Version struct {
	Version string
	Commit  string
}

// Main runs the command in args, which are without the program's name, and returns the exit code: 0, 1 failed, 2 usage,
// 128+n ended by signal n; run and exec return the guest's code, or 125 to 127.
func Main(ctx context.Context, args []string, env Env) int {
	ctx, cancel := context.WithCancelCause(ctx)
	e := &environment{Env: env, now: time.Now, cancel: cancel}
	stop := e.catchSignals()
	defer stop()
	defer e.close()

	root := newRootCmd(e)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	return e.finish(ctx, cmd, err)
}

// environment is what the commands share: Env, and the client that the first of them to need it connects.
type environment struct {
	Env
	now    func() time.Time
	cancel context.CancelCauseFunc

	host    string // --host
	running bool   // the command line was understood: what fails from here on is no usage error
	client  *client.Client
	signals chan os.Signal
	forward atomic.Pointer[func(os.Signal)] // takes the signals that would else end the command
}

func (e *environment) close() {
	e.cancel(nil)
	if e.client != nil {
		e.client.Close()
	}
}

func (e *environment) config() (config.Config, error) {
	return config.Load(e.LookupEnv, os.Getuid(), config.Flags{Host: e.host})
}

// exitError ends the command with a code of its own; err may be nil, where all that is to be said has been said.
type exitError struct {
	code int
	err  error
}

func (x *exitError) Error() string {
	if x.err == nil {
		return fmt.Sprintf("exit code %d", x.code)
	}
	return x.err.Error()
}
func (x *exitError) Unwrap() error { return x.err }

// usageError is a command line that makes no sense, found after the flags were parsed.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// interrupted is the cause of a context that a signal has cancelled.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return "interrupted by " + i.signal.String() }

func (e *environment) finish(ctx context.Context, cmd *cobra.Command, err error) int {
	if err == nil {
		return 0
	}
	exit := (*exitError)(nil)
	if errors.As(err, &exit) && exit.err == nil {
		return exit.code
	}
	if isBroken(err) && exit == nil {
		err = hint.With(fmt.Errorf("%w: it was ended, or died", errDisconnected), "the next command starts it again: repeat this one")
	}
	if i := (interrupted{}); errors.As(context.Cause(ctx), &i) {
		return 128 + int(i.signal)
	}
	if exit != nil {
		ui.Error(e.Stderr, exit.err)
	} else {
		ui.Error(e.Stderr, err)
	}
	if u := (usageError{}); !e.running || errors.As(err, &u) {
		fmt.Fprintf(e.Stderr, "\nUsage: %s\nRun '%s --help' for more.\n", cmd.UseLine(), cmd.CommandPath())
		return 2
	}
	if exit != nil {
		return exit.code
	}
	return 1
}

// catchSignals cancels the command at the first signal; a second one ends the process as it would have without us.
// While forward is set, signals go there.
func (e *environment) catchSignals() (stop func()) {
	e.signals = make(chan os.Signal, 16)
	done := make(chan struct{})
	ended := make(chan struct{})
	signal.Notify(e.signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case s := <-e.signals:
				if f := e.forward.Load(); f != nil {
					(*f)(s)
					continue
				}
				e.cancel(interrupted{s.(syscall.Signal)})
				signal.Stop(e.signals)
			}
		}
	}()
	return func() {
		signal.Stop(e.signals)
		close(done)
		<-ended
	}
}
