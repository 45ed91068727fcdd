//go:build linux

package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/docker/cli/cli/config"
	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/tonistiigi/fsutil"
)

// Request is one build. The context is a directory, a URL or a stream.
type Request struct {
	ContextDir    string    // absolute
	ContextURL    string    // a git repository, or http(s) of a Dockerfile or an archive
	ContextStream io.Reader // an archive, compressed or not, or a Dockerfile alone; read before the build begins

	Dockerfile     string // a relative path starts at the context; empty: Dockerfile
	DockerfileText []byte // instead of a file
	Target         string
	BuildArgs      map[string]string
	Labels         map[string]string
	Contexts       map[string]string // named contexts: dir:PATH, docker-image://REFERENCE, oci-layout://PATH[:TAG][@DIGEST], or a URL
	NoCache        bool
	NoCacheStages  []string
	Pull           bool   // ask the registry what tags in FROM stand for, not the image store
	Platform       string // empty: the host's
	Isolation      string // where RUN steps run: IsolationHost (or empty), IsolationVM
	Network        string // of RUN: "host" or "none"; empty: host
	AddHosts       []string
	ShmSize        int64
	Ulimits        []string

	Secrets map[string][]byte
	Agents  map[string]Dial // SSH agents by ID

	CacheTo   []CacheOption
	CacheFrom []CacheOption
	Outputs   []Output
	NoImage   bool // nothing goes to the image store
	Timeout   time.Duration
	Quiet     bool // nobody sees the statuses: the error has the output of the step that failed
}

// CacheOption is a place for BuildKit's cache: a registry, a local directory, or inline in the image.
type CacheOption struct {
	Type  string
	Attrs map[string]string
}

// Output is a file that BuildKit writes of the result.
type Output struct {
	Type  string // oci, docker or tar
	Attrs map[string]string
	Open  func() (io.WriteCloser, error)
}

// maxSecret is BuildKit's own bound.
const maxSecret = secretsprovider.MaxSecretSize

// context names what is built in messages, without passwords.
func (r Request) context() string {
	switch {
	case r.ContextURL != "":
		return redact(r.ContextURL)
	case r.ContextStream != nil:
		return "from a stream"
	}
	return r.ContextDir
}

// check gathers every fault that shows without looking at files.
func (r Request) check() error {
	var faults []error
	fault := func(format string, values ...any) { faults = append(faults, fmt.Errorf(format, values...)) }
	contexts := 0
	for _, given := range []bool{r.ContextDir != "", r.ContextURL != "", r.ContextStream != nil} {
		if given {
			contexts++
		}
	}
	if contexts != 1 {
		fault("build context: give one directory, URL or stream")
	}
	switch r.Network {
	case "", "host", "none":
	default:
		fault("network %q: want host or none", r.Network)
	}
	if r.ShmSize < 0 {
		fault("size of /dev/shm %d: it is negative", r.ShmSize)
	}
	for _, h := range r.AddHosts {
		if name, ip, ok := strings.Cut(h, "="); !ok || name == "" || net.ParseIP(ip) == nil {
			fault("host %q: write it as NAME=ADDRESS", h)
		}
	}
	for _, u := range r.Ulimits {
		if _, err := units.ParseUlimit(u); err != nil {
			fault("ulimit %q: %v", u, err)
		}
	}
	if r.Isolation == IsolationVM && len(r.Ulimits) > 0 {
		fault("a ulimit is not available with --isolation vm")
	}
	for id, value := range r.Secrets {
		if len(value) > maxSecret {
			fault("secret %q has %d bytes: at most %d are possible", id, len(value), maxSecret)
		}
	}
	for _, c := range r.CacheTo {
		faults = append(faults, c.check("to", "dest", "registry", "local", "inline")...)
	}
	for _, c := range r.CacheFrom {
		faults = append(faults, c.check("from", "src", "registry", "local")...)
	}
	if len(faults) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", errors.Join(faults...), errdefs.ErrInvalidArgument)
}

func (c CacheOption) check(way, dir string, types ...string) []error {
	switch {
	case !slices.Contains(types, c.Type):
		return []error{fmt.Errorf("cache %s %q: want type=%s", way, c.Type, strings.Join(types, ", "))}
	case c.Type == "registry" && c.Attrs["ref"] == "":
		return []error{fmt.Errorf("cache %s a registry: ref=REFERENCE is missing", way)}
	case c.Type == "local" && !filepath.IsAbs(c.Attrs[dir]):
		return []error{fmt.Errorf("cache %s a directory: %s=%q is no absolute path", way, dir, c.Attrs[dir])}
	}
	return nil
}

// solveOpt checks the request and puts it in BuildKit's words. done is called when the build has ended.
func (b *Builder) solveOpt(ctx context.Context, r Request) (_ client.SolveOpt, done func(), err error) {
	if err := r.check(); err != nil {
		return client.SolveOpt{}, nil, err
	}
	if err := checkPlatform(r.Platform); err != nil {
		return client.SolveOpt{}, nil, err
	}
	credentialFile, err := config.Load(b.o.DockerConfigDir)
	if err != nil {
		return client.SolveOpt{}, nil, fmt.Errorf("reading the registries' credentials: %w", err)
	}
	opt := client.SolveOpt{
		LocalMounts:         map[string]fsutil.FS{},
		OCIStores:           map[string]content.Store{},
		Frontend:            "dockerfile.v0",
		FrontendAttrs:       b.frontendAttrs(r),
		Session:             []session.Attachable{&credentials{file: credentialFile}, agents(r.Agents), secretsprovider.FromMap(r.Secrets)},
		AllowedEntitlements: []string{"network.host"},
		CacheExports:        cacheEntries(r.CacheTo),
		CacheImports:        cacheEntries(r.CacheFrom),
		// Leave no record in BuildKit's history: we keep our own.
		Internal: true,
	}
	done, err = b.setContext(ctx, r, &opt)
	if err != nil {
		return client.SolveOpt{}, nil, err
	}
	if err := setContexts(r.Contexts, &opt); err != nil {
		done()
		return client.SolveOpt{}, nil, err
	}
	if !r.NoImage {
		opt.Exports = append(opt.Exports, client.ExportEntry{Type: child.ExporterName})
	}
	for _, o := range r.Outputs {
		opt.Exports = append(opt.Exports, client.ExportEntry{
			Type: o.Type, Attrs: o.Attrs, Output: func(map[string]string) (io.WriteCloser, error) { return o.Open() },
		})
	}
	return opt, done, nil
}

func cacheEntries(options []CacheOption) []client.CacheOptionsEntry {
	var entries []client.CacheOptionsEntry
	for _, o := range options {
		entries = append(entries, client.CacheOptionsEntry{Type: o.Type, Attrs: o.Attrs})
	}
	return entries
}

func (b *Builder) frontendAttrs(r Request) map[string]string {
	attrs := map[string]string{
		"target":             r.Target,
		"image-resolve-mode": "local",
		"force-network-mode": "host",
		// Its presence alone keeps the built-in frontend: a `# syntax=` line would fetch an image.
		"cmdline": "",
	}
	set := func(key, value string) {
		if value != "" {
			attrs[key] = value
		}
	}
	set("force-network-mode", r.Network)
	set("platform", r.Platform)
	set("add-hosts", strings.Join(r.AddHosts, ","))
	set("ulimit", strings.Join(r.Ulimits, ","))
	if r.ShmSize > 0 {
		attrs["shm-size"] = strconv.FormatInt(r.ShmSize, 10)
	}
	if r.Pull {
		attrs["image-resolve-mode"] = "pull"
	}
	set("no-cache", strings.Join(r.NoCacheStages, ","))
	if r.NoCache {
		attrs["no-cache"] = "" // of every stage
	}
	// As Docker does: predefined ARGs, which are in no history and in no cache key.
	for name, value := range b.o.Proxy.variables() {
		attrs["build-arg:"+name] = value
	}
	for k, v := range r.BuildArgs {
		if b.o.Proxy.variables()[k] != "" { // an own proxy, or none: in both spellings
			attrs["build-arg:"+strings.ToLower(k)], attrs["build-arg:"+strings.ToUpper(k)] = v, v
		}
		attrs["build-arg:"+k] = v
	}
	for k, v := range r.Labels {
		attrs["label:"+k] = v
	}
	return attrs
}

// checkPlatform refuses what is no platform. One that this host cannot run is fine as long as there is no RUN.
func checkPlatform(name string) error {
	if name == "" {
		return nil
	}
	if strings.Contains(name, ",") {
		return hint.With(fmt.Errorf("platform %q: one at a time: %w", name, errdefs.ErrInvalidArgument), "build once for each platform")
	}
	if _, err := platforms.Parse(name); err != nil {
		return hint.With(errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("platform %q: %v", name, err)), "write it as OS/ARCH[/VARIANT], as linux/arm64")
	}
	return nil
}

// localDockerfile finds the Dockerfile of a context that is a directory.
func localDockerfile(contextDir, file string) (string, error) {
	given := file != ""
	if !given {
		file = "Dockerfile"
	}
	if !filepath.IsAbs(file) {
		file = filepath.Join(contextDir, file)
	}
	info, err := os.Stat(file)
	if err != nil && !given {
		// As Docker does.
		if lower := filepath.Join(contextDir, "dockerfile"); isFile(lower) {
			return lower, nil
		}
	}
	if err != nil {
		return "", hint.With(errdefs.ErrInvalidArgument.WithMessage("Dockerfile: "+err.Error()), "name it with -f, or create %s", file)
	}
	if info.IsDir() {
		return "", hint.With(errdefs.ErrInvalidArgument.WithMessage("Dockerfile: "+file+" is a directory"), "name the file with -f")
	}
	return file, nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// sortedKeys makes faults and walks come in one order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
