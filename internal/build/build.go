//go:build linux

// Package build makes an image from a Dockerfile with BuildKit, which runs in a child process (package child) that is started at the
// first build. The image's blobs end in the image store's content; naming them there is the caller's. With child and progress it is
// the only importer of BuildKit. A Builder may be used from several goroutines; imported by daemon and server.
package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
)

// Options is what a Builder needs of the rest of the system.
type Options struct {
	Dir             string                     // BuildKit's state and the child's log
	Child           []string                   // the argv that starts the child; flags are appended
	ContentDir      string                     // root of the image store's containerd local content store
	Registry        http.Handler               // the image store as an OCI distribution API; the registry's name is in ns=
	KnownBase       func(reference.Named) bool // whether `atoll base build` can make it; nil: none
	DockerConfigDir string                     // credentials for registries; empty: Docker's own default
	// VM describes the virtual machine of a build that asks for one, or says why there can be none; nil: there is none.
	VM  func(context.Context) (child.Isolation, error)
	Log *slog.Logger
}

// Builder runs builds in one child.
type Builder struct {
	o Options

	mu      sync.Mutex // guards the rest
	running *process
	closed  bool
}

// New returns a builder. The child starts with the first build.
func New(o Options) *Builder { return &Builder{o: o} }

// Request is one build.
type Request struct {
	ContextDir string // absolute
	Dockerfile string // a relative path starts at ContextDir; empty: Dockerfile
	Target     string
	BuildArgs  map[string]string
	Labels     map[string]string
	NoCache    bool
	Pull       bool   // ask the registry what tags in FROM stand for, not the image store
	Platform   string // empty: the host's
	Isolation  string // where RUN steps run: IsolationHost (or empty), IsolationVM
}

// Result is an image in the content store.
type Result struct {
	Manifest ocispec.Descriptor
	Solve    time.Duration // BuildKit's own share
}

// Status is BuildKit's progress, as JSON what progress.Printer takes.
type Status = client.SolveStatus

// Build makes the image and returns when all its blobs are in the image store. status, when not nil, is called from one goroutine
// with BuildKit's progress. Until the caller has named the image, nothing but the caller's lease holds its blobs against garbage
// collection of the image store.
func (b *Builder) Build(ctx context.Context, r Request, status func(*Status)) (Result, error) {
	res, err := b.build(ctx, r, status)
	if err != nil {
		return Result{}, fmt.Errorf("building %s: %w", r.ContextDir, err)
	}
	return res, nil
}

func (b *Builder) build(ctx context.Context, r Request, status func(*client.SolveStatus)) (Result, error) {
	opt, err := b.solveOpt(r)
	if err != nil {
		return Result{}, err
	}
	if err := b.isolate(ctx, r.Isolation, &opt); err != nil {
		return Result{}, err
	}
	p, err := b.process(ctx)
	if err != nil {
		return Result{}, err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	solved := make(chan struct{})
	defer close(solved)
	go func() {
		select {
		case <-p.done:
			cancel(p.err)
		case <-solved:
		}
	}()

	steps := newSteps()
	statuses := make(chan *client.SolveStatus)
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		for s := range statuses {
			steps.follow(s)
			if status != nil {
				status(s)
			}
		}
	}()
	start := time.Now()
	resp, err := p.client.Solve(ctx, nil, opt, statuses)
	took := time.Since(start)
	<-followed
	if err != nil {
		return Result{}, b.explain(ctx, p, steps, err)
	}
	var res Result
	if err := json.Unmarshal([]byte(resp.ExporterResponse[child.DescriptorKey]), &res.Manifest); err != nil {
		return Result{}, fmt.Errorf("reading the builder's answer: %w", err)
	}
	res.Solve = took
	return res, nil
}

// solveOpt checks the request and puts it in BuildKit's words.
func (b *Builder) solveOpt(r Request) (client.SolveOpt, error) {
	if info, err := os.Stat(r.ContextDir); err != nil {
		return client.SolveOpt{}, hint.With(errdefs.ErrInvalidArgument.WithMessage("build context: "+err.Error()),
			"give the directory that holds your Dockerfile: atoll build -t name DIR")
	} else if !info.IsDir() {
		return client.SolveOpt{}, hint.With(errdefs.ErrInvalidArgument.WithMessage("build context: it is not a directory"),
			"give the directory that holds your Dockerfile: atoll build -t name DIR")
	}
	dockerfile := r.Dockerfile
	if dockerfile == "" {
		dockerfile = "Dockerfile"
	}
	if !filepath.IsAbs(dockerfile) {
		dockerfile = filepath.Join(r.ContextDir, dockerfile)
	}
	if info, err := os.Stat(dockerfile); err != nil {
		return client.SolveOpt{}, hint.With(errdefs.ErrInvalidArgument.WithMessage("Dockerfile: "+err.Error()),
			"name it with -f, or create %s", dockerfile)
	} else if info.IsDir() {
		return client.SolveOpt{}, hint.With(errdefs.ErrInvalidArgument.WithMessage("Dockerfile: "+dockerfile+" is a directory"),
			"name the file with -f")
	}
	if err := checkPlatform(r.Platform); err != nil {
		return client.SolveOpt{}, err
	}

	contextFS, err := fsutil.NewFS(r.ContextDir)
	if err != nil {
		return client.SolveOpt{}, err
	}
	dockerfileFS, err := fsutil.NewFS(filepath.Dir(dockerfile))
	if err != nil {
		return client.SolveOpt{}, err
	}
	credentialFile, err := config.Load(b.o.DockerConfigDir)
	if err != nil {
		return client.SolveOpt{}, fmt.Errorf("reading the registries' credentials: %w", err)
	}
	return client.SolveOpt{
		Exports:     []client.ExportEntry{{Type: child.ExporterName}},
		LocalMounts: map[string]fsutil.FS{"context": contextFS, "dockerfile": dockerfileFS},
		// Files of an earlier build of the same context are not sent again.
		SharedKey:           r.ContextDir,
		Frontend:            "dockerfile.v0",
		FrontendAttrs:       frontendAttrs(r, filepath.Base(dockerfile)),
		Session:             []session.Attachable{&credentials{file: credentialFile}},
		AllowedEntitlements: []string{"network.host"},
		// Leave no record in BuildKit's history: we keep our own.
		Internal: true,
	}, nil
}

func frontendAttrs(r Request, dockerfile string) map[string]string {
	attrs := map[string]string{
		"filename":           dockerfile,
		"target":             r.Target,
		"image-resolve-mode": "local",
		"force-network-mode": "host",
		// Its presence alone keeps the built-in frontend: a `# syntax=` line would fetch an image.
		"cmdline": "",
	}
	if r.Pull {
		attrs["image-resolve-mode"] = "pull"
	}
	if r.NoCache {
		attrs["no-cache"] = ""
	}
	for k, v := range r.BuildArgs {
		attrs["build-arg:"+k] = v
	}
	for k, v := range r.Labels {
		attrs["label:"+k] = v
	}
	return attrs
}

// checkPlatform refuses what this host cannot run: RUN steps are executed, not emulated.
func checkPlatform(name string) error {
	if name == "" {
		return nil
	}
	want, err := platforms.Parse(name)
	if err != nil {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("platform %q: %v", name, err))
	}
	if host := platforms.DefaultSpec(); !platforms.OnlyStrict(host).Match(want) {
		return hint.With(fmt.Errorf("platform %s: this host builds for %s only: %w", name, platforms.Format(host), errdefs.ErrInvalidArgument),
			"leave --platform out, or build on a host of that architecture")
	}
	return nil
}

// process returns the running child, or starts one.
func (b *Builder) process(ctx context.Context) (*process, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("the builder is closed: %w", errdefs.ErrUnavailable)
	}
	if b.running != nil {
		select {
		case <-b.running.done:
		default:
			return b.running, nil
		}
	}
	p, err := start(ctx, b.o)
	if err != nil {
		return nil, fmt.Errorf("starting the builder: %w", err)
	}
	b.running = p
	return p, nil
}

// Close ends the child and with it every build, and waits. It may be called more than once.
func (b *Builder) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.running == nil {
		return nil
	}
	err := b.running.stop()
	b.running = nil
	return err
}

var errClosed = errors.New("the builder was closed")
