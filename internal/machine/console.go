package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"github.com/atollvm/atoll/internal/vmm"
)

const (
	consoleHistory = 2 << 10 // of what was written before, for somebody who joins: about a screen
	consolePoll    = 200 * time.Millisecond
	consoleSettle  = 5 * time.Millisecond // from the VMM's telling of a byte to its being in the file
	consoleChunk   = 32 << 10
)

// line is the serial line of a run. What the guest says is read from the VMM's file, which is whole whoever listens; the connection
// carries what is typed, and rings when there is something new to read. It is open only while somebody is there.
type line struct {
	inst vmm.Instance

	mu       sync.Mutex // guards the rest
	conn     net.Conn
	sessions int
	writer   *ConsoleSession
	rang     chan struct{} // closed and replaced when the guest has written
}

func newLine(inst vmm.Instance) *line { return &line{inst: inst, rang: make(chan struct{})} }

func (l *line) dial(ctx context.Context) (net.Conn, error) {
	c, ok := l.inst.(vmm.Console)
	if !ok {
		return nil, fmt.Errorf("this VMM's console cannot be joined: %w", errdefs.ErrNotImplemented)
	}
	return c.DialConsole(ctx)
}

// check waits until the VMM has the line, which says that it has understood what it is to run.
func (l *line) check(ctx context.Context) error {
	conn, err := l.dial(ctx)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (l *line) join(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		conn, err := l.dial(ctx)
		if err != nil {
			return err
		}
		l.conn = conn
		go l.listen(conn)
	}
	l.sessions++
	return nil
}

// listen takes all that comes, so that the guest never waits, and rings.
func (l *line) listen(conn net.Conn) {
	buf := make([]byte, consoleChunk)
	for {
		if _, err := conn.Read(buf); err != nil {
			break
		}
		l.mu.Lock()
		close(l.rang)
		l.rang = make(chan struct{})
		l.mu.Unlock()
	}
	conn.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == conn {
		l.conn = nil
	}
}

func (l *line) leave(s *ConsoleSession) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writer == s {
		l.writer = nil
	}
	if l.sessions--; l.sessions == 0 && l.conn != nil {
		l.conn.Close()
		l.conn = nil
	}
}

func (l *line) bell() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rang
}

// ConsoleSession is somebody at a machine's serial console, until this run of the machine is over.
type ConsoleSession struct {
	name string
	line *line
	file *os.File
	at   int64
	once sync.Once
}

// Console joins the serial console of a running machine, from a little before now on. Close must follow. Several may be there; of those
// that type, the first keeps the others from it until it leaves.
func (ms *Machines) Console(ctx context.Context, name string) (*ConsoleSession, error) {
	e, err := ms.find(name)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	r, m := e.run, e.m
	e.mu.Unlock()
	if r == nil {
		return nil, notRunning(m)
	}
	s, err := r.openConsole(ctx, ms.ConsolePath(m), m.Spec.Name)
	if err != nil {
		return nil, fmt.Errorf("joining the console of machine %q: %w", m.Spec.Name, err)
	}
	return s, nil
}

func (r *run) openConsole(ctx context.Context, path, name string) (*ConsoleSession, error) {
	if err := r.line.join(ctx); err != nil {
		return nil, err
	}
	s := &ConsoleSession{name: name, line: r.line}
	f, err := os.Open(path)
	if err == nil {
		s.file = f
		s.at, err = history(f)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// history is where the last lines begin that fit.
func history(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	at := info.Size() - consoleHistory
	if at <= 0 {
		return 0, nil
	}
	buf := make([]byte, consoleHistory)
	n, err := f.ReadAt(buf, at)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	for i, c := range buf[:n] {
		if c == '\n' {
			return at + int64(i) + 1, nil
		}
	}
	return at, nil
}

// Next waits for output. io.EOF: the run is over and all was read.
func (s *ConsoleSession) Next(ctx context.Context) ([]byte, error) {
	buf := make([]byte, consoleChunk)
	for {
		var over bool
		select {
		case <-s.line.inst.Done():
			over = true // what it wrote last is in the file by now
		default:
		}
		rang := s.line.bell()
		n, err := readNew(s.file, &s.at, buf)
		if n > 0 {
			return buf[:n], nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the console of machine %q: %w", s.name, err)
		}
		if over {
			return nil, io.EOF
		}
		wait := consolePoll
		select {
		case <-rang:
			wait = consoleSettle
		case <-s.line.inst.Done():
			continue
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
			continue
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// readNew reads on in a console's file, which is emptied when it has grown too much.
func readNew(f *os.File, at *int64, buf []byte) (int, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() < *at {
		*at = 0
	}
	n, err := f.ReadAt(buf, *at)
	*at += int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// Write types. errdefs.ErrFailedPrecondition: somebody else does.
func (s *ConsoleSession) Write(p []byte) (int, error) {
	l := s.line
	l.mu.Lock()
	if l.writer == nil {
		l.writer = s
	}
	mine, conn := l.writer == s, l.conn
	l.mu.Unlock()
	switch {
	case !mine:
		err := fmt.Errorf("typing at the console of machine %q: somebody else does, in another session: %w", s.name, errdefs.ErrFailedPrecondition)
		return 0, hint.With(err, "end that one first; only to watch: atoll console %s </dev/null", s.name)
	case conn == nil:
		return 0, fmt.Errorf("typing at the console of machine %q: it is gone: %w", s.name, errdefs.ErrUnavailable)
	}
	return conn.Write(p)
}

// Close leaves the console.
func (s *ConsoleSession) Close() error {
	s.once.Do(func() { s.line.leave(s) })
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// transcript copies the serial console of a guest without an agent to the machine's output. A record is numbered by where it ends in the
// console, so that a later daemon knows how far an earlier one has come.
type transcript struct {
	path string
	log  *outlog.Log
	at   int64  // in the file
	base uint64 // the number of the file's beginning
	keep func(base uint64)
}

// newTranscript goes on where the log ends. keep stores a new base, for a later daemon.
func newTranscript(path string, log *outlog.Log, base uint64, keep func(base uint64)) *transcript {
	at := log.LastSeq()
	return &transcript{path: path, log: log, at: int64(at - min(base, at)), base: base, keep: keep}
}

// transcribe keeps the console of a running machine in its output, until the run is over and all was read.
func (ms *Machines) transcribe(ctx context.Context, e *entry, r *run) {
	t := newTranscript(filepath.Join(e.dir, vmm.ConsoleFile), e.log, e.get().VMM.ConsoleBase, func(base uint64) {
		if err := ms.commit(e, "", func(m *Machine) { m.VMM.ConsoleBase = base }); err != nil {
			ms.Log.Error("recording how far a console was emptied", "machine", e.get().ID, "err", err)
		}
	})
	tick := time.NewTicker(consolePoll)
	defer tick.Stop()
	for over := false; ; {
		if err := t.catchUp(); err != nil {
			ms.Log.Error("keeping a machine's console", "machine", e.get().ID, "err", err)
		}
		if over {
			return
		}
		select {
		case <-tick.C:
		case <-r.inst.Done():
			over = true
		case <-ctx.Done():
			return
		}
	}
}

// catchUp copies what is there.
func (t *transcript) catchUp() error {
	f, err := os.Open(t.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return err
	} else if info.Size() < t.at { // it was emptied
		t.base, t.at = t.base+uint64(t.at), 0
		t.keep(t.base)
	}
	buf := make([]byte, consoleChunk)
	for {
		n, err := f.ReadAt(buf, t.at)
		if n == 0 && errors.Is(err, io.EOF) {
			return nil
		}
		if n == 0 {
			return err
		}
		t.at += int64(n)
		err = t.log.Append(outlog.Record{Seq: t.base + uint64(t.at), Time: time.Now(), Stream: outlog.Stdout, Data: buf[:n]})
		if err != nil {
			return err
		}
	}
}
