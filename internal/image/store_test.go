package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	gocmp "github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// store puts an image into the content store as the builder does and makes it known.
func store(t *testing.T, s *Store, reference string, img v1.Image) Image {
	t.Helper()
	defer s.Hold()()
	desc := write(t, s, img)
	got, err := s.Put(t.Context(), reference, desc)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func write(t *testing.T, s *Store, img v1.Image) ocispec.Descriptor {
	t.Helper()
	put := func(data []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
		if err := content.WriteBlob(t.Context(), s.Content(), desc.Digest.String(), bytes.NewReader(data), desc); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		r, _ := l.Compressed()
		data, _ := io.ReadAll(r)
		put(data)
	}
	raw, _ := img.RawConfigFile()
	put(raw)
	manifest, _ := img.RawManifest()
	desc := put(manifest)
	desc.MediaType = ocispec.MediaTypeImageManifest
	return desc
}

func references(t *testing.T, s *Store) map[string][]string {
	t.Helper()
	all, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := map[string][]string{}
	for _, img := range all {
		m[img.Digest.String()] = img.References
	}
	return m
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	s, closeStore := openStore(t, dir, nil)
	img := store(t, s, "debian:bookworm", makeImage(t, "amd64", blob(1, 100)))
	if err := s.Tag(t.Context(), "debian:bookworm", "team/base:1"); err != nil {
		t.Fatal(err)
	}
	closeStore()
	s, _ = openStore(t, dir, nil)
	for _, name := range []string{"debian:bookworm", "docker.io/library/debian:bookworm", "team/base:1", "debian@" + img.Digest.String(),
		img.Digest.String(), img.Digest.Encoded(), img.Digest.Encoded()[:12], img.Digest.Encoded()[:3], "sha256:" + img.Digest.Encoded()[:20]} {
		got, err := s.Resolve(t.Context(), name, "linux/amd64")
		if err != nil || got.Digest != img.Digest {
			t.Errorf("Resolve(%q) = %s, %v", name, got.Digest, err)
		}
		if d := gocmp.Diff([]string{"docker.io/library/debian:bookworm", "docker.io/team/base:1"}, got.References); d != "" {
			t.Errorf("Resolve(%q): %s", name, d)
		}
	}
	for _, name := range []string{"debian", "debian:bookwor", "other@" + img.Digest.String(), strings.Repeat("0", 12)} {
		_, err := s.Resolve(t.Context(), name, "")
		checkError(t, err, errdefs.IsNotFound, name)
	}
	// No name may stand in an ID's way.
	other := store(t, s, "other", makeImage(t, "amd64", blob(2, 100)))
	for _, name := range []string{img.Digest.String(), "sha512:x"} {
		checkError(t, s.Tag(t.Context(), other.Digest.String(), name), errdefs.IsInvalidArgument, name)
	}
	if err := s.Tag(t.Context(), other.Digest.String(), img.Digest.Encoded()); err == nil {
		if got, err := s.Resolve(t.Context(), img.Digest.Encoded(), ""); err != nil || got.Digest != img.Digest {
			t.Errorf("an ID finds %s, %v", got.Digest, err)
		}
	}
	_, err := s.Resolve(t.Context(), "Debian", "")
	checkError(t, err, errdefs.IsInvalidArgument, "upper case")
	_, err = s.Resolve(t.Context(), "debian:bookworm", "linux/arm64")
	checkError(t, err, errdefs.IsNotFound, "is for linux/amd64, not for linux/arm64")
	_, err = s.Resolve(t.Context(), "debian:bookworm", "a/b/c/d")
	checkError(t, err, errdefs.IsInvalidArgument)
}

func TestResolveIsFast(t *testing.T) {
	s := newStore(t)
	for i := range 50 {
		store(t, s, fmt.Sprintf("app:%d", i), makeImage(t, "amd64", blob(uint64(i), 10)))
	}
	start := time.Now()
	for range 1000 {
		if _, err := s.Resolve(t.Context(), "app:7", "linux/amd64"); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(start) / 1000; took > time.Millisecond {
		t.Errorf("Resolve takes %s", took)
	} else {
		t.Logf("Resolve takes %s", took)
	}
}

func TestOpenForgetsIncompleteImages(t *testing.T) {
	dir := t.TempDir()
	s, closeStore := openStore(t, dir, nil)
	img := store(t, s, "app:1", makeImage(t, "amd64", blob(1, 10)))
	closeStore()
	if err := os.Remove(filepath.Join(dir, "images", "blobs", "sha256", img.ConfigDesc.Digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	s, _ = openStore(t, dir, nil)
	if _, err := s.Resolve(t.Context(), "app:1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("Resolve: %v", err)
	}
	store(t, s, "app:1", makeImage(t, "amd64", blob(1, 10)))
}

func TestPutChecks(t *testing.T) {
	s := newStore(t)
	made := makeImage(t, "amd64", blob(1, 100), blob(2, 100))
	desc := write(t, s, made)
	if err := s.Content().Delete(t.Context(), digest.FromBytes(blob(2, 100))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "app", desc); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), digest.FromBytes(blob(2, 100)).String()) {
		t.Errorf("Put without a layer: %v", err)
	}
	short := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	short.SchemaVersion = 2
	data, _ := made.RawConfigFile()
	short.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(data), Size: int64(len(data))}
	short.Layers = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(blob(1, 100)), Size: 99}}
	lie, _ := json.Marshal(short)
	lying := ocispec.Descriptor{MediaType: short.MediaType, Digest: digest.FromBytes(lie), Size: int64(len(lie))}
	if err := content.WriteBlob(t.Context(), s.Content(), "lie", bytes.NewReader(lie), lying); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "app", lying); !errdefs.IsDataLoss(err) {
		t.Errorf("Put with a wrong size: %v", err)
	}
	_, err := s.Put(t.Context(), "app@"+desc.Digest.String(), write(t, s, made))
	checkError(t, err, errdefs.IsInvalidArgument, "a digest cannot be chosen")
	if _, err := s.Put(t.Context(), "app", desc); err != nil {
		t.Error(err)
	}
}

func TestRemove(t *testing.T) {
	s := newStore(t)
	shared := blob(9, 500)
	one := store(t, s, "one", makeImage(t, "amd64", shared, blob(1, 10)))
	two := store(t, s, "two", makeImage(t, "amd64", shared, blob(2, 10)))
	if err := s.Tag(t.Context(), "one", "uno"); err != nil {
		t.Fatal(err)
	}
	var gone []digest.Digest
	s.OnDelete(func(d digest.Digest) { gone = append(gone, d) })
	events, _ := s.events.Listen(time.Time{})

	_, err := s.Remove(t.Context(), one.Digest.String(), false)
	checkError(t, err, errdefs.IsFailedPrecondition, "docker.io/library/one:latest, docker.io/library/uno:latest")
	_, err = s.Remove(t.Context(), "three", true)
	checkError(t, err, errdefs.IsNotFound, "three")

	// One reference of two: the image stays.
	r, err := s.Remove(t.Context(), "uno", false)
	if d := gocmp.Diff(Removed{Untagged: []string{"docker.io/library/uno:latest"}}, r); d != "" || err != nil {
		t.Error(d, err)
	}
	// The last one is kept for whoever uses the image.
	s.SetInUse(func(d digest.Digest) []string {
		if d == one.Digest {
			return []string{"web", "db"}
		}
		return nil
	})
	_, err = s.Remove(t.Context(), "one", false)
	checkError(t, err, errdefs.IsFailedPrecondition, "in use by web, db")
	if _, err := s.Resolve(t.Context(), "one", ""); err != nil {
		t.Error(err)
	}
	// By force it loses its name, but stays.
	if r, err = s.Remove(t.Context(), "one", true); err != nil || len(r.Deleted) > 0 || len(gone) > 0 {
		t.Errorf("removed %+v, %v", r, err)
	}
	if d := gocmp.Diff(map[string][]string{one.Digest.String(): nil, two.Digest.String(): {"docker.io/library/two:latest"}}, references(t, s)); d != "" {
		t.Error(d)
	}
	_, err = s.Remove(t.Context(), one.Digest.String(), true)
	checkError(t, err, errdefs.IsFailedPrecondition, "in use by web, db")
	if ds, err := s.GC(t.Context()); err != nil || len(ds) > 0 {
		t.Errorf("GC took %v, %v", ds, err)
	}
	s.SetInUse(func(digest.Digest) []string { return nil })
	ds, err := s.GC(t.Context())
	slices.Sort(ds)
	want := []digest.Digest{one.Digest, one.ConfigDesc.Digest, digest.FromBytes(blob(1, 10))}
	slices.Sort(want)
	if d := gocmp.Diff(want, ds); d != "" || err != nil {
		t.Error(d, err)
	}
	if d := gocmp.Diff([]digest.Digest{one.Digest}, gone); d != "" {
		t.Error(d)
	}
	// The other image shares a layer with it and is whole.
	for _, l := range two.Layers {
		if _, err := s.Content().Info(t.Context(), l.Digest); err != nil {
			t.Error(err)
		}
	}
	if r, err = s.Remove(t.Context(), two.Digest.Encoded()[:12], false); err != nil || len(r.Deleted) != 4 || len(r.Untagged) != 1 {
		t.Errorf("removed %+v, %v", r, err)
	}
	if left := blobFiles(t, s); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	var actions []string
	for len(actions) < 5 {
		actions = append(actions, (<-events.C()).Action)
	}
	if d := gocmp.Diff([]string{"untag", "untag", "delete", "untag", "delete"}, actions); d != "" {
		t.Error(d)
	}
}

func TestHold(t *testing.T) {
	s := newStore(t)
	var gone []digest.Digest
	s.OnDelete(func(d digest.Digest) { gone = append(gone, d) })
	img := store(t, s, "app", makeImage(t, "amd64", blob(1, 10)))
	first, second := s.Hold(), s.Hold()
	loose := write(t, s, makeImage(t, "amd64", blob(2, 10)))
	if r, err := s.Remove(t.Context(), "app", false); err != nil || len(r.Deleted) > 0 {
		t.Errorf("removed %+v, %v", r, err)
	}
	if ds, err := s.GC(t.Context()); err != nil || len(ds) > 0 {
		t.Errorf("GC under a hold took %v, %v", ds, err)
	}
	first()
	first() // twice is once
	if n := len(blobFiles(t, s)); n != 6 || len(gone) > 0 {
		t.Errorf("%d blobs, deleted %v while a hold is there", n, gone)
	}
	if _, err := s.Put(t.Context(), "kept", loose); err != nil {
		t.Fatal(err)
	}
	second()
	if d := gocmp.Diff([]digest.Digest{img.Digest}, gone); d != "" {
		t.Error(d)
	}
	if n := len(blobFiles(t, s)); n != 3 {
		t.Errorf("%d blobs after the last release, want the 3 of the image put under the hold", n)
	}
}

func TestHoldTakenDuringGC(t *testing.T) {
	s := newStore(t)
	img := store(t, s, "", makeImage(t, "amd64", blob(1, 10)))
	used, once := false, sync.Once{}
	s.SetInUse(func(digest.Digest) []string {
		was := used
		// Between this answer and the deletion a machine is created.
		once.Do(func() {
			release := s.Hold()
			used = true
			release()
		})
		if was {
			return []string{"web"}
		}
		return nil
	})
	if ds, err := s.GC(t.Context()); err != nil || len(ds) > 0 {
		t.Errorf("GC took %v, %v", ds, err)
	}
	if _, err := s.Resolve(t.Context(), img.Digest.String(), ""); err != nil {
		t.Error(err)
	}
}

func TestRetagKeepsOldUntagged(t *testing.T) {
	dir := t.TempDir()
	s, closeStore := openStore(t, dir, nil)
	old := store(t, s, "app", makeImage(t, "amd64", blob(1, 10)))
	now := store(t, s, "app", makeImage(t, "amd64", blob(2, 10)))
	closeStore()
	s, _ = openStore(t, dir, nil)
	if d := gocmp.Diff(map[string][]string{old.Digest.String(): nil, now.Digest.String(): {"docker.io/library/app:latest"}}, references(t, s)); d != "" {
		t.Error(d)
	}
	// A tag makes it an ordinary image again.
	if err := s.Tag(t.Context(), old.Digest.Encoded()[:12], "app:old"); err != nil {
		t.Fatal(err)
	}
	if ds, err := s.GC(t.Context()); err != nil || len(ds) > 0 {
		t.Errorf("GC took %v, %v", ds, err)
	}
	if _, err := s.Remove(t.Context(), "app:old", false); err != nil {
		t.Fatal(err)
	}
	if d := gocmp.Diff(map[string][]string{now.Digest.String(): {"docker.io/library/app:latest"}}, references(t, s)); d != "" {
		t.Error(d)
	}
}

func TestGCDropsStaleTransfers(t *testing.T) {
	s := newStore(t)
	for _, key := range []string{"old", "new"} {
		w, err := content.OpenWriter(t.Context(), s.Content(), content.WithRef(key))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write([]byte("half"))
		w.Close()
	}
	past := time.Now().Add(-2 * staleIngest)
	stamp, _ := past.MarshalText()
	dir := filepath.Join(s.dir, "ingest", digest.FromString("old").Encoded())
	if err := os.WriteFile(filepath.Join(dir, "updatedat"), stamp, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(dir, "data"), past, past); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GC(t.Context()); err != nil {
		t.Fatal(err)
	}
	left, err := s.Content().ListStatuses(t.Context())
	if err != nil || len(left) != 1 || left[0].Ref != "new" {
		t.Errorf("left %+v, %v", left, err)
	}
}

func TestHandler(t *testing.T) {
	host := serveRegistry(t, nil)
	idx := makeIndex(map[string]v1.Image{"amd64": makeImage(t, "amd64", blob(1, 2<<20)), "arm64": makeImage(t, "arm64", blob(2, 10))})
	push(t, host+"/library/multi:1", idx)
	s := newStore(t)
	pulled := mustPull(t, s, host+"/library/multi:1")
	if err := s.Tag(t.Context(), host+"/library/multi:1", "multi:1"); err != nil {
		t.Fatal(err)
	}
	built := store(t, s, "built:1", makeImage(t, "amd64", blob(3, 3<<20), blob(4, 10)))
	srv := httptest.NewServer(s.Handler())
	defer srv.Close()

	// Round trip: our own Pull, from our own store as a registry.
	other := newStore(t)
	mine := strings.TrimPrefix(srv.URL, "http://")
	for name, want := range map[string]Image{"/library/multi:1": pulled, "/library/built:1": built, "/library/built@" + built.Digest.String(): built} {
		got := mustPull(t, other, mine+name)
		if got.Digest != want.Digest || !bytes.Equal(got.RawConfig, want.RawConfig) {
			t.Errorf("%s: pulled %s, want %s", name, got.Digest, want.Digest)
		}
	}
	blobFiles(t, other)
	_, err := other.Pull(t.Context(), mine+"/library/multi:1", PullOptions{Platform: "linux/arm64"})
	checkError(t, err, errdefs.IsNotFound)
	_, err = other.Pull(t.Context(), mine+"/library/none:1", amd64)
	checkError(t, err, errdefs.IsNotFound)

	layer := built.Layers[0].Digest.String()
	for _, tt := range []struct {
		method, path, rng string
		status            int
		header            map[string]string
		body              string
	}{
		{"GET", "/v2/", "", 200, map[string]string{"Content-Type": "application/json"}, "{}"},
		{"HEAD", "/v2/library/built/manifests/1", "", 200, map[string]string{"Content-Type": ocispec.MediaTypeImageManifest,
			"Docker-Content-Digest": built.Digest.String(), "Content-Length": fmt.Sprint(built.ManifestDesc.Size)}, ""},
		{"GET", "/v2/library/multi/manifests/1?ns=" + host, "", 200, map[string]string{"Content-Type": ocispec.MediaTypeImageIndex}, "-"},
		{"GET", "/v2/library/built/manifests/1?ns=" + host, "", 404, nil, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/library/built/manifests/2", "", 404, nil, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/library/built/blobs/" + layer, "bytes=5-8", 206, map[string]string{"Content-Range": fmt.Sprintf("bytes 5-8/%d", 3<<20)}, string(blob(3, 3<<20)[5:9])},
		{"HEAD", "/v2/library/built/blobs/" + layer, "", 200, map[string]string{"Content-Length": fmt.Sprint(3 << 20)}, ""},
		{"GET", "/v2/library/multi/blobs/" + layer, "", 404, nil, "BLOB_UNKNOWN"},
		{"GET", "/v2/library/built/blobs/sha256:x", "", 400, nil, "DIGEST_INVALID"},
		{"GET", "/v2/Library/built/manifests/1", "", 404, nil, "NAME_INVALID"},
		{"GET", "/v2/library/built/tags/list", "", 404, nil, "UNSUPPORTED"},
		{"GET", "/", "", 404, nil, "UNSUPPORTED"},
		{"PUT", "/v2/library/built/manifests/1", "", 405, nil, "UNSUPPORTED"},
	} {
		req, err := http.NewRequestWithContext(context.Background(), tt.method, srv.URL+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if tt.rng != "" {
			req.Header.Set("Range", tt.rng)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.status {
			t.Errorf("%s %s: %s", tt.method, tt.path, resp.Status)
		}
		for k, v := range tt.header {
			if got := resp.Header.Get(k); got != v {
				t.Errorf("%s %s: %s is %q, want %q", tt.method, tt.path, k, got, v)
			}
		}
		if tt.body != "-" && !strings.Contains(string(body), tt.body) {
			t.Errorf("%s %s: body %.80q, want %.80q", tt.method, tt.path, body, tt.body)
		}
	}
}
