package profile

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/state"
)

func open(t *testing.T, defaults *atollv1.MachineSpec) *Store {
	t.Helper()
	db, err := state.Open(filepath.Join(t.TempDir(), "s.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	s, err := Open(db, defaults)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, name string, spec *atollv1.MachineSpec) {
	t.Helper()
	if _, err := s.Put(name, []byte(name), spec, PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestApplyOrder(t *testing.T) {
	s := open(t, &atollv1.MachineSpec{Cpus: 1, MemoryBytes: 1, Kernel: "default", Profiles: []string{"base"}})
	put(t, s, "base", &atollv1.MachineSpec{
		MemoryBytes: 2, DiskBytes: 2, Env: []string{"A=base", "B=base"}, Dns: []string{"10.0.0.1"}, Labels: map[string]string{"a": "base", "b": "base"},
		ReadOnly: proto.Bool(true), Entrypoint: []string{"/base"}, SetEntrypoint: true,
		HealthCheck: &atollv1.HealthCheck{Test: []string{"CMD", "base"}, Retries: 7},
		Ulimits:     []*atollv1.Ulimit{{Name: "nofile", Soft: 1, Hard: 1}, {Name: "nproc", Soft: 1, Hard: 1}},
	})
	put(t, s, "more", &atollv1.MachineSpec{DiskBytes: 3, Env: []string{"B=more"}, Labels: map[string]string{"b": "more"}})

	got, err := s.Apply(&atollv1.MachineSpec{
		Name: "m", Image: "i", Cpus: 4, Env: []string{"A=own"}, Dns: []string{"10.0.0.2"}, Labels: map[string]string{"c": "own"}, Profiles: []string{"base", "more"},
		ReadOnly: proto.Bool(false), Entrypoint: []string{"/own"}, SetEntrypoint: true, HealthCheck: &atollv1.HealthCheck{Test: []string{"CMD", "own"}},
		Ulimits: []*atollv1.Ulimit{{Name: "nofile", Soft: 9, Hard: 9}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := &atollv1.MachineSpec{
		Name: "m", Image: "i", Cpus: 4, MemoryBytes: 2, DiskBytes: 3, Kernel: "default", Env: []string{"B=more", "A=own"}, Dns: []string{"10.0.0.2"},
		Labels: map[string]string{"a": "base", "b": "more", "c": "own"}, Profiles: []string{"base", "more"}, ReadOnly: proto.Bool(false),
		Entrypoint: []string{"/own"}, SetEntrypoint: true, HealthCheck: &atollv1.HealthCheck{Test: []string{"CMD", "own"}, Retries: 7},
		Ulimits: []*atollv1.Ulimit{{Name: "nproc", Soft: 1, Hard: 1}, {Name: "nofile", Soft: 9, Hard: 9}},
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Error(d)
	}

	got, err = s.Apply(&atollv1.MachineSpec{Image: "i"}) // names none: the defaults'
	if err != nil || got.GetMemoryBytes() != 2 || got.GetCpus() != 1 {
		t.Errorf("with the default profile: %v, %v", got, err)
	}
	got, err = s.Apply(&atollv1.MachineSpec{Disk: "/d"}) // has a kernel and a size of its own
	if err != nil || got.GetMemoryBytes() != 2 || got.GetKernel() != "" {
		t.Errorf("for a disk image: %v, %v", got, err)
	}
	if s.defaults.GetImage() != "" || len(s.defaults.GetEnv()) != 0 {
		t.Error("applying changed the defaults")
	}
	if p, err := s.Get("base"); err != nil || len(p.Spec.GetEnv()) != 2 {
		t.Errorf("applying changed the profile: %v, %v", p.Spec, err)
	}
}

func TestPut(t *testing.T) {
	s := open(t, nil)
	put(t, s, "web", &atollv1.MachineSpec{Cpus: 2})
	spec := &atollv1.MachineSpec{Cpus: 3}
	if _, err := s.Put("web", nil, spec, PutOptions{Create: true}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("creating it again: %v", err)
	}
	if _, err := s.Put("web", nil, spec, PutOptions{Replaces: []byte("older")}); !errdefs.IsAborted(err) {
		t.Errorf("replacing what it is not any more: %v", err)
	}
	if _, err := s.Put("gone", nil, spec, PutOptions{Replaces: []byte("x")}); !errdefs.IsNotFound(err) {
		t.Errorf("replacing what is gone: %v", err)
	}
	if _, err := s.Put("web", []byte("new"), spec, PutOptions{Replaces: []byte("web")}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"", "../x", "a b", strings.Repeat("x", 64)} {
		if _, err := s.Put(name, nil, spec, PutOptions{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := s.Put("own", nil, &atollv1.MachineSpec{Image: "x", Name: "y"}, PutOptions{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "image") || !strings.Contains(err.Error(), "name is") {
		t.Errorf("a machine's own: %v", err)
	}
	if _, err := s.Put("big", make([]byte, mostBytes+1), spec, PutOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too large: %v", err)
	}
	all, err := s.List()
	if err != nil || len(all) != 1 || all[0].Spec.GetCpus() != 3 || string(all[0].Source) != "new" || !all[0].Created.Before(all[0].Updated) {
		t.Errorf("after all: %+v, %v", all, err)
	}
	if err := s.Remove("web"); err != nil {
		t.Error(err)
	}
	if err := s.Remove("web"); !errdefs.IsNotFound(err) {
		t.Errorf("removing it again: %v", err)
	}
	if _, err := s.Apply(&atollv1.MachineSpec{Profiles: []string{"web"}}); !errdefs.IsNotFound(err) {
		t.Errorf("applying what is gone: %v", err)
	}
}
