// Package user is the network driver that needs no privileges: each network is a TCP/IP stack in a helper process, which serves
// DHCP and DNS, lets machines reach the world through the host's sockets, and publishes their ports. It moves Ethernet frames
// between unix datagram sockets and knows nothing of what sends them.
// The Driver starts helpers, takes running ones over and restarts those that died; RunHelper is a helper's main. A helper lives on
// when its Driver's process dies. Imported by daemon and cmd/atoll. A Driver may be used from several goroutines.
package user

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
)

// Options says where helpers keep their sockets and how they are started.
type Options struct {
	// Dir gets a directory for each network. Keep it short: a unix socket's path ends at 107 bytes.
	Dir string
	// Helper is the command that calls RunHelper with the arguments that are added to it.
	Helper []string
	// ResolvConf names the host's resolvers; read anew for each query.
	ResolvConf string
	Log        *slog.Logger
}

// Driver is network.Driver "user".
type Driver struct {
	o Options

	mu      sync.Mutex // guards the rest
	helpers map[string]*helper
}

var _ network.Driver = (*Driver)(nil)

// New returns the driver; it starts nothing.
func New(o Options) *Driver {
	return &Driver{o: o, helpers: map[string]*helper{}}
}

// Name is the driver's name in network.Network.
func (d *Driver) Name() string { return "user" }

// Attach implements network.Driver.
func (d *Driver) Attach(ctx context.Context, n network.Network, e network.Endpoint) (network.Attachment, error) {
	h := d.helper(n)
	h.mu.Lock()
	defer h.mu.Unlock()
	a, err := h.attachLocked(ctx, e)
	if errors.Is(err, errNoHelper) { // it ended in between
		a, err = h.attachLocked(ctx, e)
	}
	if err != nil {
		return network.Attachment{}, fmt.Errorf("attaching %q to network %q: %w", e.Name, n.Name, err)
	}
	return a, nil
}

// Detach implements network.Driver. The helper stays, so that the next machine need not wait for its start.
func (d *Driver) Detach(ctx context.Context, n network.Network, endpointID string) error {
	h := d.helper(n)
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.endpoints, endpointID)
	if err := h.client.detach(ctx, endpointID); err != nil && !errors.Is(err, errNoHelper) {
		return fmt.Errorf("detaching %s from network %q: %w", endpointID, n.Name, err)
	}
	return nil
}

// Recover implements network.Driver. Endpoints should come with the ports as they were bound, else a helper that died gets
// other ones where the choice was the driver's.
func (d *Driver) Recover(ctx context.Context, n network.Network, endpoints []network.Endpoint) error {
	h := d.helper(n)
	h.mu.Lock()
	defer h.mu.Unlock()
	attached, err := h.client.list(ctx)
	if err != nil && !errors.Is(err, errNoHelper) {
		return fmt.Errorf("recovering network %q: %w", n.Name, err)
	}
	var errs []error
	for _, id := range attached {
		if !slices.ContainsFunc(endpoints, func(e network.Endpoint) bool { return e.ID == id }) {
			errs = append(errs, h.client.detach(ctx, id))
		}
	}
	for _, e := range endpoints {
		if _, err := h.attachLocked(ctx, e); err != nil {
			errs = append(errs, fmt.Errorf("attaching %q: %w", e.Name, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("recovering network %q: %w", n.Name, err)
	}
	return nil
}

// Close implements network.Driver: helpers without endpoints end, the others run on.
func (d *Driver) Close() error {
	d.mu.Lock()
	helpers := d.helpers
	d.helpers = map[string]*helper{}
	d.mu.Unlock()
	for _, h := range helpers {
		h.close()
	}
	return nil
}

func (d *Driver) helper(n network.Network) *helper {
	d.mu.Lock()
	defer d.mu.Unlock()
	h, ok := d.helpers[n.Name]
	if !ok {
		dir := filepath.Join(d.o.Dir, n.Name)
		h = &helper{
			o:         d.o,
			network:   n,
			dir:       dir,
			client:    newClient(filepath.Join(dir, controlSocket)),
			log:       d.o.Log.With("network", n.Name),
			endpoints: map[string]network.Endpoint{},
		}
		d.helpers[n.Name] = h
	}
	return h
}

// helper is the driver's side of one network's process.
type helper struct {
	o       Options
	network network.Network
	dir     string
	client  *client
	log     *slog.Logger

	mu        sync.Mutex // guards the rest, and orders the calls to the helper
	endpoints map[string]network.Endpoint
	stop      context.CancelFunc // ends the watch; nil when there is none
	watching  sync.WaitGroup
}

// attachLocked also notes the ports as bound, so that a restarted helper binds the same ones.
func (h *helper) attachLocked(ctx context.Context, e network.Endpoint) (network.Attachment, error) {
	if err := h.runLocked(ctx); err != nil {
		return network.Attachment{}, err
	}
	a, err := h.client.attach(ctx, e)
	if err != nil {
		delete(h.endpoints, e.ID)
		return a, err
	}
	e.Ports = a.Ports
	h.endpoints[e.ID] = e
	return a, nil
}

// runLocked makes sure that the helper answers and that its end is seen.
func (h *helper) runLocked(ctx context.Context) error {
	w, err := h.reachLocked(ctx)
	if err != nil {
		return err
	}
	if h.stop != nil { // another watch sees to it already
		return w.Close()
	}
	watchCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	h.stop = stop
	h.watching.Go(func() { h.watch(watchCtx, w) })
	return nil
}

// reachLocked returns the stream that ends with the helper, which it starts where none runs.
func (h *helper) reachLocked(ctx context.Context) (io.ReadCloser, error) {
	w, err := h.client.watch(ctx)
	if !errors.Is(err, errNoHelper) {
		return w, err
	}
	if err := h.startLocked(ctx); err != nil {
		return nil, err
	}
	return h.client.watch(ctx)
}

// watch returns when ctx ends, or when the helper is gone and is not needed.
func (h *helper) watch(ctx context.Context, w io.ReadCloser) {
	for {
		if w != nil {
			unhook := context.AfterFunc(ctx, func() { w.Close() })
			io.Copy(io.Discard, w) // to the helper's end
			unhook()
			w.Close()
		}
		if ctx.Err() != nil {
			return
		}
		next, done := h.restart(ctx)
		if done {
			return
		}
		w = next
	}
}

// restart brings the helper back with all its endpoints, and returns no stream where it has to be tried again. Without
// endpoints, the watch is done.
func (h *helper) restart(ctx context.Context) (w io.ReadCloser, done bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.endpoints) == 0 {
		h.stop = nil
		return nil, true
	}
	h.log.Warn("network helper died, restarting it", "endpoints", len(h.endpoints))
	w, err := h.reachLocked(ctx)
	if err != nil {
		h.log.Error("restarting network helper failed, trying again", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
		return nil, false
	}
	for _, e := range h.endpoints {
		if _, err := h.client.attach(ctx, e); err != nil {
			h.log.Error("attaching a machine to the restarted network failed", "machine", e.ID, "error", err)
		}
	}
	return w, false
}

// helperConfig is what a helper reads from its directory.
type helperConfig struct {
	Network    network.Network
	ResolvConf string
}

const (
	configFile    = "helper.json"
	logFile       = "helper.log"
	controlSocket = "control.sock"
	maxSocketPath = 107
	readyFD       = 3 // the helper writes readyWord, or why it could not start, and closes it
	readyWord     = "ready"
)

func (h *helper) startLocked(ctx context.Context) error {
	fail := func(err error) error { return fmt.Errorf("starting network helper: %w", err) }
	if longest := filepath.Join(h.dir, "255.255.255.255.vmm"); len(longest) > maxSocketPath {
		err := fmt.Errorf("socket path %s is longer than %d bytes: %w", longest, maxSocketPath, errdefs.ErrInvalidArgument)
		return hint.With(fail(err), "choose a shorter state directory")
	}
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return fail(err)
	}
	config, err := json.Marshal(helperConfig{h.network, h.o.ResolvConf})
	if err != nil {
		return fail(err)
	}
	if err := os.WriteFile(filepath.Join(h.dir, configFile), config, 0o600); err != nil {
		return fail(err)
	}
	log, err := os.OpenFile(filepath.Join(h.dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fail(err)
	}
	defer log.Close()
	ready, readyW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer ready.Close()
	cmd := exec.Command(h.o.Helper[0], append(slices.Clone(h.o.Helper[1:]), h.dir)...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{readyW}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	readyW.Close()
	if err != nil {
		return fail(err)
	}
	// Reaped here when it ends before this process; the watch tells the driver.
	go cmd.Wait()

	unhook := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })
	defer unhook()
	said, err := io.ReadAll(ready)
	switch {
	case err != nil:
		err = errors.Join(ctx.Err(), err)
	case len(said) == 0:
		err = fmt.Errorf("it ended at once, see %s", log.Name())
	case string(said) != readyWord:
		err = errors.New(string(said))
	}
	if err != nil {
		cmd.Process.Kill()
		return fail(err)
	}
	return nil
}

func (h *helper) close() {
	h.mu.Lock()
	stop := h.stop
	if len(h.endpoints) == 0 {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		if err := h.client.shutdown(ctx); err != nil && !errors.Is(err, errNoHelper) {
			h.log.Warn("ending an idle network helper failed", "error", err)
		}
		cancel()
	}
	h.mu.Unlock()
	if stop != nil {
		stop()
	}
	h.watching.Wait()
	h.client.close()
}

// socketPaths names an endpoint's pair by its address, which is short and unique on the network.
func socketPaths(dir string, addr netip.Addr) (local, remote string) {
	base := filepath.Join(dir, addr.String())
	return base + ".vmm", base + ".net"
}
