//go:build linux

// Package build makes an image from a Dockerfile with BuildKit, which runs in a child process (package child) that is started at the
// first build. The image's blobs end in the image store's content; naming them there is the caller's. With child and progress it is
// the only importer of BuildKit. A Builder may be used from several goroutines; imported by daemon and server.
package build

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/image"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options is what a Builder needs of the rest of the system.
type Options struct {
	Dir             string                     // BuildKit's state and the child's log
	Child           []string                   // the argv that starts the child; flags are appended
	ContentDir      string                     // root of the image store's containerd local content store
	Registry        http.Handler               // the image store as an OCI distribution API; the registry's name is in ns=
	KnownBase       func(reference.Named) bool // whether `atoll base build` can make it; nil: none
	DockerConfigDir string                     // credentials for registries; empty: Docker's own default
	Registries      map[string]image.Registry  // how they are reached, by host[:port]
	Proxy           Proxy                      // for RUN steps, and for what the builder fetches itself
	CA              []string                   // PEM files of more certificate authorities, for the same
	CacheSize       int64                      // bytes that the cache may grow to; 0: 10 GB or a fifth of the disk, whichever is less
	Timeout         time.Duration              // of a build that sets none itself; 0: none
	// VM describes the virtual machine of a build that asks for one, or says why there can be none; nil: there is none.
	VM  func(context.Context) (child.Isolation, error)
	Log *slog.Logger
}

// Proxy is how the outside is reached; empty fields are unset.
type Proxy struct{ HTTP, HTTPS, No string }

// variables are the proxy's environment variables, in both spellings: programs differ in which they read.
func (p Proxy) variables() map[string]string {
	all := map[string]string{}
	for name, value := range map[string]string{"HTTP_PROXY": p.HTTP, "HTTPS_PROXY": p.HTTPS, "NO_PROXY": p.No} {
		if value != "" {
			all[name], all[strings.ToLower(name)] = value, value
		}
	}
	return all
}

// Builder runs builds in one child.
type Builder struct {
	o Options

	mu      sync.Mutex // guards the rest
	running *process
	builds  int  // under way
	leaks   bool // the child holds what a cancelled build has left
	closed  bool
}

// New returns a builder. The child starts with the first build.
func New(o Options) *Builder { return &Builder{o: o} }

// Result is what a build made.
type Result struct {
	Manifest ocispec.Descriptor // of the image in the content store; none for a Request with NoImage
	Metadata map[string]string  // what BuildKit's exporters say, as containerimage.digest
	Solve    time.Duration      // BuildKit's own share
}

// Report is the answer of a build that only asks.
type Report struct {
	Text     string
	JSON     []byte
	ExitCode int // not 0: there is something to mend
}

// Status is BuildKit's progress, as JSON what progress.Printer takes.
type Status = client.SolveStatus

// Build makes the image and returns when all its blobs are in the image store. status, when not nil, is called from one goroutine
// with BuildKit's progress. Until the caller has named the image, nothing but the caller's lease holds its blobs against garbage
// collection of the image store.
func (b *Builder) Build(ctx context.Context, r Request, status func(*Status)) (Result, error) {
	res := Result{Metadata: map[string]string{}}
	err := b.run(ctx, r, status, func(ctx context.Context, c *client.Client, opt client.SolveOpt, statuses chan *client.SolveStatus) error {
		start := time.Now()
		resp, err := c.Solve(ctx, nil, opt, statuses)
		res.Solve = time.Since(start)
		if err != nil {
			return err
		}
		for k, v := range resp.ExporterResponse {
			if k != child.DescriptorKey {
				res.Metadata[k] = v
			}
		}
		if r.NoImage {
			return nil
		}
		if err := json.Unmarshal([]byte(resp.ExporterResponse[child.DescriptorKey]), &res.Manifest); err != nil {
			return fmt.Errorf("reading the builder's answer: %w", err)
		}
		return nil
	})
	if err != nil {
		return Result{}, fmt.Errorf("building %s: %w", r.context(), err)
	}
	return res, nil
}

// Ask answers a question about the Dockerfile and builds nothing: "check" lints it, "outline" lists its arguments, secrets and SSH
// agents, "targets" its stages.
func (b *Builder) Ask(ctx context.Context, r Request, question string, status func(*Status)) (Report, error) {
	requests := map[string]string{"check": "frontend.lint", "outline": "frontend.outline", "targets": "frontend.targets"}
	id, ok := requests[question]
	if !ok {
		return Report{}, fmt.Errorf("asking a Dockerfile for %q: want check, outline or targets: %w", question, errdefs.ErrInvalidArgument)
	}
	r.NoImage, r.Outputs, r.CacheTo, r.Isolation = true, nil, nil, "" // nothing runs
	var report Report
	err := b.run(ctx, r, status, func(ctx context.Context, c *client.Client, opt client.SolveOpt, statuses chan *client.SolveStatus) error {
		frontend, attrs := opt.Frontend, opt.FrontendAttrs
		attrs["requestid"] = id
		_, err := c.Build(ctx, opt, "atoll", func(ctx context.Context, g gateway.Client) (*gateway.Result, error) {
			res, err := g.Solve(ctx, gateway.SolveRequest{Frontend: frontend, FrontendOpt: attrs})
			if err != nil {
				return nil, err
			}
			report.Text, report.JSON = string(res.Metadata["result.txt"]), res.Metadata["result.json"]
			report.ExitCode, _ = strconv.Atoi(string(res.Metadata["result.statuscode"])) // only a lint has one
			return gateway.NewResult(), nil
		}, statuses)
		return err
	})
	if err != nil {
		return Report{}, fmt.Errorf("%s of %s: %w", question, r.context(), err)
	}
	return report, nil
}

// run lets solve work with the child, follows its statuses and explains its error. solve closes the channel of statuses.
func (b *Builder) run(ctx context.Context, r Request, status func(*Status),
	solve func(context.Context, *client.Client, client.SolveOpt, chan *client.SolveStatus) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if limit := cmp.Or(r.Timeout, b.o.Timeout); limit > 0 {
		defer time.AfterFunc(limit, func() {
			cancel(hint.With(fmt.Errorf("it was not done after %s, the time limit of this build: %w", limit, context.DeadlineExceeded),
				"allow more with --timeout, or with timeout in the section [build] of the settings file"))
		}).Stop()
	}
	opt, done, err := b.solveOpt(ctx, r)
	if err != nil {
		return err
	}
	defer done()
	if err := b.isolate(ctx, r.Isolation, &opt); err != nil {
		return err
	}
	b.count(1, false)
	defer func() { b.count(-1, ctx.Err() != nil) }()
	p, err := b.process(ctx)
	if err != nil {
		return err
	}
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
			for _, v := range s.Vertexes {
				v.Name, v.Error = redactAll(v.Name), redactAll(v.Error)
			}
			steps.follow(s)
			if status != nil {
				status(s)
			}
		}
	}()
	err = solve(ctx, p.client, opt, statuses)
	<-followed
	if err != nil {
		return b.explain(ctx, p, steps, r, err)
	}
	return nil
}

// count keeps in mind how many builds there are, and whether one was cancelled.
func (b *Builder) count(more int, cancelled bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.builds += more
	b.leaks = b.leaks || cancelled
}

// letGo ends a child that no build needs and that holds on to the snapshots of a cancelled build: BuildKit (v0.33) lets go of them in
// finalizers that may never run, and until then nothing of them can be pruned.
func (b *Builder) letGo() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running == nil || b.builds > 0 || !b.leaks {
		return nil
	}
	err := b.running.stop()
	b.running = nil
	return err
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
	b.running, b.leaks = p, false
	return p, nil
}

// Recover ends what builds of a killed daemon and its killed builder left running. It does nothing where there is nothing.
func (b *Builder) Recover(ctx context.Context) error {
	if !child.NeedsCleaning(b.o.Dir) {
		return nil
	}
	runc, err := exec.LookPath("runc")
	if err == nil {
		err = child.Clean(ctx, b.o.Dir, runc)
	}
	if err != nil {
		return fmt.Errorf("cleaning up after an earlier builder: %w", err)
	}
	return nil
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
