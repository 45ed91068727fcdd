package machine

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/atollvm/atoll/internal/health"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// filterKeys are those of docker ps that a machine has.
var filterKeys = []string{"ancestor", "before", "exited", "expose", "health", "id", "label", "name", "network", "publish", "since", "status"}

// Filter chooses machines. Of several filters with one key one must hold, of labels all; different keys must all hold.
type Filter struct {
	All   bool // also machines that do not run are meant
	terms map[string][]func(*Machine) bool
}

// ParseFilters reads filters as docker ps has them, each key=value.
func (ms *Machines) ParseFilters(filters []string) (Filter, error) {
	f := Filter{terms: map[string][]func(*Machine) bool{}}
	for _, text := range filters {
		key, value, ok := strings.Cut(text, "=")
		if !ok || !slices.Contains(filterKeys, key) {
			return f, hint.With(fmt.Errorf("filter %q: %w", shorten(text), errdefs.ErrInvalidArgument),
				"filters are key=value; the keys are %s", strings.Join(filterKeys, ", "))
		}
		term, err := ms.term(key, value)
		if err != nil {
			return f, fmt.Errorf("filter %q: %w", shorten(text), err)
		}
		if key == "label" {
			key = text // each of them on its own
		}
		f.terms[key] = append(f.terms[key], term)
		f.All = f.All || key == "status" || key == "exited"
	}
	return f, nil
}

// Keeps says whether a machine is chosen.
func (f Filter) Keeps(m *Machine) bool {
	for _, terms := range f.terms {
		if !slices.ContainsFunc(terms, func(t func(*Machine) bool) bool { return t(m) }) {
			return false
		}
	}
	return true
}

func (ms *Machines) term(key, value string) (func(*Machine) bool, error) {
	switch key {
	case "ancestor":
		return ancestor(value), nil
	case "before", "since":
		other, err := ms.Get(value)
		if err != nil {
			return nil, err
		}
		return func(m *Machine) bool {
			return key == "before" && m.Created.Before(other.Created) || key == "since" && m.Created.After(other.Created)
		}, nil
	case "exited":
		code, err := strconv.Atoi(value)
		if err != nil {
			return nil, hint.With(fmt.Errorf("exit code %q: %w", value, errdefs.ErrInvalidArgument), "write exited=0")
		}
		return func(m *Machine) bool { return m.State == Stopped && m.ExitCode == code }, nil
	case "expose", "publish":
		return port(key, value)
	case "health":
		return healthIs(value)
	case "id":
		return func(m *Machine) bool { return strings.HasPrefix(string(m.ID), value) }, nil
	case "label":
		label, want, valued := strings.Cut(value, "=")
		return func(m *Machine) bool {
			got, ok := m.Spec.Labels[label]
			return ok && (!valued || got == want)
		}, nil
	case "name":
		form, err := regexp.Compile(value)
		if err != nil {
			return nil, hint.With(fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument), "a name is a part of one, or a regular expression")
		}
		return func(m *Machine) bool { return form.MatchString(m.Spec.Name) }, nil
	case "network":
		return func(m *Machine) bool { return m.Spec.Network == value }, nil
	}
	return status(value)
}

// ancestor is the image: by reference, or by the digits of its digest.
func ancestor(value string) func(*Machine) bool {
	digits := strings.TrimPrefix(value, "sha256:")
	name := familiar(value)
	return func(m *Machine) bool {
		if m.Disk != nil {
			return false // it has no image, and so no digest
		}
		return familiar(m.Image.Reference) == name || len(digits) >= 4 && strings.HasPrefix(m.Image.Digest.Encoded(), digits)
	}
}

func familiar(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(reference.TagNameOnly(named))
}

func port(key, value string) (func(*Machine) bool, error) {
	wanted, err := network.ParsePort(value)
	if err != nil {
		return nil, err
	}
	protocol := strings.Contains(value, "/")
	among := func(ports []network.PortMapping) bool {
		return slices.ContainsFunc(ports, func(p network.PortMapping) bool {
			return slices.ContainsFunc(wanted, func(w network.PortMapping) bool {
				return p.GuestPort == w.GuestPort && (!protocol || p.Protocol == w.Protocol)
			})
		})
	}
	return func(m *Machine) bool {
		if key == "publish" {
			return among(m.Ports)
		}
		exposed, _ := exposedPorts(m.Image.ExposedPorts)
		return among(exposed) || among(m.Spec.Ports)
	}, nil
}

// noHealth is Docker's word for a machine without a check.
const noHealth = "none"

func healthIs(value string) (func(*Machine) bool, error) {
	all := []string{noHealth, string(health.Starting), string(health.Healthy), string(health.Unhealthy)}
	if !slices.Contains(all, value) {
		return nil, hint.With(fmt.Errorf("health %q: %w", value, errdefs.ErrInvalidArgument), "it is one of %s", strings.Join(all, ", "))
	}
	return func(m *Machine) bool {
		if m.Health == nil {
			return value == noHealth
		}
		return string(m.Health.Status) == value
	}, nil
}

func status(value string) (func(*Machine) bool, error) {
	if value == "exited" { // Docker's word
		value = string(Stopped)
	}
	all := []State{Created, Starting, Running, Paused, Stopping, Stopped, Failed}
	if !slices.Contains(all, State(value)) {
		return nil, hint.With(fmt.Errorf("status %q: %w", value, errdefs.ErrInvalidArgument), "it is one of %s", strings.Trim(fmt.Sprint(all), "[]"))
	}
	return func(m *Machine) bool { return m.State == State(value) }, nil
}
