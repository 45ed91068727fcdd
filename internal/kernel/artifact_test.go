package kernel

import (
	"encoding/json"
	"io"
	"log"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/event"
	images "github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/state"
)

func openImages(t *testing.T) *images.Store {
	t.Helper()
	dir := t.TempDir()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	s, err := images.Open(images.Options{Dir: filepath.Join(dir, "images"), DB: db, Events: event.New(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// withModules is a kernel of the store with a configuration and modules, as Debian's is.
func withModules(t *testing.T, s *Store) Kernel {
	t.Helper()
	dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
	if err != nil {
		t.Fatal(err)
	}
	config := "CONFIG_X=y\n"
	k := Kernel{Name: "mine", Source: "a test", ConfigDigest: digest.FromString(config), BuildKey: "own", Modules: []string{"virtio_mmio"}, Features: map[string][]string{"fuse": {"fuse"}}}
	for _, file := range k.files()[1:] {
		content := "module " + file
		if file == configFile {
			content = config
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	img, err := parseImage(tinyELF("Xen"))
	if err == nil {
		k, err = s.add(dir, img, k)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestArtifact(t *testing.T) {
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	reference := strings.TrimPrefix(srv.URL, "http://") + "/kernels/mine:1"
	here, far := open(t), open(t)
	hereImages, farImages := openImages(t), openImages(t)
	k := withModules(t, here)
	quiet := func(Transfer) {}
	d, err := here.Push(t.Context(), hereImages, "mine", reference, quiet)
	if err != nil {
		t.Fatal(err)
	}
	got, err := far.PullFrom(t.Context(), farImages, reference, "", quiet)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(k, got, cmpopts.IgnoreFields(Kernel{}, "Path", "Source", "BuildKey", "Created")); diff != "" {
		t.Error(diff)
	}
	if got.BuildKey != "" || !strings.Contains(got.Source, reference+"@"+d.String()) || !strings.Contains(got.Source, "a test") {
		t.Errorf("source %q, build key %q", got.Source, got.BuildKey)
	}
	for _, file := range k.files() {
		a, err := os.ReadFile(filepath.Join(here.opts.Dir, "mine", file))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(far.opts.Dir, "mine", file)); err != nil || string(a) != string(b) {
			t.Errorf("file %s differs: %v", file, err)
		}
	}
	for _, s := range []*images.Store{hereImages, farImages} {
		if p, err := s.Prune(t.Context(), images.PruneOptions{DryRun: true}); err != nil || p.Blobs != 0 {
			t.Errorf("%d blobs are left in the image store, %v", p.Blobs, err)
		}
	}
	// The same again is no fault, another one of that name is.
	if _, err := far.PullFrom(t.Context(), farImages, reference, "", quiet); err != nil {
		t.Error(err)
	}
	if again, err := far.PullFrom(t.Context(), farImages, reference, "other", quiet); err != nil || again.Name != "other" {
		t.Errorf("under another name: %+v, %v", again, err)
	}
	other := open(t)
	path := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(path, append(tinyELF("Xen"), 0), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Import(t.Context(), path, "mine"); err != nil {
		t.Fatal(err)
	}
	if _, err := other.PullFrom(t.Context(), farImages, reference, "", quiet); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another kernel of that name: %v", err)
	}
	for _, name := range []string{"../x", "a/b"} {
		if _, err := far.PullFrom(t.Context(), farImages, reference, name, quiet); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := here.Push(t.Context(), hereImages, "nosuch", reference, quiet); !errdefs.IsNotFound(err) {
		t.Errorf("a kernel that is not there: %v", err)
	}
}

// TestArtifactLies takes no kernel that is not the one its description names.
func TestArtifactLies(t *testing.T) {
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	here, far, store := open(t), open(t), openImages(t)
	k := withModules(t, here)
	for name, change := range map[string]func(*Kernel){
		"digest": func(k *Kernel) { k.Digest = digest.FromString("another") },
		"arch":   func(k *Kernel) { k.Arch = "arm64" },
		"config": func(k *Kernel) { k.ConfigDigest = digest.FromString("another") },
		"module": func(k *Kernel) { k.Modules = append(k.Modules, "more") },
	} {
		release := store.Hold()
		a := images.Artifact{Type: ArtifactType, ConfigType: artifactMeta}
		for _, file := range k.files() {
			blob, err := addFile(t.Context(), store, filepath.Join(here.opts.Dir, k.Name), file)
			if err != nil {
				t.Fatal(err)
			}
			a.Blobs = append(a.Blobs, blob)
		}
		lie := k
		change(&lie)
		a.Config, _ = json.Marshal(lie)
		desc, err := store.PutArtifact(t.Context(), a)
		if err == nil {
			err = store.PushArtifact(t.Context(), host+"/lies/"+name+":1", desc, nil)
		}
		release()
		if err != nil {
			t.Fatal(err)
		}
		_, err = far.PullFrom(t.Context(), store, host+"/lies/"+name+":1", "", func(Transfer) {})
		if !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(far.opts.Dir); len(left) != 0 {
			t.Errorf("%s: %v is left", name, left)
		}
	}
}

func TestCheckDescription(t *testing.T) {
	for name, k := range map[string]Kernel{
		"a name that leads out":    {Name: "../../etc"},
		"a feature that leads out": {Name: "x", Features: map[string][]string{"../../../tmp": {"m"}}},
		"words on another line":    {Name: "x", Args: "quiet\ninit=/bin/sh"},
		"a long module":            {Name: "x", Modules: []string{strings.Repeat("m", 300)}},
	} {
		if err := k.check(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	k := Kernel{Name: "x", Args: "quiet", Modules: []string{"../../evil"}}
	if err := k.check(); err != nil {
		t.Error(err) // the module's file is NN-.._.._evil.ko: it leads nowhere
	}
	for _, f := range k.files() {
		if strings.Contains(f, "../") {
			t.Errorf("file %q", f)
		}
	}
}
