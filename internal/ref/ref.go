// Package ref parses image references by the distribution grammar: [host[:port]/]path[:tag][@digest]. A short name is completed
// as Docker does it (debian is docker.io/library/debian:latest); nothing is ever cut or changed otherwise. A leaf: every room may import it.
package ref

import (
	"fmt"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/hint"
)

// Ref is a complete reference. Tag is "latest" where neither tag nor digest was given; both may be set.
type Ref struct {
	Name   string // with the registry's host: docker.io/library/debian
	Tag    string
	Digest digest.Digest
}

// Parse reads a reference. Its errors are errdefs.ErrInvalidArgument.
func Parse(s string) (Ref, error) {
	if err := checkCase(s); err != nil {
		return Ref{}, err
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Ref{}, invalid(s, err.Error(), "a reference looks like debian:bookworm or registry.example.com:5000/team/app:1.2; an ID like sha256:<64 hex digits>")
	}
	named = reference.TagNameOnly(named)
	r := Ref{Name: named.Name()}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		r.Digest = d.Digest()
	}
	return r, nil
}

// checkCase exists because the grammar takes Foo/bar for an image on a host called Foo, which nobody ever means.
func checkCase(s string) error {
	name, _, _ := strings.Cut(s, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	for _, part := range strings.Split(name, "/") {
		if strings.ContainsFunc(part, unicode.IsUpper) {
			return invalid(s, fmt.Sprintf("the part %q has upper case letters, names are lower case", part), "write "+strings.ToLower(name)+s[len(name):])
		}
	}
	return nil
}

func invalid(s, why, next string) error {
	return hint.With(fmt.Errorf("image reference %q: %s: %w", s, why, errdefs.ErrInvalidArgument), "%s", next)
}

// String returns the whole reference: docker.io/library/debian:bookworm.
func (r Ref) String() string { return r.Name + r.suffix() }

// Familiar returns the reference as people write it: debian:bookworm.
func (r Ref) Familiar() string {
	short, official := strings.CutPrefix(r.Name, "docker.io/")
	if path, library := strings.CutPrefix(short, "library/"); official && library && !strings.Contains(path, "/") {
		short = path
	}
	return short + r.suffix()
}

// Host returns the registry's host, with its port where there is one.
func (r Ref) Host() string {
	host, _, _ := strings.Cut(r.Name, "/")
	return host
}

func (r Ref) suffix() string {
	var s string
	if r.Tag != "" {
		s = ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}
