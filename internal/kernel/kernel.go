// Package kernel keeps kernels as artifacts: built from verified source, fetched from Debian's verified archive or imported from a file, each with
// its version, digest, modules and its part of the command line; and it puts the initramfs together, the agent and the modules a guest needs.
// It knows nothing of machines: whoever removes a kernel asks them first. A Store may be used from several goroutines.
package kernel

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/state"
)

// Kernel is one kernel of the store.
type Kernel struct {
	Name         string
	Version      string        // as uname -r says it
	Arch         string        // amd64, arm64
	Digest       digest.Digest // of the file at Path
	Path         string        `json:"-"` // ELF with a PVH entry, or an arm64 Image
	Source       string        // where it came from, with the package's version and SHA256
	Args         string        // its own part of the command line
	NeedsACPI    bool          // it cannot find virtio-mmio devices from its command line
	ACPI         bool          // it can find them by ACPI
	ConfigDigest digest.Digest // of its .config; empty: unknown
	BuildKey     string        // names what it was built from; empty: not built here
	Foreign      bool          `json:"-"` // it came with an image: being the first does not make it the default
	Modules      []string      // what the agent has to load, in this order
	// Features that it has, and what the agent has to load for each that a machine uses. Nil: not known.
	Features map[string][]string
	Created  time.Time
	Size     int64
	Default  bool `json:"-"`
}

// Options is what a store works with. All must be set.
type Options struct {
	Dir    string // one directory per kernel
	Cache  string // for packages on their way; may be emptied at any time
	DB     *state.DB
	Events *event.Bus
	Log    *slog.Logger
}

// Store is the kernels of one daemon.
type Store struct {
	opts     Options
	kernels  *state.Collection[Kernel]
	settings *state.Collection[string]
	adding   chan struct{} // holds a token while one call adds, removes or chooses a kernel
	building chan struct{} // and while one builds; taken before adding
	inUse    func(name string) []string
}

const (
	defaultKey = "default"
	imageFile  = "vmlinux"
	configFile = "config"
	moduleDir  = "modules"
	tempPrefix = ".tmp-" // no name of a kernel begins with a dot

	partialSource = "source-*.part" // in the cache
)

// args is right for every machine and accelerator: the console keeps warnings and worse.
const args = "quiet"

var nameRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)

// Open opens the store and removes what an interrupted call left there.
func Open(opts Options) (*Store, error) {
	if err := os.MkdirAll(opts.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("opening the kernel store: %w", err)
	}
	s := &Store{opts: opts, adding: make(chan struct{}, 1), building: make(chan struct{}, 1), inUse: func(string) []string { return nil }}
	var err error
	if s.kernels, err = state.Of[Kernel](opts.DB, "kernels"); err != nil {
		return nil, err
	}
	if s.settings, err = state.Of[string](opts.DB, "kernel-settings"); err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(opts.Dir, tempPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("opening the kernel store: %w", err)
	}
	downloads, err := filepath.Glob(filepath.Join(opts.Cache, partialSource))
	if err != nil {
		return nil, fmt.Errorf("opening the kernel store: %w", err)
	}
	for _, path := range append(left, downloads...) {
		if err := os.RemoveAll(path); err != nil {
			return nil, fmt.Errorf("opening the kernel store: %w", err)
		}
	}
	return s, nil
}

// SetInUse tells the store how to ask who uses a kernel (by name, such as machines). It is called before the store is used.
func (s *Store) SetInUse(f func(name string) []string) { s.inUse = f }

// List returns all kernels by name.
func (s *Store) List() ([]Kernel, error) {
	all, err := s.kernels.All()
	if err != nil {
		return nil, fmt.Errorf("listing kernels: %w", err)
	}
	chosen, err := s.chosen()
	if err != nil {
		return nil, err
	}
	var list []Kernel
	for _, k := range all {
		list = append(list, s.filled(k, chosen))
	}
	slices.SortFunc(list, func(a, b Kernel) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

// Get returns the kernel with that name; the default one when it is empty.
func (s *Store) Get(name string) (Kernel, error) {
	chosen, err := s.chosen()
	if err != nil {
		return Kernel{}, err
	}
	if name == "" && chosen == "" {
		return Kernel{}, hint.With(fmt.Errorf("no kernel yet: %w", errdefs.ErrNotFound), "get one: atoll kernel pull, or for one that boots faster atoll kernel build")
	}
	k, err := s.kernels.Get(cmp.Or(name, chosen))
	if errdefs.IsNotFound(err) {
		return Kernel{}, hint.With(fmt.Errorf("kernel %q: %w", cmp.Or(name, chosen), errdefs.ErrNotFound), "list the kernels: atoll kernel ls")
	}
	if err != nil {
		return Kernel{}, err
	}
	return s.filled(k, chosen), nil
}

// SetDefault chooses the kernel for machines that name none.
func (s *Store) SetDefault(ctx context.Context, name string) error {
	release, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	k, err := s.Get(name)
	if err != nil {
		return err
	}
	if k.Arch != runtime.GOARCH {
		return hint.With(fmt.Errorf("kernel %q is for %s, this host's machines are %s: %w", k.Name, k.Arch, runtime.GOARCH, errdefs.ErrFailedPrecondition),
			"choose another: atoll kernel ls")
	}
	return s.settings.Put(defaultKey, k.Name)
}

// Require tells whether the kernel has a feature. One whose configuration is unknown is taken to have it: the guest will tell.
func (k Kernel) Require(feature string) error {
	if _, ok := k.Features[feature]; ok || k.ConfigDigest == "" {
		return nil
	}
	err := fmt.Errorf("kernel %q has no %s: %w", k.Name, feature, errdefs.ErrFailedPrecondition)
	if k.Features == nil {
		return hint.With(err, "it was fetched by an older Atoll; fetch it again: atoll kernel pull")
	}
	return hint.With(err, "choose another kernel with --kernel; list them: atoll kernel ls")
}

// Remove removes a kernel. errdefs.ErrFailedPrecondition: machines use it, or it is the default and there are others.
func (s *Store) Remove(ctx context.Context, name string) error {
	release, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	if name == "" {
		return fmt.Errorf("removing a kernel: no name: %w", errdefs.ErrInvalidArgument)
	}
	k, err := s.Get(name)
	if err != nil {
		return err
	}
	if users := s.inUse(name); len(users) > 0 {
		return hint.With(fmt.Errorf("kernel %q: machines use it: %s: %w", name, strings.Join(users, ", "), errdefs.ErrFailedPrecondition),
			"remove them first: atoll rm -f %s", strings.Join(users, " "))
	}
	if k.Default {
		all, err := s.List()
		if err != nil {
			return err
		}
		if len(all) > 1 {
			return hint.With(fmt.Errorf("kernel %q is the default: %w", name, errdefs.ErrFailedPrecondition), "choose another first: atoll kernel set-default NAME")
		}
		if err := s.settings.Delete(defaultKey); err != nil {
			return err
		}
	}
	// Off the list first: what is on it is whole.
	if err := s.kernels.Delete(name); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(s.opts.Dir, name)); err != nil {
		return fmt.Errorf("removing kernel %q: %w", name, err)
	}
	s.publish("remove", k)
	return nil
}

// Import takes a kernel from a file: an ELF with a PVH entry or a bzImage that holds one (amd64), or an Image (arm64).
// It must have built in what a guest needs, as it comes without modules.
func (s *Store) Import(ctx context.Context, path, name string) (Kernel, error) {
	k, err := s.importFile(ctx, path, name)
	if err != nil {
		return Kernel{}, fmt.Errorf("importing kernel %s: %w", path, err)
	}
	s.publish("import", k)
	return k, nil
}

func (s *Store) importFile(ctx context.Context, path, name string) (Kernel, error) {
	if !nameRE.MatchString(name) {
		return Kernel{}, badName(name)
	}
	release, err := s.lock(ctx)
	if err != nil {
		return Kernel{}, err
	}
	defer release()
	if _, err := s.kernels.Get(name); err == nil {
		return Kernel{}, hint.With(fmt.Errorf("kernel %q: %w", name, errdefs.ErrAlreadyExists), "choose another name, or remove it: atoll kernel rm %s", name)
	}
	img, err := readImage(path)
	if err != nil {
		return Kernel{}, err
	}
	dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
	if err != nil {
		return Kernel{}, err
	}
	defer os.RemoveAll(dir)
	k := Kernel{Name: name, Source: "file " + path}
	k.NeedsACPI, k.ACPI = img.devices()
	if text := img.embeddedConfig(); len(text) > 0 {
		k.ConfigDigest = digest.FromBytes(text)
		if k.Features, err = builtIn(text); err != nil {
			return Kernel{}, err
		}
		if err := writeSynced(filepath.Join(dir, configFile), text); err != nil {
			return Kernel{}, err
		}
	}
	return s.add(dir, img, k)
}

func badName(name string) error {
	return fmt.Errorf("name %q: only letters, digits, '.', '_' and '-', 63 at most: %w", name, errdefs.ErrInvalidArgument)
}

// add completes k, puts the image beside what is in dir already and makes dir the kernel's own; the caller holds the lock.
func (s *Store) add(dir string, img image, k Kernel) (Kernel, error) {
	if err := writeSynced(filepath.Join(dir, imageFile), img.data); err != nil {
		return Kernel{}, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return Kernel{}, err
	}
	k.Version, k.Arch, k.Digest, k.Size = img.version, img.arch, digest.FromBytes(img.data), int64(len(img.data))
	k.Args, k.Created = cmp.Or(k.Args, args), time.Now().UTC()
	final := filepath.Join(s.opts.Dir, k.Name)
	// What is there is an older build of the same name, or left by a crash. Off the list first: what is on it is whole.
	if err := s.kernels.Delete(k.Name); err != nil {
		return Kernel{}, err
	}
	if err := os.RemoveAll(final); err != nil {
		return Kernel{}, err
	}
	if err := os.Rename(dir, final); err != nil {
		return Kernel{}, err
	}
	if err := s.kernels.Put(k.Name, k); err != nil {
		return Kernel{}, err
	}
	chosen, err := s.chosen()
	if err != nil {
		return Kernel{}, err
	}
	if chosen == "" && k.Arch == runtime.GOARCH && !k.Foreign {
		chosen = k.Name
		if err := s.settings.Put(defaultKey, chosen); err != nil {
			return Kernel{}, err
		}
	}
	return s.filled(k, chosen), nil
}

func (s *Store) filled(k Kernel, chosen string) Kernel {
	k.Path = filepath.Join(s.opts.Dir, k.Name, imageFile)
	k.Default = k.Name == chosen
	return k
}

func (s *Store) chosen() (string, error) {
	name, err := s.settings.Get(defaultKey)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	return name, nil
}

func (s *Store) lock(ctx context.Context) (release func(), err error) {
	select {
	case s.adding <- struct{}{}:
		return func() { <-s.adding }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another change of the kernels: %w", context.Cause(ctx))
	}
}

func (s *Store) publish(action string, k Kernel) {
	s.opts.Events.Publish(event.Event{Type: event.Kernel, Action: action, ID: k.Name,
		Attributes: map[string]string{"version": k.Version, "arch": k.Arch, "digest": k.Digest.String()}})
}

// writeSynced writes a file that is on disk when it returns.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return noSpace(path, err)
	}
	if err := f.Sync(); err != nil {
		return noSpace(path, err)
	}
	return f.Close()
}

// moduleFile is where the store keeps a module, and where the initramfs has it.
type moduleFile struct {
	name string // of the module
	path string // below the kernel's own directory of modules and below GuestModuleDir: NN-name.ko, or feature/NN-name.ko
}

// moduleFiles lists all modules of a kernel in a fixed order.
func (k Kernel) moduleFiles() []moduleFile {
	var files []moduleFile
	add := func(dir string, names []string) {
		for i, name := range names {
			files = append(files, moduleFile{name, path.Join(dir, fmt.Sprintf("%02d-%s.ko", i, strings.ReplaceAll(name, "/", "_")))})
		}
	}
	add("", k.Modules)
	for _, feature := range slices.Sorted(maps.Keys(k.Features)) {
		add(feature, k.Features[feature])
	}
	return files
}
