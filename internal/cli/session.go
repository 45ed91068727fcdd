package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

// input is what the Exec and Attach streams have in common on the way in; one field is set.
type input struct {
	data  []byte
	close bool
	size  *atollv1.Size
	name  string // of a signal
}

// session is one user at one stream.
type session struct {
	env   *environment
	stdin bool
	tty   bool
	// signal delivers a signal to the guest's process; nil: signals are not for the guest.
	signal func(name string) error
	// keys leave a terminal; then leave is called, which may be nil.
	keys  []byte
	leave func() error

	mu       sync.Mutex // a stream takes one message at a time
	transmit func(input) error
}

// outcome is how a session ended.
type outcome struct {
	code     int
	err      error
	detached bool // the user has left
}

var errDisconnected = errors.New("the daemon ended the connection")

func (s *session) send(in input) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.transmit(in)
}

// interact feeds the stream from the terminal until result comes.
func (s *session) interact(ctx context.Context, result <-chan outcome) outcome {
	if s.tty {
		if fd, ok := ui.Terminal(s.env.Stdin); ok && s.stdin {
			old, err := term.MakeRaw(fd)
			if err != nil {
				return outcome{err: fmt.Errorf("putting the terminal in raw mode: %w", err)}
			}
			defer term.Restore(fd, old)
		}
		defer s.followSize()()
	}
	if s.signal != nil && !s.tty { // a terminal sends its own; what comes beside, such as its hanging up, is not for the guest
		defer s.forwardSignals()()
	}
	detached := make(chan struct{})
	if s.stdin {
		go s.feed(detached) // cannot be waited for: a read of a terminal has no end
	}
	select {
	case r := <-result:
		return r
	case <-detached:
		return s.left(ctx, result)
	case <-ctx.Done():
		return outcome{err: context.Cause(ctx)}
	}
}

// left ends a session whose user has left.
func (s *session) left(ctx context.Context, result <-chan outcome) outcome {
	if s.leave != nil {
		if err := s.leave(); err != nil {
			return outcome{err: fmt.Errorf("detaching: %w", err)}
		}
		select {
		case r := <-result: // the daemon has ended the stream
			if errdefs.IsFailedPrecondition(r.err) {
				return outcome{err: fmt.Errorf("detaching: %w", r.err)}
			}
		case <-time.After(lastWord):
		case <-ctx.Done():
		}
	}
	s.env.sayDetached()
	return outcome{detached: true}
}

// feed closes detached when the detach keys are typed.
func (s *session) feed(detached chan<- struct{}) {
	buf := make([]byte, 64<<10)
	scanner := &keyScanner{}
	if s.tty {
		scanner.keys = s.keys
	}
	for {
		n, err := s.env.Stdin.Read(buf)
		data, found := scanner.scan(buf[:n])
		if len(data) > 0 && s.send(input{data: data}) != nil {
			return
		}
		if found {
			close(detached)
			return
		}
		if err != nil {
			s.send(input{close: true}) //nolint:errcheck // the stream's end is seen where it is read
			return
		}
	}
}

// followSize tells the guest the size of the terminal, now and when it changes.
func (s *session) followSize() (stop func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	done := make(chan struct{})
	go func() {
		for {
			if size := s.env.terminalSize(); size != nil && s.send(input{size: size}) != nil {
				return
			}
			select {
			case <-changed:
			case <-done:
				return
			}
		}
	}()
	return func() { signal.Stop(changed); close(done) }
}

// terminalSize is nil where there is no terminal.
func (e *environment) terminalSize() *atollv1.Size {
	for _, stream := range []any{e.Stdout, e.Stdin} {
		if fd, ok := ui.Terminal(stream); ok {
			if cols, rows, err := term.GetSize(fd); err == nil && cols > 0 && rows > 0 { // 0: it does not know its own
				return &atollv1.Size{Rows: uint32(rows), Cols: uint32(cols)}
			}
		}
	}
	return nil
}

// forwardSignals hands signals to the guest. One that comes while the last is still on its way ends the command: else a daemon
// that hangs could not be left.
func (s *session) forwardSignals() (stop func()) {
	var pending atomic.Bool
	f := func(sig os.Signal) {
		if !pending.CompareAndSwap(false, true) {
			s.env.cancel(interrupted{sig.(syscall.Signal)})
			return
		}
		go func() {
			s.signal(signalName(sig)) //nolint:errcheck // a guest that has just ended takes none
			pending.Store(false)
		}()
	}
	s.env.forward.Store(&f)
	signal.Notify(s.env.signals, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	return func() { s.env.forward.Store(nil) }
}

func signalName(s os.Signal) string {
	return strings.TrimPrefix(unix.SignalName(s.(syscall.Signal)), "SIG")
}

// checkTerminal is Docker's rule: somebody who wants to type at a terminal must have one.
func (e *environment) checkTerminal(stdin, tty bool) error {
	if _, ok := ui.Terminal(e.Stdin); stdin && tty && !ok {
		return errors.New("the input device is not a TTY")
	}
	return nil
}

// receive returns the next message of a stream; its end before a result is an error.
func receive[T any](next func() (*T, error)) (*T, error) {
	m, err := next()
	if errors.Is(err, io.EOF) || isBroken(err) {
		return nil, errDisconnected
	}
	return m, err
}

// isBroken tells a connection that broke, as when the daemon is killed, from an answer of the daemon.
func isBroken(err error) bool {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return true
	}
	// Connect gives a stream that was cut off in a message no other sign than these words.
	return err != nil && (strings.Contains(err.Error(), "incomplete envelope") || strings.HasSuffix(err.Error(), "unexpected EOF"))
}
