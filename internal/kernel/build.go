//go:build linux

package kernel

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/hint"
)

// BuildOptions says which kernel to build.
type BuildOptions struct {
	Name     string         // default: atoll-VERSION, with a part of the configuration's digest where Config is given
	Version  string         // of Linux, such as 6.1; default: the source's
	Source   string         // debian (the default), the URL of an archive, or the absolute path of a tree
	SHA256   string         // of the archive behind a URL
	Keyring  []byte         // public keys, one of which signed the archive behind a URL
	Mirror   string         // Debian's; default: debian.DefaultMirror
	Config   []byte         // a fragment on top of our configuration, or a whole .config instead of it
	Arch     string         // amd64 or arm64; default: the host's
	Jobs     int            // at a time; default: the number of CPUs
	Progress func(Transfer) // may be nil
	Line     func(string)   // gets what a person may want to know; may be nil
}

// buildRecipe is part of what a built kernel is known by: another number when the same source and configuration shall be built anew.
const buildRecipe = "1"

// ownArgs is args for our own kernel: CONFIG_DUMMY is built in and would make a network card that nobody asked for.
const ownArgs = args + " dummy.numdummies=0"

const buildLogName = "kernel-build.log"

// Build builds a kernel from verified source and makes it the default, where it is for the host's architecture. The same source, configuration and
// compiler are built once: the second call answers with what is there. A failed build leaves its log in the cache, and nothing else.
func (s *Store) Build(ctx context.Context, o BuildOptions) (Kernel, error) {
	o.Source, o.Arch, o.Jobs = cmp.Or(o.Source, "debian"), cmp.Or(o.Arch, runtime.GOARCH), cmp.Or(o.Jobs, runtime.NumCPU())
	if o.Progress == nil {
		o.Progress = func(Transfer) {}
	}
	if o.Line == nil {
		o.Line = func(string) {}
	}
	if err := o.check(); err != nil {
		return Kernel{}, fmt.Errorf("building a kernel: %w", err)
	}
	if err := s.mayReplace(o.Name); err != nil {
		return Kernel{}, fmt.Errorf("building a kernel: %w", err)
	}
	k, err := s.build(ctx, o)
	if err != nil {
		return Kernel{}, fmt.Errorf("building a kernel for %s: %w", o.Arch, err)
	}
	return k, nil
}

// mayReplace says whether a build may take a name: of a kernel built here before that no machine uses, or of none.
func (s *Store) mayReplace(name string) error {
	have, err := s.kernels.Get(name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if have.BuildKey == "" {
		return hint.With(fmt.Errorf("kernel %q was not built here: %w", name, errdefs.ErrAlreadyExists), "choose another name with -t, or remove it: atoll kernel rm %s", name)
	}
	if users := s.inUse(name); len(users) > 0 {
		return hint.With(fmt.Errorf("kernel %q is used by %s: %w", name, strings.Join(users, ", "), errdefs.ErrFailedPrecondition), "choose another name with -t, or remove the machines first")
	}
	return nil
}

// addBuilt adds a kernel and makes it the default.
func (s *Store) addBuilt(ctx context.Context, o BuildOptions, dir string, img image, k Kernel) (Kernel, error) {
	release, err := s.lock(ctx)
	if err != nil {
		return Kernel{}, err
	}
	err = s.mayReplace(k.Name)
	if err != nil && o.Name == "" { // a name that we made up may be another: nothing that was built is lost
		k.Name += "-" + k.ConfigDigest.Encoded()[:8]
		err = s.mayReplace(k.Name)
	}
	if err == nil {
		k, err = s.add(dir, img, k)
	}
	release()
	if err != nil {
		return Kernel{}, err
	}
	s.publish("build", k)
	return s.makeDefault(ctx, o, k)
}

// makeDefault makes a kernel the default, where it can be.
func (s *Store) makeDefault(ctx context.Context, o BuildOptions, k Kernel) (Kernel, error) {
	if k.Arch != runtime.GOARCH || k.Default {
		return k, nil
	}
	if err := s.SetDefault(ctx, k.Name); err != nil {
		return Kernel{}, err
	}
	k.Default = true
	o.Line(fmt.Sprintf("Kernel %s is the default now", k.Name))
	return k, nil
}

var (
	versionRE = regexp.MustCompile(`^\d+\.\d+(\.\d+)?$`)
	sha256RE  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

func (o *BuildOptions) check() error {
	var faults []error
	invalid := func(next, format string, args ...any) {
		faults = append(faults, hint.With(fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...), "%s", next))
	}
	if o.Name != "" && !nameRE.MatchString(o.Name) {
		faults = append(faults, badName(o.Name))
	}
	if o.Arch != "amd64" && o.Arch != "arm64" {
		invalid("give amd64 or arm64", "architecture %q", o.Arch)
	}
	if o.Version != "" && !versionRE.MatchString(o.Version) {
		invalid("give the version of Linux, such as 6.1", "version %q", o.Version)
	}
	if o.Jobs < 1 || o.Jobs > 1024 {
		invalid("give a number from 1 to 1024", "%d jobs", o.Jobs)
	}
	o.SHA256 = strings.TrimPrefix(o.SHA256, "sha256:")
	if o.SHA256 != "" && !sha256RE.MatchString(o.SHA256) {
		invalid("give the 64 digits that sha256sum prints", "SHA256 %q", o.SHA256)
	}
	if (o.SHA256 != "" || len(o.Keyring) > 0) && !isURL(o.Source) {
		invalid("leave out --sha256 and --keyring", "source %s is no URL: there is nothing to verify so", o.Source)
	}
	return errors.Join(faults...)
}

func (s *Store) build(ctx context.Context, o BuildOptions) (Kernel, error) {
	r, err := newRecipe(o.Arch, o.Config)
	if err != nil {
		return Kernel{}, err
	}
	if err := checkTools(ctx, o.Arch, runtime.GOARCH); err != nil {
		return Kernel{}, err
	}
	prefix := ""
	if o.Arch != runtime.GOARCH {
		prefix = crossPrefix[o.Arch]
	}
	tools, err := compiler(ctx, prefix)
	if err != nil {
		return Kernel{}, err
	}
	// One at a time: each takes all CPUs and 2 GB of disk, and who waits may find the same kernel built.
	select {
	case s.building <- struct{}{}:
		defer func() { <-s.building }()
	case <-ctx.Done():
		return Kernel{}, fmt.Errorf("waiting for another build: %w", context.Cause(ctx))
	}
	src, err := s.findSource(ctx, o)
	if err != nil {
		return Kernel{}, err
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{buildRecipe, src.id.String(), o.Version, o.Arch, tools, strconv.FormatBool(r.whole), r.text()}, "\x00")))
	key := hex.EncodeToString(sum[:])
	if k, ok, err := s.built(ctx, key, o); ok || err != nil {
		return k, err
	}
	switch {
	case len(o.Config) == 0:
	case r.whole:
		o.Line("The configuration given is a whole one and replaces Atoll's")
	default:
		o.Line("The configuration given is a fragment and goes on top of Atoll's")
	}
	k := Kernel{Name: o.Name, Source: src.label, BuildKey: key, Args: ownArgs}
	if o.Name == "" && len(o.Config) > 0 {
		k.Name = "-" + key[:8] // the version comes before it
	}
	return s.buildNew(ctx, o, src, r, prefix, k)
}

// built finds the kernel that was made from the same things before. Under another name it is there a second time.
func (s *Store) built(ctx context.Context, key string, o BuildOptions) (Kernel, bool, error) {
	all, err := s.List()
	if err != nil {
		return Kernel{}, false, err
	}
	var found Kernel
	for _, k := range all {
		if k.BuildKey == key && isFile(k.Path) && (found.Name == "" || k.Name == o.Name) {
			found = k
		}
	}
	if found.Name == "" {
		return Kernel{}, false, nil
	}
	o.Line(fmt.Sprintf("Already built: %s, Linux %s", found.Name, found.Version))
	if o.Name == "" || found.Name == o.Name {
		found, err = s.makeDefault(ctx, o, found)
		return found, true, err
	}
	dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
	if err != nil {
		return Kernel{}, false, err
	}
	defer os.RemoveAll(dir)
	text, err := os.ReadFile(filepath.Join(filepath.Dir(found.Path), configFile))
	if err != nil {
		return Kernel{}, false, err
	}
	if err := writeSynced(filepath.Join(dir, configFile), text); err != nil {
		return Kernel{}, false, err
	}
	img, err := readImage(found.Path)
	if err != nil {
		return Kernel{}, false, err
	}
	found.Name, found.Default = o.Name, false
	k, err := s.addBuilt(ctx, o, dir, img, found)
	return k, true, err
}

// buildNew builds in a directory of its own, which is gone at the end.
func (s *Store) buildNew(ctx context.Context, o BuildOptions, src source, r recipe, prefix string, k Kernel) (_ Kernel, err error) {
	dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix) // Open removes it after a crash
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(dir)
	logFile, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return Kernel{}, err
	}
	defer logFile.Close()
	log := &buildLog{file: logFile, report: func(string, int) {}}
	w, err := newWorkshop(dir, log)
	if err != nil {
		return Kernel{}, err
	}
	if src.tree != "" {
		w.source = src.tree
	} else if err := src.unpack(ctx, w.source); err != nil {
		return Kernel{}, err
	}
	version, err := treeVersion(w.source)
	if err != nil {
		return Kernel{}, err
	}
	if o.Version != "" && o.Version != version && !strings.HasPrefix(version, o.Version+".") {
		return Kernel{}, hint.With(fmt.Errorf("the source is Linux %s, not %s: %w", version, o.Version, errdefs.ErrInvalidArgument), "leave out --version, or give another --source")
	}
	id := "linux-" + version
	log.report = func(step string, steps int) {
		o.Progress(Transfer{ID: id, Status: fmt.Sprintf("Building %s (%d files)", step, steps)})
	}
	o.Progress(Transfer{ID: id, Status: "Configuring"})
	image, err := w.makeKernel(ctx, o, r, prefix)
	if err != nil {
		return Kernel{}, s.withLog(ctx, w, fmt.Errorf("linux %s: %w", version, err))
	}
	o.Progress(Transfer{ID: id, Status: fmt.Sprintf("Done (%d files)", log.steps)})

	final := filepath.Join(dir, "final")
	if err := os.Mkdir(final, 0o755); err != nil {
		return Kernel{}, err
	}
	text, err := w.read(".config")
	if err != nil {
		return Kernel{}, err
	}
	if err := writeSynced(filepath.Join(final, configFile), text); err != nil {
		return Kernel{}, err
	}
	f, err := w.open(image)
	if err != nil {
		return Kernel{}, err
	}
	defer f.Close()
	img, err := readOpened(f)
	if err != nil {
		return Kernel{}, fmt.Errorf("reading the kernel that was built: %w", err)
	}
	k.ConfigDigest = digest.FromBytes(text)
	if k.NeedsACPI, k.ACPI, err = devices(text); err != nil {
		return Kernel{}, err
	}
	if k.Features, err = builtIn(text); err != nil {
		return Kernel{}, err
	}
	if strings.HasPrefix(k.Name, "-") || k.Name == "" {
		k.Name = "atoll-" + version + k.Name
		if o.Arch != runtime.GOARCH {
			k.Name += "-" + o.Arch
		}
	}
	return s.addBuilt(ctx, o, final, img, k)
}

// makeKernel configures and builds, and returns the name of the kernel's file in the build directory.
func (w *workshop) makeKernel(ctx context.Context, o BuildOptions, r recipe, prefix string) (string, error) {
	arch, target := "x86_64", "vmlinux"
	if o.Arch == "arm64" {
		arch, target = "arm64", "Image"
	}
	fixed := []string{"ARCH=" + arch, "CROSS_COMPILE=" + prefix}
	run := func(args ...string) error { return w.make(ctx, append(fixed, args...)...) }
	var err error
	if r.whole {
		if err = w.write(".config", r.text()); err == nil {
			err = run("olddefconfig")
		}
	} else if err = w.write("atoll.config", r.text()); err == nil {
		err = run("KCONFIG_ALLCONFIG="+filepath.Join(w.seen(w.build), "atoll.config"), "allnoconfig")
	}
	if err != nil {
		return "", err
	}
	text, err := w.read(".config")
	if err != nil {
		return "", err
	}
	final, err := parseConfig(strings.NewReader(string(text)))
	if err != nil {
		return "", err
	}
	if err := r.check(final, o.Arch); err != nil {
		return "", err
	}
	if err := run("-j"+strconv.Itoa(o.Jobs), target); err != nil {
		return "", err
	}
	if target == "Image" {
		return "arch/arm64/boot/Image", nil
	}
	const stripped = "vmlinux.atoll" // 23 MB instead of 26
	return stripped, w.run(ctx, prefix+"objcopy", "--strip-all", filepath.Join(w.seen(w.build), target), filepath.Join(w.seen(w.build), stripped))
}

// read reads a small file that the build has made.
func (w *workshop) read(name string) ([]byte, error) {
	f, err := w.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 16<<20))
}

// withLog adds what the build said last to an error and keeps all of its words. A call that was given up leaves none.
func (s *Store) withLog(ctx context.Context, w *workshop, err error) error {
	var exit interface{ ExitCode() int }
	if ctx.Err() != nil || !errors.As(err, &exit) {
		return err
	}
	kept := filepath.Join(s.opts.Cache, buildLogName)
	tail := w.log.tail(15)
	if e := os.MkdirAll(s.opts.Cache, 0o755); e != nil {
		return errors.Join(err, e)
	}
	if e := os.Rename(w.log.file.Name(), kept); e != nil {
		return errors.Join(err, e)
	}
	return hint.With(fmt.Errorf("%w: %w\n%s", err, errdefs.ErrFailedPrecondition, tail), "the whole log is %s", kept)
}
