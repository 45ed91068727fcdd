package user

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/network"
)

// linger is how long a helper stays that has no endpoints and that no driver watches.
const linger = 30 * time.Second

// RunHelper is the main of a network's helper process: args are the ones that the driver added, and file 3 is its pipe.
// It returns when ctx ends or the helper is not needed any more.
func RunHelper(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("running network helper: want one argument, the network's directory, not %q", args)
	}
	unix.CloseOnExec(readyFD)
	ready := os.NewFile(readyFD, "ready")
	s, err := serve(ctx, args[0])
	if err != nil {
		fmt.Fprint(ready, err)
		ready.Close()
		return fmt.Errorf("running network helper: %w", err)
	}
	fmt.Fprint(ready, readyWord)
	ready.Close()
	return s.wait(ctx)
}

// server answers the control socket.
type server struct {
	seg  *segment
	http *http.Server
	l    net.Listener
	lock *os.File
	end  chan struct{} // closed by shutdown or idleness

	mu       sync.Mutex // guards the rest
	watchers int
	idle     *time.Timer
	ended    bool
}

func serve(ctx context.Context, dir string) (*server, error) {
	data, err := os.ReadFile(filepath.Join(dir, configFile))
	if err != nil {
		return nil, err
	}
	var config helperConfig
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("reading %s: %w", configFile, err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := takeOver(ctx, lock); err != nil {
		lock.Close()
		return nil, fmt.Errorf("locking %s: another helper runs: %w", lock.Name(), err)
	}
	socket := filepath.Join(dir, controlSocket)
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		lock.Close()
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	seg, err := newSegment(ctx, dir, config.Network, config.ResolvConf, log)
	if err != nil {
		lock.Close()
		return nil, err
	}
	l, err := net.Listen("unix", socket) // the directory's mode keeps others out
	if err == nil {
		err = os.Chmod(socket, 0o600)
	}
	if err != nil {
		seg.close()
		lock.Close()
		return nil, err
	}
	s := &server{seg: seg, l: l, lock: lock, end: make(chan struct{})}
	s.idle = time.AfterFunc(linger, s.endIfIdle)
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /v1/endpoints/{id}", s.attach)
	mux.HandleFunc("DELETE /v1/endpoints/{id}", s.detach)
	mux.HandleFunc("GET /v1/endpoints", s.list)
	mux.HandleFunc("GET /v1/watch", s.watch)
	mux.HandleFunc("POST /v1/shutdown", s.shutdown)
	s.http = &http.Server{Handler: mux}
	go s.http.Serve(l)
	return s, nil
}

// takeOver locks the directory; a helper that is about to end is waited for.
func takeOver(ctx context.Context, lock *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

func (s *server) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-s.end:
	}
	// Let the shutdown's own answer out; watches would last for ever.
	graceful, cancel := context.WithTimeout(context.WithoutCancel(ctx), 50*time.Millisecond)
	defer cancel()
	if s.http.Shutdown(graceful) != nil {
		s.http.Close()
	}
	s.seg.close()
	return s.lock.Close()
}

func (s *server) attach(w http.ResponseWriter, r *http.Request) {
	var e network.Endpoint
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a, err := s.seg.attach(e)
	if err != nil {
		writeFault(w, err)
		return
	}
	json.NewEncoder(w).Encode(a)
}

func (s *server) detach(w http.ResponseWriter, r *http.Request) {
	s.seg.detach(r.PathValue("id"))
	s.rearm()
}

func (s *server) list(w http.ResponseWriter, _ *http.Request) {
	json.NewEncoder(w).Encode(s.seg.list())
}

func (s *server) watch(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.watchers++
	s.mu.Unlock()
	w.WriteHeader(http.StatusOK)
	http.NewResponseController(w).Flush()
	select {
	case <-r.Context().Done():
	case <-s.end:
	}
	s.mu.Lock()
	s.watchers--
	s.mu.Unlock()
	s.rearm()
}

func (s *server) shutdown(w http.ResponseWriter, _ *http.Request) {
	if len(s.seg.list()) == 0 {
		s.finish()
	}
}

func (s *server) rearm() { s.idle.Reset(linger) }

func (s *server) endIfIdle() {
	s.mu.Lock()
	watched := s.watchers > 0
	s.mu.Unlock()
	if !watched && len(s.seg.list()) == 0 {
		s.finish()
	}
}

func (s *server) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.ended = true
		s.l.Close() // at once, so that the next driver starts a helper of its own
		close(s.end)
	}
}
