package ref

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
)

const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		in       string
		want     Ref
		familiar string
	}{
		{"debian", Ref{"docker.io/library/debian", "latest", ""}, "debian:latest"},
		{"debian:bookworm", Ref{"docker.io/library/debian", "bookworm", ""}, "debian:bookworm"},
		{"x/postgres:13-alpine", Ref{"docker.io/x/postgres", "13-alpine", ""}, "x/postgres:13-alpine"},
		{"docker.io/library/debian:12", Ref{"docker.io/library/debian", "12", ""}, "debian:12"},
		{"index.docker.io/a/b", Ref{"docker.io/a/b", "latest", ""}, "a/b:latest"},
		{"localhost/app", Ref{"localhost/app", "latest", ""}, "localhost/app:latest"},
		{"localhost:5000/a/b/c:V1", Ref{"localhost:5000/a/b/c", "V1", ""}, "localhost:5000/a/b/c:V1"},
		{"[::1]:5000/a", Ref{"[::1]:5000/a", "latest", ""}, "[::1]:5000/a:latest"},
		{"debian@" + sum, Ref{"docker.io/library/debian", "", sum}, "debian@" + sum},
		{"debian:12@" + sum, Ref{"docker.io/library/debian", "12", sum}, "debian:12@" + sum},
		{"r.example/library/x", Ref{"r.example/library/x", "latest", ""}, "r.example/library/x:latest"},
	} {
		got, err := Parse(tt.in)
		if err != nil {
			t.Errorf("Parse(%q): %v", tt.in, err)
			continue
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("Parse(%q): %s", tt.in, d)
		}
		if got.Familiar() != tt.familiar {
			t.Errorf("Parse(%q).Familiar() = %q, want %q", tt.in, got.Familiar(), tt.familiar)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for in, part := range map[string]string{
		"Debian":                        `"Debian" has upper case`,
		"Foo/bar:1":                     `"Foo" has upper case`,
		"ghcr.io/Team/app":              `"Team" has upper case`,
		"":                              "invalid reference format",
		"debian ":                       "invalid reference format",
		" debian":                       "invalid reference format",
		"debian:":                       "invalid reference format",
		"a//b":                          "invalid reference format",
		"../x":                          "invalid reference format",
		"debian:" + longTag:             "invalid reference format",
		"debian@sha256:abc":             "invalid",
		"-x":                            "invalid reference format",
		"a/" + strings.Repeat("b", 300): "must not be more than 255",
		sum[len("sha256:"):]:            "64-byte hexadecimal",
	} {
		_, err := Parse(in)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), part) || hint.Of(err) == "" {
			t.Errorf("Parse(%q) = %v (hint %q), want an invalid argument with %q and a hint", in, err, hint.Of(err), part)
		}
	}
}

var longTag = strings.Repeat("t", 129)

func FuzzParse(f *testing.F) {
	for _, s := range []string{"debian", "a/b:c", "localhost:5000/x@" + sum, "[::1]:1/a", "docker.io/a/library/b", "Foo/x", "index.docker.io/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Parse(s)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("%q: class of %v", s, err)
			}
			return
		}
		for _, form := range []string{r.String(), r.Familiar()} {
			again, err := Parse(form)
			if err != nil || again != r {
				t.Fatalf("%q: %q parses to %+v, %v; want %+v", s, form, again, err, r)
			}
		}
		named, err := reference.ParseNormalizedNamed(s)
		if err != nil {
			t.Fatal(err)
		}
		if want := reference.FamiliarString(reference.TagNameOnly(named)); r.Familiar() != want {
			t.Fatalf("%q: familiar %q, the library says %q", s, r.Familiar(), want)
		}
	})
}
