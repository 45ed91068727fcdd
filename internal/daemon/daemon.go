//go:build linux

// Package daemon builds the system from its rooms, starts it and stops it in order. It alone knows all of them.
//
// Order of locks, first to last: machine.Machines.mu, machine.entry.mu; the other rooms' locks are never held while calling out.
package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/atollvm/atoll/internal/base"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/network/user"
	"github.com/atollvm/atoll/internal/profile"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/atollvm/atoll/internal/server"
	"github.com/atollvm/atoll/internal/state"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/atollvm/atoll/internal/vmm/qemu"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Config is what a daemon is told.
type Config struct {
	Home            string
	Socket          string
	Exe             string // this program, for the helper processes
	DockerConfigDir string
	Settings        config.Settings
	Version         string
	Commit          string
	Log             *slog.Logger
}

// Names of the helper commands: cmd/atoll gives them to the CLI, hidden.
const (
	BuildChild    = "build-child"
	NetworkHelper = "network-helper"
)

// Run serves until ctx ends or a client asks for the end. Machines run on.
func Run(ctx context.Context, c Config) (err error) {
	if err := os.MkdirAll(c.Home, 0o700); err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	// The state file's lock makes this daemon the one owner of the home; nothing is touched before it is held.
	db, err := openState(ctx, c)
	if errors.Is(err, errdefs.ErrUnavailable) {
		err = hint.With(fmt.Errorf("starting the daemon: another one owns %s: %w", c.Home, err), "use that one, or another ATOLL_HOME")
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()

	s, err := assemble(c, db)
	if err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	defer func() { err = errors.Join(err, s.close()) }()
	s.machines.Recover(ctx)
	if err := s.builder.Recover(ctx); err != nil {
		c.Log.Error("recovering from a killed daemon", "err", err)
	}
	if err := s.removeOrphans(ctx); err != nil {
		c.Log.Error("removing root disks without an image", "err", err)
	}
	// The probe may run a guest for a second: now, and not when the first machine waits for it.
	go func() { _, _ = s.qemu.Probe(ctx) }()
	return s.serve(ctx, c)
}

type system struct {
	tmp      string // for files on their way
	events   *event.Bus
	images   *image.Store
	disks    *rootdisk.Store
	kernels  *kernel.Store
	bases    *base.Builder
	builder  *build.Builder
	networks *network.Networks
	userNet  *user.Driver
	qemu     *qemu.Driver
	machines *machine.Machines
	profiles *profile.Store
}

func assemble(c Config, db *state.DB) (*system, error) {
	at := func(name string) string { return filepath.Join(c.Home, name) }
	s := &system{tmp: at("tmp"), events: event.New()}
	if err := os.MkdirAll(s.tmp, 0o755); err != nil {
		return nil, err
	}
	var err error
	s.images, err = image.Open(image.Options{
		Dir: at("images"), DB: db, DockerConfigDir: c.DockerConfigDir, Registries: registriesOf(c.Settings),
		Proxy: image.Proxy{HTTP: c.Settings.Proxy.HTTP, HTTPS: c.Settings.Proxy.HTTPS, No: c.Settings.Proxy.No}, CA: c.Settings.TLS.CA,
		Events: s.events, Log: c.Log,
	})
	if err != nil {
		return nil, err
	}
	if s.disks, err = rootdisk.Open(at("rootdisks"), c.Log); err != nil {
		return nil, err
	}
	s.kernels, err = kernel.Open(kernel.Options{Dir: at("kernels"), DB: db, Cache: at("cache"), Events: s.events, Log: c.Log})
	if err != nil {
		return nil, err
	}
	s.bases = base.New(base.Config{Content: s.images.Content(), TempDir: s.tmp, Cache: at("cache"), Log: c.Log, Pull: s.pullBase})
	s.builder = build.New(build.Options{
		Dir: at("build"), Child: []string{c.Exe, BuildChild}, ContentDir: at("images"), Registry: s.images.Handler(),
		KnownBase: func(r reference.Named) bool { return isBase(reference.FamiliarString(r)) }, DockerConfigDir: c.DockerConfigDir,
		Registries: registriesOf(c.Settings), Proxy: build.Proxy(c.Settings.Proxy), CA: c.Settings.TLS.CA,
		CacheSize: int64(c.Settings.Build.CacheSize), Timeout: time.Duration(c.Settings.Build.Timeout), Log: c.Log,
		VM: func(ctx context.Context) (child.Isolation, error) {
			return s.buildVM(ctx, c.Settings.Build, at("qemu"))
		},
	})
	s.userNet = user.New(user.Options{Dir: at("net"), Helper: []string{c.Exe, NetworkHelper}, ResolvConf: "/etc/resolv.conf", Log: c.Log})
	if s.networks, err = network.Open(db, s.userNet); err != nil {
		return nil, err
	}
	s.qemu = qemu.New(qemu.Options{Dir: at("qemu"), Log: c.Log})

	if s.profiles, err = profile.Open(db, defaultSpec(c.Settings.Machine)); err != nil {
		return nil, err
	}
	hostID, err := hostID(db)
	if err != nil {
		return nil, err
	}
	s.machines, err = machine.Open(machine.Options{
		Fetch: fetching(c.Settings, c.Log), ProvisionPatience: time.Duration(c.Settings.Machine.ProvisionTimeout),
		Dir: at("machines"), Host: hostID, BootID: bootID(), DB: db,
		Drivers: map[string]vmm.Driver{"auto": s.qemu, "qemu": s.qemu},
		Images:  &imagesOf{s}, Disks: &disksOf{s}, Kernels: &kernelsOf{s}, Networks: s.networks,
		Events: s.events, Log: c.Log,
	})
	if err != nil {
		return nil, err
	}
	s.images.SetInUse(s.machines.UsersOf)
	s.kernels.SetInUse(s.machines.UsersOfKernel)
	s.images.OnDelete(func(d digest.Digest) {
		if err := s.disks.Remove(d); err != nil {
			c.Log.Error("removing the root disk of a removed image", "image", d, "err", err)
		}
	})
	return s, nil
}

func (s *system) close() error {
	return errors.Join(s.machines.Close(), s.builder.Close(), s.userNet.Close())
}

// serve opens the door and keeps it open until ctx ends.
func (s *system) serve(ctx context.Context, c Config) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	// We own the home, so a socket that is there is a dead daemon's.
	if err := os.Remove(c.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("opening the API socket: %w", err)
	}
	l, err := net.Listen("unix", c.Socket)
	if err != nil {
		return fmt.Errorf("opening the API socket: %w", err)
	}
	if err := os.Chmod(c.Socket, 0o600); err != nil {
		return errors.Join(fmt.Errorf("opening the API socket: %w", err), l.Close())
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	door := &http.Server{
		Handler: server.Handler(server.Options{
			Machines: s.machines, Images: s.images, Disks: &disksOf{s}, Builds: s.builder, Isolation: c.Settings.Build.Isolation, Bases: s.bases, Kernels: s.kernels, Profiles: s.profiles,
			Doctor: func(ctx context.Context) []server.Check { return s.doctor(ctx, c) }, Events: s.events, Shutdown: stop, Log: c.Log,
			Version: server.Version{Version: c.Version, Commit: c.Commit, Home: c.Home},
		}),
		Protocols:         &protocols,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	go func() { served <- door.Serve(l) }()
	c.Log.Info("daemon ready", "home", c.Home, "pid", os.Getpid(), "version", c.Version)
	select {
	case err := <-served:
		return fmt.Errorf("serving the API: %w", err)
	case <-ctx.Done():
	}
	// Calls under way see their context end; they get a moment to undo and answer.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := door.Shutdown(end); err != nil {
		c.Log.Info("cutting off calls that did not end", "err", err)
		_ = door.Close() // its listeners are closed already
	}
	c.Log.Info("daemon ended", "pid", os.Getpid())
	return nil
}

// endingTimeout is how long a daemon that has closed its door may still hold the state.
const endingTimeout = 15 * time.Second

// openState waits for a daemon that is about to end, which shows by its missing socket.
func openState(ctx context.Context, c Config) (*state.DB, error) {
	ctx, cancel := context.WithTimeout(ctx, endingTimeout)
	defer cancel()
	for {
		db, err := state.Open(filepath.Join(c.Home, "atoll.db"))
		if !errors.Is(err, errdefs.ErrUnavailable) || ctx.Err() != nil {
			return db, err
		}
		if _, statErr := os.Stat(c.Socket); statErr == nil {
			return nil, err
		}
	}
}

// removeOrphans removes root disks whose images are gone: a daemon that died between the two steps of a removal leaves them.
func (s *system) removeOrphans(ctx context.Context) error {
	disks, err := s.disks.List()
	if err != nil {
		return err
	}
	release := s.images.Hold()
	defer release()
	for _, d := range disks {
		_, err := s.images.Resolve(ctx, d.ImageDigest.String(), "")
		if errdefs.IsNotFound(err) && len(s.machines.UsersOf(d.ImageDigest)) == 0 {
			err = s.disks.Remove(d.ImageDigest)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func hostID(db *state.DB) (string, error) {
	hosts, err := state.Of[string](db, "host")
	if err != nil {
		return "", err
	}
	id, err := hosts.Get("id")
	if errdefs.IsNotFound(err) {
		b := make([]byte, 16)
		_, _ = rand.Read(b)
		id = hex.EncodeToString(b)
		err = hosts.Put("id", id)
	}
	return id, err
}

// bootID tells one boot of the host from the next.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}
