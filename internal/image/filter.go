package image

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/atollvm/atoll/internal/hint"
)

// The filters that images are listed and pruned by.
var (
	listFilters  = []string{"before", "dangling", "label", "label!", "reference", "since", "until"}
	pruneFilters = []string{"label", "label!", "until"}
)

// Filtered is List with filters, each key=value: before=IMAGE, since=IMAGE, dangling=BOOL, label=KEY[=VALUE], label!=KEY[=VALUE],
// reference=PATTERN, until=TIME or DURATION. An image must meet all of them, and one of several references.
func (s *Store) Filtered(ctx context.Context, filters []string) ([]Image, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	keep, err := s.filter(ctx, filters, listFilters)
	if err != nil {
		return nil, fmt.Errorf("listing images: %w", err)
	}
	return slices.DeleteFunc(all, func(i Image) bool { return !keep(i) }), nil
}

// References returns those of the references that reference filters let through; all, where there is no such filter.
func References(references, filters []string) ([]string, error) {
	var patterns []string
	for _, f := range filters {
		if key, value, _ := strings.Cut(f, "="); key == "reference" {
			patterns = append(patterns, value)
		}
	}
	if len(patterns) == 0 {
		return references, nil
	}
	var kept []string
	for _, name := range references {
		for _, p := range patterns {
			ok, err := matchesReference(p, name)
			if err != nil {
				return nil, err
			}
			if ok {
				kept = append(kept, name)
				break
			}
		}
	}
	return kept, nil
}

func matchesReference(pattern, name string) (bool, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return false, nil
	}
	ok, err := reference.FamiliarMatch(pattern, named)
	if err != nil {
		return false, hint.With(fmt.Errorf("filter reference=%q: %w: %w", pattern, err, errdefs.ErrInvalidArgument), "a pattern looks like debian or team/*:1.*")
	}
	return ok, nil
}

func (s *Store) filter(ctx context.Context, filters, allowed []string) (keep func(Image) bool, err error) {
	var terms []func(Image) bool
	if _, err := References(nil, filters); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(filters, func(f string) bool { return strings.HasPrefix(f, "reference=") }) {
		if _, err := References([]string{"docker.io/library/x:y"}, filters); err != nil { // a bad pattern shows by its use
			return nil, err
		}
		terms = append(terms, func(i Image) bool {
			kept, _ := References(i.References, filters)
			return len(kept) > 0
		})
	}
	for _, f := range filters {
		key, value, ok := strings.Cut(f, "=")
		if !ok || !slices.Contains(allowed, key) {
			return nil, hint.With(fmt.Errorf("filter %q: %w", f, errdefs.ErrInvalidArgument), "filters are key=value; the keys are %s", strings.Join(allowed, ", "))
		}
		var term func(Image) bool
		switch key {
		case "reference":
			continue
		case "dangling":
			want, err := strconv.ParseBool(value)
			if err != nil {
				return nil, hint.With(fmt.Errorf("filter %q: %w", f, errdefs.ErrInvalidArgument), "write dangling=true or dangling=false")
			}
			term = func(i Image) bool { return (len(i.References) == 0) == want }
		case "label", "label!":
			label, want, valued := strings.Cut(value, "=")
			term = func(i Image) bool {
				got, ok := i.Config.Config.Labels[label]
				return (ok && (!valued || got == want)) == (key == "label")
			}
		case "before", "since":
			other, err := s.Resolve(ctx, value, "")
			if err != nil {
				return nil, fmt.Errorf("filter %q: %w", f, err)
			}
			term = func(i Image) bool {
				return key == "before" && i.Created.Before(other.Created) || key == "since" && i.Created.After(other.Created)
			}
		case "until":
			at, err := moment(value)
			if err != nil {
				return nil, hint.With(fmt.Errorf("filter %q: %w", f, errdefs.ErrInvalidArgument), "write until=24h or until=2026-01-31 or until=2026-01-31T12:00:00Z")
			}
			term = func(i Image) bool { return i.Created.Before(at) }
		}
		terms = append(terms, term)
	}
	return func(i Image) bool {
		return !slices.ContainsFunc(terms, func(t func(Image) bool) bool { return !t(i) })
	}, nil
}

// moment reads a point in time, or how long ago it was.
func moment(s string) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return time.Now().Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	seconds, err := strconv.ParseInt(s, 10, 64)
	return time.Unix(seconds, 0), err
}
