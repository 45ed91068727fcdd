//go:build linux

package child

import (
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atollvm/atoll/internal/image"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/resolver"
	"github.com/moby/buildkit/util/resolver/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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

// A bundle that is too large to look into fails the step, unless it was so before and got nothing.
func TestAuthoritiesInLargeBundle(t *testing.T) {
	a := authorities("authorities")
	for name, c := range map[string]struct {
		before, after int64
		got, fails    bool
	}{
		"grown":             {before: 10, after: maxBundle + 1, got: true, fails: true},
		"large before":      {before: maxBundle + 1, after: maxBundle + 1},
		"large with them":   {before: maxBundle - 1, after: maxBundle - 1},
		"just large enough": {before: maxBundle - int64(len(a)), after: maxBundle, got: true},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			bundle := write(t, filepath.Join(root, bundlePaths[0]), "")
			if err := os.Truncate(bundle, c.before); err != nil {
				t.Fatal(err)
			}
			added := map[string]change{}
			if err := a.add(root, added); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Stat(bundle); err != nil || (info.Size() > c.before) != c.got {
				t.Fatalf("with authorities: %v, %v", info, err)
			}
			if err := os.Truncate(bundle, c.after); err != nil {
				t.Fatal(err)
			}
			err := a.cut(root, added)
			if !c.fails {
				if info, statErr := os.Stat(bundle); err != nil || statErr != nil || info.Size() != c.before {
					t.Errorf("after the step: %v, %v, %v", info, statErr, err)
				}
			} else if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), bundlePaths[0]+" has grown to 16777217 bytes") {
				t.Errorf("a bundle that has grown: %v", err)
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
	yes, no := true, false
	got := registryConfig(map[string]image.Registry{
		"docker.io":  {Mirrors: []string{"http://mirror:5000/hub/", "https://second"}},
		"insecure:1": {Insecure: true, CA: "/ca.pem"},
		"own:1":      {CA: "/ca.pem"},
	})
	want := map[string]config.RegistryConfig{
		"docker.io":   {Mirrors: []string{"mirror:5000/hub", "second"}},
		"mirror:5000": {PlainHTTP: &yes},
		"insecure:1":  {Insecure: &yes, PlainHTTP: &yes, RootCAs: []string{"/ca.pem"}},
		"own:1":       {PlainHTTP: &no, RootCAs: []string{"/ca.pem"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// A registry's own settings hold for its token server too, which BuildKit asks through the client of our store.
func TestTokensBySettings(t *testing.T) {
	for name, c := range map[string]struct {
		plain, mirror bool
		settings      func(ca string) image.Registry
		fails         string
	}{
		"ca":                   {settings: func(ca string) image.Registry { return image.Registry{CA: ca} }},
		"ca of a mirror":       {mirror: true, settings: func(ca string) image.Registry { return image.Registry{CA: ca} }},
		"insecure":             {settings: func(string) image.Registry { return image.Registry{Insecure: true} }},
		"insecure, plain HTTP": {plain: true, settings: func(string) image.Registry { return image.Registry{Insecure: true} }},
		"no setting":           {settings: func(string) image.Registry { return image.Registry{} }, fails: "x509"},
	} {
		t.Run(name, func(t *testing.T) {
			tokens := 0
			mux := http.NewServeMux()
			mux.HandleFunc("/token", func(w http.ResponseWriter, _ *http.Request) {
				tokens++
				_, _ = io.WriteString(w, `{"token":"pass"}`)
			})
			mux.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") != "Bearer pass" {
					scheme := map[bool]string{true: "https", false: "http"}[r.TLS != nil]
					w.Header().Set("WWW-Authenticate", `Bearer realm="`+scheme+"://"+r.Host+`/token",service="x"`)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				w.Header().Set("Docker-Content-Digest", digest.FromString("manifest").String())
				w.Header().Set("Content-Length", "8")
			})
			server := httptest.NewUnstartedServer(mux)
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			if c.plain {
				server.Start()
			} else {
				server.StartTLS()
			}
			t.Cleanup(server.Close)
			_, port, err := net.SplitHostPort(server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			// Loopback as well, but BuildKit does not know it, so its own rule for 127.0.0.1 is out of the way.
			host := "0.0.0.0:" + port
			if strings.HasPrefix(name, "ca") {
				host = "127.0.0.1:" + port
			}
			ca := ""
			if !c.plain {
				ca = write(t, filepath.Join(t.TempDir(), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
			}
			settings, asked := map[string]image.Registry{host: c.settings(ca)}, host
			if c.mirror {
				asked = "registry.invalid"
				settings[asked] = image.Registry{Mirrors: []string{"https://" + host}}
			}
			sessions, err := session.NewManager()
			if err != nil {
				t.Fatal(err)
			}
			r := resolver.NewPool().GetResolver(newStore(nil, settings).hosts, asked+"/a:1", resolver.ScopeType{}, sessions, session.NewGroup())
			_, desc, err := r.Resolve(t.Context(), asked+"/a:1")
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("resolving a:1: %v, want %s", err, c.fails)
				}
				return
			}
			if err != nil || desc.Digest != digest.FromString("manifest") || tokens == 0 {
				t.Errorf("resolving a:1: %v, %v, %d tokens", desc, err, tokens)
			}
		})
	}
}
