//go:build linux

package child

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/util/resolver/config"
)

const testCert = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// A bundle has the authorities between add and cut, and afterwards is what the step made of it.
func TestAuthorities(t *testing.T) {
	dir := t.TempDir()
	a, err := readAuthorities([]string{write(t, filepath.Join(dir, "ca.pem"), "words before\n"+testCert)})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(a), testCert) || strings.Contains(string(a), "words before") {
		t.Errorf("authorities: %s", a)
	}
	old := time.Now().Add(-time.Hour)
	for name, c := range map[string]struct {
		step    func(root, bundle string)
		want    string
		changed bool
	}{
		"left alone": {func(string, string) {}, "image's\n", false},
		"added to": {func(_, bundle string) {
			f, _ := os.OpenFile(bundle, os.O_APPEND|os.O_WRONLY, 0)
			_, _ = f.WriteString("more\n")
			f.Close()
		}, "image's\nmore\n", true},
		"written anew": {func(_, bundle string) { write(t, bundle+".new", "new\n"); _ = os.Rename(bundle+".new", bundle) }, "new\n", true},
		"removed":      {func(_, bundle string) { _ = os.Remove(bundle) }, "", true},
		"made a link": {func(root, bundle string) {
			_ = os.Rename(bundle, filepath.Join(root, "elsewhere"))
			_ = os.Symlink("/elsewhere", bundle)
		}, "image's\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			bundle := write(t, filepath.Join(root, bundlePaths[0]), "image's\n")
			if err := os.Chtimes(bundle, old, old); err != nil {
				t.Fatal(err)
			}
			// As on Alpine: one file by two names.
			if err := os.Symlink("certs/ca-certificates.crt", filepath.Join(root, "/etc/ssl/cert.pem")); err != nil {
				t.Fatal(err)
			}
			added := map[string]change{}
			if err := a.add(root, added); err != nil {
				t.Fatal(err)
			}
			if during, _ := os.ReadFile(bundle); string(during) != "image's\n"+string(a) {
				t.Errorf("during the step: %s", during)
			}
			c.step(root, bundle)
			if err := a.cut(root, added); err != nil {
				t.Fatal(err)
			}
			after, err := os.ReadFile(strings.Replace(bundle, bundlePaths[0], map[bool]string{true: "/elsewhere", false: bundlePaths[0]}[name == "made a link"], 1))
			if string(after) != c.want && !(c.want == "" && os.IsNotExist(err)) {
				t.Errorf("after the step: %q, want %q", after, c.want)
			}
			if info, err := os.Stat(bundle); err == nil && name == "left alone" && !info.ModTime().Equal(old) {
				t.Errorf("the file that was left alone is of %s", info.ModTime())
			}
		})
	}
}

// An image's links do not lead out of its root.
func TestAuthoritiesStayInside(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	victim := write(t, filepath.Join(outside, "certs/ca-certificates.crt"), "host's\n")
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(root, "etc/ssl")); err != nil {
		t.Fatal(err)
	}
	added := map[string]change{}
	if err := authorities("x").add(root, added); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(victim); string(data) != "host's\n" {
		t.Errorf("the host's file was changed: %q", data)
	}
}

func TestNoAuthorities(t *testing.T) {
	if _, err := readAuthorities([]string{write(t, filepath.Join(t.TempDir(), "x"), "nothing")}); err == nil {
		t.Error("a file without a certificate was taken")
	}
	if _, err := readAuthorities([]string{"/nowhere"}); err == nil {
		t.Error("a missing file was taken")
	}
}

func TestRegistryConfig(t *testing.T) {
	yes := true
	got := registryConfig(map[string]Registry{
		"docker.io": {Mirrors: []string{"http://mirror:5000/hub/", "https://second"}},
		"own:1":     {Insecure: true, CA: "/ca.pem"},
	})
	want := map[string]config.RegistryConfig{
		"docker.io":   {Mirrors: []string{"mirror:5000/hub", "second"}},
		"mirror:5000": {PlainHTTP: &yes},
		"own:1":       {Insecure: &yes, RootCAs: []string{"/ca.pem"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
