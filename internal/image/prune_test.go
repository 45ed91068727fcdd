package image

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	gocmp "github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/opencontainers/go-digest"
)

// dated is an image with a label, made at a time.
func dated(t *testing.T, seed uint64, at time.Time, labels map[string]string) v1.Image {
	t.Helper()
	img := makeImage(t, "amd64", blob(seed, 1000))
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.Created, cf.Config.Labels = v1.Time{Time: at}, labels
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

func TestFiltered(t *testing.T) {
	s := newStore(t)
	old, now := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), time.Now().Add(-time.Minute)
	a := store(t, s, "team/a:1", dated(t, 1, old, map[string]string{"kind": "x"}))
	b := store(t, s, "team/b:1", dated(t, 2, now, nil))
	none := store(t, s, "", dated(t, 3, old.Add(time.Hour), map[string]string{"kind": "y"}))
	if err := s.Tag(t.Context(), "team/a:1", "team/a:2"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		filters []string
		want    []digest.Digest
	}{
		{nil, []digest.Digest{b.Digest, none.Digest, a.Digest}},
		{[]string{"dangling=true"}, []digest.Digest{none.Digest}},
		{[]string{"dangling=false"}, []digest.Digest{b.Digest, a.Digest}},
		{[]string{"reference=team/*"}, []digest.Digest{b.Digest, a.Digest}},
		{[]string{"reference=team/a"}, []digest.Digest{a.Digest}},
		{[]string{"reference=*/*:2"}, []digest.Digest{a.Digest}},
		{[]string{"reference=team/a", "reference=team/b:1"}, []digest.Digest{b.Digest, a.Digest}},
		{[]string{"reference=nosuch"}, nil},
		{[]string{"label=kind"}, []digest.Digest{none.Digest, a.Digest}},
		{[]string{"label=kind=x"}, []digest.Digest{a.Digest}},
		{[]string{"label!=kind=x"}, []digest.Digest{b.Digest, none.Digest}},
		{[]string{"label!=kind"}, []digest.Digest{b.Digest}},
		{[]string{"label=kind", "dangling=false"}, []digest.Digest{a.Digest}},
		{[]string{"before=team/b:1"}, []digest.Digest{none.Digest, a.Digest}},
		{[]string{"since=team/a:1"}, []digest.Digest{b.Digest, none.Digest}},
		{[]string{"until=24h"}, []digest.Digest{none.Digest, a.Digest}},
		{[]string{"until=2020-01-01T00:30:00Z"}, []digest.Digest{a.Digest}},
	} {
		images, err := s.Filtered(t.Context(), tt.filters)
		var got []digest.Digest
		for _, i := range images {
			got = append(got, i.Digest)
		}
		if d := gocmp.Diff(tt.want, got); d != "" || err != nil {
			t.Errorf("%v: %v %s", tt.filters, err, d)
		}
	}
	for _, bad := range []string{"", "x", "x=y", "dangling=perhaps", "until=soon", "reference=[", "=", "label"} {
		_, err := s.Filtered(t.Context(), []string{bad})
		checkError(t, err, errdefs.IsInvalidArgument)
	}
	_, err := s.Filtered(t.Context(), []string{"before=nosuch"})
	checkError(t, err, errdefs.IsNotFound, "nosuch")
	got, err := References([]string{"docker.io/team/a:1", "docker.io/team/a:2"}, []string{"reference=team/a:2", "dangling=false"})
	if d := gocmp.Diff([]string{"docker.io/team/a:2"}, got); d != "" || err != nil {
		t.Error(err, d)
	}
}

func TestPrune(t *testing.T) {
	s := newStore(t)
	old := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	used := store(t, s, "used:1", dated(t, 1, old, nil))
	free := store(t, s, "free:1", dated(t, 2, old, nil))
	recent := store(t, s, "recent:1", dated(t, 3, time.Now(), nil))
	none := store(t, s, "", dated(t, 4, old, nil))
	usedNone := store(t, s, "", dated(t, 5, old, nil))
	s.SetInUse(func(d digest.Digest) []string {
		if d == used.Digest || d == usedNone.Digest {
			return []string{"web"}
		}
		return nil
	})
	left := func() (all []digest.Digest) {
		images, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range images {
			all = append(all, i.Digest)
		}
		return all
	}
	size := func(i Image) int64 { return i.Size + i.ManifestDesc.Size }

	dry, err := s.Prune(t.Context(), PruneOptions{All: true, DryRun: true})
	if d := gocmp.Diff(size(free)+size(recent)+size(none), dry.Bytes); d != "" || err != nil || len(left()) != 5 || len(dry.Images) != 3 {
		t.Errorf("dry run: %+v, %v, %s", dry, err, d)
	}
	got, err := s.Prune(t.Context(), PruneOptions{})
	if d := gocmp.Diff(Pruned{Images: []digest.Digest{none.Digest}, Blobs: 3, Bytes: size(none)}, got); d != "" || err != nil {
		t.Error(err, d)
	}
	got, err = s.Prune(t.Context(), PruneOptions{All: true, Filters: []string{"until=24h"}})
	want := Pruned{Untagged: []string{"docker.io/library/free:1"}, Images: []digest.Digest{free.Digest}, Blobs: 3, Bytes: size(free)}
	if d := gocmp.Diff(want, got); d != "" || err != nil {
		t.Error(err, d)
	}
	// While somebody is at work nothing goes; it goes when that ends.
	release := s.Hold()
	got, err = s.Prune(t.Context(), PruneOptions{All: true})
	if err != nil || !got.Later || got.Bytes != 0 || len(left()) != 3 {
		t.Errorf("with a hold: %+v, %v", got, err)
	}
	release()
	if d := gocmp.Diff([]digest.Digest{used.Digest, usedNone.Digest}, left()); d != "" && len(left()) != 2 {
		t.Error(d)
	}
	if n := len(blobFiles(t, s)); n != 6 {
		t.Errorf("%d blobs, want those of the two images in use", n)
	}
	_, err = s.Prune(t.Context(), PruneOptions{Filters: []string{"dangling=true"}})
	checkError(t, err, errdefs.IsInvalidArgument, "dangling")
	_ = recent
}

func TestHistory(t *testing.T) {
	img := makeImage(t, "amd64", blob(1, 100), blob(2, 200))
	cf, _ := img.ConfigFile()
	cf = cf.DeepCopy()
	cf.History = []v1.History{{CreatedBy: "ADD a"}, {CreatedBy: "ENV x", EmptyLayer: true}, {CreatedBy: "RUN b", Comment: "c"}, {CreatedBy: "CMD", EmptyLayer: true}}
	img, err := mutate.ConfigFile(img, cf)
	if err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	stored := store(t, s, "app:1", img)
	_, steps, err := s.History(t.Context(), "app:1")
	if err != nil {
		t.Fatal(err)
	}
	want := []Step{
		{ID: stored.Digest, CreatedBy: "CMD"}, {CreatedBy: "RUN b", Comment: "c", Layer: stored.Layers[1].Digest, Size: 200},
		{CreatedBy: "ENV x"}, {CreatedBy: "ADD a", Layer: stored.Layers[0].Digest, Size: 100},
	}
	if d := gocmp.Diff(want, steps); d != "" {
		t.Error(d)
	}
	store(t, s, "bare:1", makeImage(t, "amd64", blob(1, 100), blob(2, 200)))
	if _, steps, err = s.History(t.Context(), "bare:1"); err != nil || len(steps) != 2 || steps[0].Layer != stored.Layers[1].Digest {
		t.Errorf("without a history of its own: %+v, %v", steps, err)
	}
}
