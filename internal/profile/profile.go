// Package profile keeps settings of machines under names, and lays them under what a new machine asks for itself.
// It speaks the API's MachineSpec, as which settings are set at all is known there; what they mean is machine's.
// Imported by server and daemon. A Store is safe for concurrent use.
package profile

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/state"
)

// Profile is settings under a name.
type Profile struct {
	Name    string
	Source  []byte // as its user wrote it; may be empty
	Spec    *atollv1.MachineSpec
	Created time.Time
	Updated time.Time
}

// record is a Profile as it is stored.
type record struct {
	Source  []byte
	Spec    []byte // marshalled
	Created time.Time
	Updated time.Time
}

// Store keeps the profiles.
type Store struct {
	defaults *atollv1.MachineSpec

	mu      sync.Mutex // one change at a time
	records *state.Collection[record]
}

// mostBytes bounds one profile; user-data may be in it.
const mostBytes = 4 << 20

var nameForm = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)

// Open opens the profiles of a state. defaults lie under every profile and machine; its own Profiles hold for machines that name none.
func Open(db *state.DB, defaults *atollv1.MachineSpec) (*Store, error) {
	records, err := state.Of[record](db, "profiles")
	return &Store{defaults: defaults, records: records}, err
}

// PutOptions says when a Put may happen.
type PutOptions struct {
	Create   bool   // only where there is none of that name
	Replaces []byte // not empty: only where this is the source now
}

// Put stores a profile.
func (s *Store) Put(name string, source []byte, spec *atollv1.MachineSpec, o PutOptions) (Profile, error) {
	if !nameForm.MatchString(name) {
		return Profile{}, hint.With(fmt.Errorf("profile name %q: %w", name[:min(len(name), 80)], errdefs.ErrInvalidArgument),
			"a name starts with a letter or digit, goes on with letters, digits, '_', '.', '-', and has at most 63 characters")
	}
	if err := check(spec); err != nil {
		return Profile{}, fmt.Errorf("profile %q: %w", name, err)
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec)
	if err != nil {
		return Profile{}, fmt.Errorf("profile %q: %w", name, err)
	}
	if len(data)+len(source) > mostBytes {
		return Profile{}, fmt.Errorf("profile %q: %d bytes are more than a profile may have (%d): %w", name, len(data)+len(source), mostBytes, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now().UTC()
	r := record{Source: source, Spec: data, Created: now, Updated: now}
	old, err := s.records.Get(name)
	switch {
	case errdefs.IsNotFound(err) && len(o.Replaces) > 0:
		return Profile{}, notFound(name)
	case errdefs.IsNotFound(err):
	case err != nil:
		return Profile{}, err
	case o.Create:
		return Profile{}, hint.With(fmt.Errorf("profile %q is there already: %w", name, errdefs.ErrAlreadyExists), "change it: atoll profile edit %s", name)
	case len(o.Replaces) > 0 && !bytes.Equal(o.Replaces, old.Source):
		return Profile{}, hint.With(fmt.Errorf("profile %q was changed meanwhile: %w", name, errdefs.ErrAborted), "look at it and edit it again: atoll profile edit %s", name)
	default:
		r.Created = old.Created
	}
	if err := s.records.Put(name, r); err != nil {
		return Profile{}, err
	}
	return Profile{Name: name, Source: source, Spec: spec, Created: r.Created, Updated: r.Updated}, nil
}

// check refuses what is one machine's own.
func check(spec *atollv1.MachineSpec) error {
	var faults []error
	for _, own := range []struct {
		field string
		set   bool
	}{
		{"name", spec.GetName() != ""}, {"image", spec.GetImage() != ""}, {"disk", spec.GetDisk() != ""}, {"command", len(spec.GetCommand()) > 0},
		{"tty", spec.GetTty()}, {"stdin", spec.GetStdin()}, {"remove", spec.GetRemove()}, {"platform", spec.GetPlatform() != ""},
		{"profiles", len(spec.GetProfiles()) > 0},
	} {
		if own.set {
			faults = append(faults, fmt.Errorf("%s is a machine's own and cannot be in a profile: %w", own.field, errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(faults...)
}

func notFound(name string) error {
	return hint.With(fmt.Errorf("profile %q: %w", name, errdefs.ErrNotFound), "list them: atoll profile ls")
}

// Get returns the profile of that name, or errdefs.ErrNotFound.
func (s *Store) Get(name string) (Profile, error) {
	r, err := s.records.Get(name)
	if errdefs.IsNotFound(err) {
		return Profile{}, notFound(name)
	}
	if err != nil {
		return Profile{}, err
	}
	return r.profile(name)
}

func (r record) profile(name string) (Profile, error) {
	spec := &atollv1.MachineSpec{}
	if err := proto.Unmarshal(r.Spec, spec); err != nil {
		return Profile{}, fmt.Errorf("reading profile %q: %w", name, err)
	}
	return Profile{Name: name, Source: r.Source, Spec: spec, Created: r.Created, Updated: r.Updated}, nil
}

// List returns the profiles by name.
func (s *Store) List() ([]Profile, error) {
	all, err := s.records.All()
	if err != nil {
		return nil, err
	}
	var out []Profile
	for _, name := range slices.Sorted(maps.Keys(all)) {
		p, err := all[name].profile(name)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// Remove removes a profile. Machines that were made with it keep what they got.
func (s *Store) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.Get(name); err != nil {
		return err
	}
	return s.records.Delete(name)
}

// Apply returns the spec with what its profiles and the defaults set beside it. The spec beats its profiles, a later one of those an
// earlier one, and they the defaults.
func (s *Store) Apply(spec *atollv1.MachineSpec) (*atollv1.MachineSpec, error) {
	names := spec.GetProfiles()
	if len(names) == 0 {
		names = s.defaults.GetProfiles()
	}
	out := proto.CloneOf(s.defaults)
	if out == nil {
		out = &atollv1.MachineSpec{}
	}
	if spec.GetDisk() != "" { // these two are meant for images; a disk image has a kernel and a size of its own
		out.Kernel, out.DiskBytes = "", 0
	}
	for _, name := range names {
		p, err := s.Get(name)
		if err != nil {
			return nil, err
		}
		lay(out, p.Spec)
	}
	lay(out, spec)
	out.Profiles = names
	return out, nil
}

// lay puts over upon under: single values replace, lists and maps join, but for those where one list means the whole.
func lay(under, over *atollv1.MachineSpec) {
	if over.GetSetEntrypoint() || len(over.GetCommand()) > 0 {
		under.Command = nil
	}
	replaceWhole(under.ProtoReflect(), over.ProtoReflect(), "entrypoint", "dns", "dns_search", "dns_options")
	replaceWhole(under.GetHealthCheck().ProtoReflect(), over.GetHealthCheck().ProtoReflect(), "test")
	replaceWhole(under.GetProvisioning().ProtoReflect(), over.GetProvisioning().ProtoReflect(), "ntp_servers", "ssh_host_keys")
	under.Ulimits = without(under.GetUlimits(), over.GetUlimits(), (*atollv1.Ulimit).GetName)
	under.Tmpfs = without(under.GetTmpfs(), over.GetTmpfs(), (*atollv1.Tmpfs).GetPath)
	if p := under.GetProvisioning(); p != nil {
		q := over.GetProvisioning()
		p.Users = without(p.GetUsers(), q.GetUsers(), (*atollv1.User).GetName)
		p.Files = without(p.GetFiles(), q.GetFiles(), (*atollv1.File).GetPath)
		p.Mounts = without(p.GetMounts(), q.GetMounts(), (*atollv1.FileSystemMount).GetPath)
		p.Secrets = without(p.GetSecrets(), q.GetSecrets(), (*atollv1.Secret).GetName)
	}
	if over.ReadOnly != nil {
		under.ReadOnly = nil
	}
	under.Env = without(under.GetEnv(), over.GetEnv(), func(e string) string { k, _, _ := strings.Cut(e, "="); return k })
	proto.Merge(under, over)
}

// replaceWhole empties those lists of under that over has.
func replaceWhole(under, over protoreflect.Message, fields ...protoreflect.Name) {
	if !under.IsValid() || !over.IsValid() {
		return
	}
	for _, name := range fields {
		if f := over.Descriptor().Fields().ByName(name); over.Has(f) {
			under.Clear(f)
		}
	}
}

// without leaves out what over has under the same key.
func without[T any](under, over []T, key func(T) string) []T {
	return slices.DeleteFunc(under, func(u T) bool {
		return slices.ContainsFunc(over, func(o T) bool { return key(o) == key(u) })
	})
}
