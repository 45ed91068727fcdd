package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/zstd"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/state"
)

// file is one entry of an archive of the tests.
type file struct {
	name, content string
	link          string
	kind          byte
}

func archiveOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: f.kind, Mode: 0o644, Size: int64(len(f.content)), Linkname: f.link}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func jsonOf(t testing.TB, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func descOf(mediaType, content string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(content), Size: int64(len(content))}
}

// small is a whole image of one layer, as texts.
type smallImage struct{ layer, config, manifest string }

func newSmall(t testing.TB, arch string) smallImage {
	layer := string(archiveOf(t, file{name: "bin/app", content: arch}))
	cfg := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}}
	cfg.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString(layer)}}
	s := smallImage{layer: layer, config: jsonOf(t, cfg)}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: descOf(ocispec.MediaTypeImageConfig, s.config), Layers: []ocispec.Descriptor{descOf(ocispec.MediaTypeImageLayer, layer)}}
	m.SchemaVersion = 2
	s.manifest = jsonOf(t, m)
	return s
}

func blobFile(content string) file {
	return file{name: archivePath(digest.FromString(content)), content: content}
}

func (s smallImage) files() []file {
	return []file{blobFile(s.layer), blobFile(s.config), blobFile(s.manifest)}
}

func indexOf(t testing.TB, entries ...ocispec.Descriptor) string {
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: entries}
	idx.SchemaVersion = 2
	return jsonOf(t, idx)
}

func (s smallImage) named(t testing.TB, name string) file {
	d := descOf(ocispec.MediaTypeImageManifest, s.manifest)
	d.Annotations = map[string]string{nameAnnotation: name}
	return file{name: "index.json", content: indexOf(t, d)}
}

func save(t *testing.T, s *Store, o SaveOptions, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.Save(t.Context(), &b, names, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func layerImage(t *testing.T, arch string, layers ...[]byte) v1.Image {
	t.Helper()
	var img v1.Image
	var err error
	base := makeImage(t, arch)
	cf, _ := base.ConfigFile()
	img, err = mutate.ConfigFile(base, cf)
	for _, l := range layers {
		if err != nil {
			t.Fatal(err)
		}
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(l)
		w.Close()
		img, err = mutate.Append(img, mutate.Addendum{Layer: static.NewLayer(z.Bytes(), types.OCILayer)})
	}
	if err != nil {
		t.Fatal(err)
	}
	cf, _ = img.ConfigFile()
	cf = cf.DeepCopy()
	cf.RootFS.DiffIDs = nil
	for _, l := range layers { // the library takes the compressed bytes for the layer itself
		h, _, _ := v1.SHA256(bytes.NewReader(l))
		cf.RootFS.DiffIDs = append(cf.RootFS.DiffIDs, h)
	}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

func TestSaveAndLoad(t *testing.T) {
	from := newStore(t)
	layer := archiveOf(t, file{name: "bin/app", content: "x"})
	one := store(t, from, "team/one:1", layerImage(t, "amd64", layer, archiveOf(t, file{name: "a", content: "1"})))
	two := store(t, from, "two", layerImage(t, "amd64", layer))
	if err := from.Tag(t.Context(), "team/one:1", "r.example:5000/uno:2"); err != nil {
		t.Fatal(err)
	}
	names := []string{"team/one:1", "r.example:5000/uno:2", "two"}
	for _, format := range []string{DockerArchive, OCIArchive} {
		t.Run(format, func(t *testing.T) {
			data := save(t, from, SaveOptions{Format: format}, names...)
			if !bytes.Equal(data, save(t, from, SaveOptions{Format: format}, names...)) {
				t.Error("saving the same again gives other bytes")
			}
			var zipped bytes.Buffer
			z, err := zstd.NewWriter(&zipped)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = z.Write(data)
			z.Close()
			for kind, data := range map[string][]byte{"plain": data, "zstd": zipped.Bytes()} {
				to := newStore(t)
				loaded, err := to.Load(t.Context(), iotest.OneByteReader(bytes.NewReader(data)))
				if err != nil {
					t.Fatalf("%s: %v", kind, err)
				}
				var got []string
				for _, l := range loaded {
					got = append(got, l.Reference)
				}
				if d := gocmp.Diff([]string{"team/one:1", "r.example:5000/uno:2", "two:latest"}, got); d != "" {
					t.Errorf("%s: %s", kind, d)
				}
				want := map[string][]string{
					one.Digest.String(): {"docker.io/team/one:1", "r.example:5000/uno:2"}, two.Digest.String(): {"docker.io/library/two:latest"},
				}
				if d := gocmp.Diff(want, references(t, to)); d != "" {
					t.Errorf("%s: %s", kind, d)
				}
				if n := len(blobFiles(t, to)); n != 6 {
					t.Errorf("%s: %d blobs, want 2 manifests, 2 configs, 2 layers", kind, n)
				}
			}
		})
	}
	// Another implementation of docker load reads it.
	data := save(t, from, SaveOptions{}, names...)
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	tag, _ := name.NewTag("team/one:1")
	img, err := tarball.Image(open, &tag)
	if err == nil {
		err = validate.Image(img)
	}
	if err != nil {
		t.Errorf("go-containerregistry: %v", err)
	}
	if cfg, _ := img.ConfigName(); cfg.String() != one.ConfigDesc.Digest.String() {
		t.Errorf("config %s, want %s", cfg, one.ConfigDesc.Digest)
	}
	// By ID an image has no name in the archive.
	to := newStore(t)
	loaded, err := to.Load(t.Context(), bytes.NewReader(save(t, from, SaveOptions{}, two.Digest.String())))
	if err != nil || len(loaded) != 1 || loaded[0].Reference != "" || len(loaded[0].Image.References) != 0 {
		t.Errorf("by ID: %+v, %v", loaded, err)
	}
	for _, bad := range []struct {
		names  []string
		format string
		is     func(error) bool
	}{{[]string{"nosuch"}, "", errdefs.IsNotFound}, {[]string{"two"}, "zip", errdefs.IsInvalidArgument}, {nil, "", errdefs.IsInvalidArgument}} {
		if err := from.Save(t.Context(), io.Discard, bad.names, SaveOptions{Format: bad.format}); !bad.is(err) {
			t.Errorf("Save(%v, %q): %v", bad.names, bad.format, err)
		}
	}
}

// TestLoadDocker loads what docker save before version 25 writes, as go-containerregistry still does, and what links to shared layers.
func TestLoadDocker(t *testing.T) {
	amd := layerImage(t, "amd64", archiveOf(t, file{name: "a", content: "1"}), archiveOf(t, file{name: "b", content: "2"}))
	tag, _ := name.NewTag("old/app:1")
	var b bytes.Buffer
	if err := tarball.Write(tag, amd, &b); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	loaded, err := s.Load(t.Context(), &b)
	if err != nil {
		t.Fatal(err)
	}
	cfg, _ := amd.ConfigName()
	if len(loaded) != 1 || loaded[0].Reference != "old/app:1" || loaded[0].Image.ConfigDesc.Digest.String() != cfg.String() {
		t.Errorf("loaded %+v", loaded)
	}
	small := newSmall(t, "amd64")
	files := []file{
		{name: "l1/layer.tar", content: small.layer}, {name: "l2/layer.tar", kind: tar.TypeSymlink, link: "../l1/layer.tar"}, {name: "l1/VERSION", content: "1.0"},
		{name: "c.json", content: small.config},
		{name: "manifest.json", content: jsonOf(t, []dockerItem{{Config: "c.json", RepoTags: []string{"linked:1"}, Layers: []string{"l2/layer.tar"}}})},
	}
	s = newStore(t)
	if loaded, err = s.Load(t.Context(), bytes.NewReader(archiveOf(t, files...))); err != nil || loaded[0].Reference != "linked:1" {
		t.Errorf("with a link: %+v, %v", loaded, err)
	}
	if n := len(blobFiles(t, s)); n != 3 {
		t.Errorf("%d blobs, want manifest, config and layer", n)
	}
}

func TestLoadIndex(t *testing.T) {
	amd, arm := newSmall(t, "amd64"), newSmall(t, "arm64")
	da, dr := descOf(ocispec.MediaTypeImageManifest, amd.manifest), descOf(ocispec.MediaTypeImageManifest, arm.manifest)
	da.Platform, dr.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}, &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	inner := indexOf(t, da, dr)
	d := descOf(ocispec.MediaTypeImageIndex, inner)
	d.Annotations = map[string]string{ocispec.AnnotationRefName: "docker.io/library/multi:1"}
	files := append(amd.files(), file{name: "index.json", content: indexOf(t, d)}, blobFile(inner))
	for have, files := range map[int][]file{1: files, 2: append(arm.files(), files...)} {
		s := newStore(t)
		if _, err := s.Load(t.Context(), bytes.NewReader(archiveOf(t, files...))); err != nil {
			t.Fatal(err)
		}
		img, err := s.Resolve(t.Context(), "multi:1", "")
		if err != nil {
			t.Fatal(err)
		}
		source, variants := s.Variants(t.Context(), "multi:1", img)
		here := 0
		for _, v := range variants {
			if v.Here {
				here++
			}
		}
		if source != d.Digest || len(variants) != 2 || here != have {
			t.Errorf("index %s, variants %+v, want %d of them here", source, variants, have)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	img := newSmall(t, "amd64")
	good := append(img.files(), img.named(t, "docker.io/library/good:1"))
	but := func(drop int, more ...file) []file {
		return append(slices.Delete(slices.Clone(good), drop, drop+1), more...)
	}
	item := func(i dockerItem) file { return file{name: "manifest.json", content: jsonOf(t, []dockerItem{i})} }
	deep := img.manifest
	deepType := ocispec.MediaTypeImageManifest
	var deepFiles []file
	for range maxNesting + 2 {
		deep = indexOf(t, descOf(deepType, deep))
		deepType = ocispec.MediaTypeImageIndex
		deepFiles = append(deepFiles, blobFile(deep))
	}
	many := make([]ocispec.Descriptor, maxEntries+1)
	for i := range many {
		many[i] = descOf(ocispec.MediaTypeImageManifest, fmt.Sprint(i))
	}
	lying := descOf(ocispec.MediaTypeImageManifest, img.manifest)
	lying.Size++
	oldConfig := file{name: "c.json", content: img.config}
	oldLayer := file{name: "l.tar", content: img.layer}
	huge := strings.Repeat(" ", maxManifest+1)
	for name, tt := range map[string]struct {
		data []byte
		is   func(error) bool
		part string
	}{
		"nothing":               {nil, errdefs.IsInvalidArgument, "empty"},
		"no archive":            {bytes.Repeat([]byte("html"), 500), errdefs.IsInvalidArgument, "no tar archive"},
		"a bad gzip":            {append([]byte{0x1f, 0x8b}, make([]byte, 100)...), errdefs.IsInvalidArgument, "no tar archive"},
		"another archive":       {archiveOf(t, file{name: "bin/sh", content: "x"}), errdefs.IsInvalidArgument, "neither index.json nor manifest.json"},
		"out of the archive":    {archiveOf(t, append(good, file{name: "../../x", content: "x"})...), errdefs.IsInvalidArgument, "leads out"},
		"an absolute name":      {archiveOf(t, append(good, file{name: "/etc/x", content: "x"})...), errdefs.IsInvalidArgument, "leads out"},
		"a device":              {archiveOf(t, append(good, file{name: "null", kind: tar.TypeChar})...), errdefs.IsInvalidArgument, "neither file"},
		"cut":                   {archiveOf(t, good...)[:2000], errdefs.IsDataLoss, "ends too early"},
		"a missing layer":       {archiveOf(t, but(0)...), errdefs.IsInvalidArgument, "not whole"},
		"a missing config":      {archiveOf(t, but(1)...), errdefs.IsInvalidArgument, "not whole"},
		"a missing manifest":    {archiveOf(t, but(2)...), errdefs.IsInvalidArgument, "not whole"},
		"a changed layer":       {archiveOf(t, but(0, file{name: archivePath(digest.FromString(img.layer)), content: "changed"})...), errdefs.IsDataLoss, "has the digest"},
		"a bad digest":          {archiveOf(t, but(0, file{name: "blobs/sha256/abc", content: "x"})...), errdefs.IsInvalidArgument, "digest"},
		"a size that lies":      {archiveOf(t, append(img.files(), file{name: "index.json", content: indexOf(t, lying)})...), func(err error) bool { return err != nil }, ""},
		"a huge index":          {archiveOf(t, append(img.files(), file{name: "index.json", content: huge})...), errdefs.IsInvalidArgument, "too large"},
		"an index of many":      {archiveOf(t, append(img.files(), file{name: "index.json", content: indexOf(t, many...)})...), errdefs.IsInvalidArgument, "more than"},
		"a deep index":          {archiveOf(t, append(append(img.files(), deepFiles...), file{name: "index.json", content: indexOf(t, descOf(deepType, deep))})...), errdefs.IsInvalidArgument, "in one another"},
		"an empty index":        {archiveOf(t, file{name: "index.json", content: `{"schemaVersion":2,"manifests":[]}`}), errdefs.IsInvalidArgument, "no image"},
		"an index of nonsense":  {archiveOf(t, file{name: "index.json", content: `{`}), errdefs.IsInvalidArgument, "index.json"},
		"a bad name":            {archiveOf(t, append(img.files(), img.named(t, "Good/Name"))...), errdefs.IsInvalidArgument, "upper case"},
		"a name with a digest":  {archiveOf(t, append(img.files(), img.named(t, "x@"+digest.FromString("x").String()))...), errdefs.IsInvalidArgument, "digest"},
		"very old":              {archiveOf(t, file{name: "repositories", content: "{}"}), errdefs.IsNotImplemented, "before 1.10"},
		"docker: no config":     {archiveOf(t, oldLayer, item(dockerItem{Config: "c.json", Layers: []string{"l.tar"}})), errdefs.IsInvalidArgument, `"c.json" is not in the archive`},
		"docker: no layer":      {archiveOf(t, oldConfig, item(dockerItem{Config: "c.json", Layers: []string{"l.tar"}})), errdefs.IsInvalidArgument, `"l.tar" is not in the archive`},
		"docker: other layer":   {archiveOf(t, oldConfig, file{name: "l.tar", content: "x"}, item(dockerItem{Config: "c.json", Layers: []string{"l.tar"}})), errdefs.IsDataLoss, "the config says"},
		"docker: more layers":   {archiveOf(t, oldConfig, oldLayer, item(dockerItem{Config: "c.json", Layers: []string{"l.tar", "l.tar"}})), errdefs.IsInvalidArgument, "its config has 1 layers"},
		"docker: links in ring": {archiveOf(t, oldConfig, file{name: "l.tar", kind: tar.TypeSymlink, link: "m.tar"}, file{name: "m.tar", kind: tar.TypeSymlink, link: "l.tar"}, item(dockerItem{Config: "c.json", Layers: []string{"l.tar"}})), errdefs.IsInvalidArgument, "not in the archive"},
		"docker: a link out":    {archiveOf(t, oldConfig, file{name: "l.tar", kind: tar.TypeSymlink, link: "/etc/passwd"}, item(dockerItem{Config: "c.json", Layers: []string{"l.tar"}})), errdefs.IsInvalidArgument, "not in the archive"},
		"docker: none":          {archiveOf(t, file{name: "manifest.json", content: "[]"}), errdefs.IsInvalidArgument, "no image"},
		"one of two is bad": {archiveOf(t, append(img.files(), oldConfig, oldLayer, file{name: "manifest.json", content: jsonOf(t, []dockerItem{
			{Config: "c.json", RepoTags: []string{"fine:1"}, Layers: []string{"l.tar"}}, {Config: "d.json"}})})...), errdefs.IsInvalidArgument, "d.json"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.Load(t.Context(), bytes.NewReader(tt.data))
			if !tt.is(err) || !strings.Contains(err.Error(), tt.part) {
				t.Errorf("%v, want %q", err, tt.part)
			}
			if left := blobFiles(t, s); len(left) != 0 || len(references(t, s)) != 0 {
				t.Errorf("%d blobs and the images %v are left", len(left), references(t, s))
			}
			if left, _ := filepath.Glob(filepath.Join(s.dir, "ingest", "*")); len(left) != 0 {
				t.Errorf("transfers are left: %v", left)
			}
		})
	}
	// What cannot be read to its end is not loaded either.
	s := newStore(t)
	broken := io.MultiReader(bytes.NewReader(archiveOf(t, good...)[:3000]), iotest.ErrReader(errors.New("the line is dead")))
	if _, err := s.Load(t.Context(), broken); err == nil || !strings.Contains(err.Error(), "the line is dead") || len(blobFiles(t, s)) != 0 {
		t.Errorf("a dead line: %v, %d blobs", err, len(blobFiles(t, s)))
	}
}

func FuzzLoad(f *testing.F) {
	img := newSmall(f, "amd64")
	f.Add(archiveOf(f, append(img.files(), img.named(f, "x:1"))...))
	f.Add(archiveOf(f, file{name: "c.json", content: img.config}, file{name: "l.tar", content: img.layer},
		file{name: "manifest.json", content: jsonOf(f, []dockerItem{{Config: "c.json", RepoTags: []string{"x:1"}, Layers: []string{"l.tar"}}})}))
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0})
	dir := f.TempDir()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		f.Fatal(err)
	}
	defer db.Close()
	s, err := Open(Options{Dir: filepath.Join(dir, "images"), DB: db, Events: event.New(), Log: discard()})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		loaded, err := s.Load(context.Background(), bytes.NewReader(data))
		if (err == nil) != (len(loaded) > 0) {
			t.Fatalf("loaded %d images, error %v", len(loaded), err)
		}
		for _, l := range loaded {
			if _, err := s.Remove(context.Background(), l.Image.Digest.String(), true); err != nil && !errdefs.IsNotFound(err) {
				t.Fatal(err)
			}
		}
		if files, _ := os.ReadDir(filepath.Join(s.dir, "blobs", "sha256")); len(files) != 0 {
			t.Fatalf("%d blobs left after error %v", len(files), err)
		}
	})
}

func FuzzDocument(f *testing.F) {
	img := newSmall(f, "amd64")
	f.Add([]byte(img.manifest))
	f.Add([]byte(indexOf(f, descOf(ocispec.MediaTypeImageManifest, img.manifest))))
	f.Add([]byte(`{"schemaVersion":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := parseDocument(ocispec.Descriptor{Digest: digest.FromBytes(data)}, data)
		if err != nil {
			if errors.Is(errdefs.Resolve(err), errdefs.ErrUnknown) {
				t.Fatalf("no class: %v", err)
			}
			return
		}
		for _, d := range slices.Concat(doc.Layers, doc.Manifests) {
			if d.Digest.Validate() != nil || d.Size < 0 {
				t.Fatalf("accepted %+v", d)
			}
		}
		if (doc.Config == nil) == (doc.Manifests == nil) || len(doc.Layers) > maxEntries {
			t.Fatalf("accepted %s", data)
		}
	})
}

func TestImport(t *testing.T) {
	root := archiveOf(t, file{name: "bin/app", content: "x"})
	var zipped bytes.Buffer
	z, _ := zstd.NewWriter(&zipped)
	_, _ = z.Write(root)
	z.Close()
	at := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	var config dockerspec.DockerOCIImageConfig
	config.Cmd = []string{"/bin/app"}
	for kind, data := range map[string][]byte{ocispec.MediaTypeImageLayerGzip: root, ocispec.MediaTypeImageLayerZstd: zipped.Bytes()} {
		s := newStore(t)
		img, err := s.Import(t.Context(), bytes.NewReader(data), ImportOptions{Reference: "mine:1", Platform: "linux/arm64", Message: "by hand", Config: config, Created: at})
		if err != nil {
			t.Fatal(err)
		}
		c := img.Config
		if len(img.Layers) != 1 || img.Layers[0].MediaType != kind || c.RootFS.DiffIDs[0] != digest.FromBytes(root) || c.Config.Cmd[0] != "/bin/app" ||
			img.Platform.Architecture != "arm64" || c.History[0].Comment != "by hand" || !img.Created.Equal(at) || img.References[0] != "docker.io/library/mine:1" {
			t.Errorf("%s: %+v", kind, img)
		}
		again, err := s.Import(t.Context(), bytes.NewReader(data), ImportOptions{Platform: "linux/arm64", Message: "by hand", Config: config, Created: at})
		if err != nil || again.Digest != img.Digest {
			t.Errorf("%s: the same again has the digest %s, %v", kind, again.Digest, err)
		}
	}
	s := newStore(t)
	for name, data := range map[string][]byte{"text": []byte("#!/bin/sh\n" + strings.Repeat("x", 1000)), "cut": root[:512], "empty": nil, "a zip of nothing": zipped.Bytes()[:20]} {
		if _, err := s.Import(t.Context(), bytes.NewReader(data), ImportOptions{}); !errdefs.IsInvalidArgument(err) && !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Import(t.Context(), bytes.NewReader(root), ImportOptions{Reference: "Bad"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v", err)
	}
	if left := blobFiles(t, s); len(left) != 0 {
		t.Errorf("%d blobs left by failures", len(left))
	}
}
