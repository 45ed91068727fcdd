package image

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
)

// evil is a registry of one image that misbehaves as told. It is spoken to by the real client.
type evil struct {
	img      smallImage
	manifest string                                              // under the tag; default: the image's
	kind     string                                              // its media type
	blobs    map[digest.Digest]string                            // more content
	meddle   func(w http.ResponseWriter, r *http.Request) bool   // true: it has answered
	body     func(d digest.Digest, content string) (string, int) // what is sent for a blob, and the Content-Length claimed
}

func (e *evil) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if e.meddle != nil && e.meddle(w, r) {
		return
	}
	parts := strings.Split(r.URL.Path, "/")
	id := parts[len(parts)-1]
	content, ok := e.blobs[digest.Digest(id)]
	switch {
	case r.URL.Path == "/v2/":
		return
	case id == "1":
		content, ok = e.manifest, true
	}
	for _, c := range []string{e.img.layer, e.img.config, e.img.manifest} {
		if digest.FromString(c).String() == id {
			content, ok = c, true
		}
	}
	if !ok {
		http.NotFound(w, r)
		return
	}
	h, length := w.Header(), len(content)
	h.Set("Docker-Content-Digest", digest.FromString(content).String())
	if strings.Contains(r.URL.Path, "/manifests/") {
		h.Set("Content-Type", e.kind)
		if content != e.manifest {
			h.Set("Content-Type", ocispec.MediaTypeImageManifest)
			if strings.Contains(content, `"manifests"`) {
				h.Set("Content-Type", ocispec.MediaTypeImageIndex)
			}
		}
	} else if e.body != nil {
		content, length = e.body(digest.FromString(content), content)
	}
	h.Set("Content-Length", fmt.Sprint(length))
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, content)
	}
}

func newEvil(t *testing.T) *evil {
	img := newSmall(t, "amd64")
	return &evil{img: img, manifest: img.manifest, kind: ocispec.MediaTypeImageManifest, blobs: map[digest.Digest]string{}}
}

func status(code int, body string) func(w http.ResponseWriter, r *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
		return true
	}
}

func TestHostileRegistry(t *testing.T) {
	blobsOnly := func(f func(d digest.Digest, content string) (string, int)) func(*testing.T, *evil) {
		return func(_ *testing.T, e *evil) {
			layer := digest.FromString(e.img.layer)
			e.body = func(d digest.Digest, content string) (string, int) {
				if d != layer {
					return content, len(content)
				}
				return f(d, content)
			}
		}
	}
	serveIndex := func(t *testing.T, e *evil, index string) {
		e.manifest, e.kind = index, ocispec.MediaTypeImageIndex
		e.blobs[digest.FromString(index)] = index
	}
	manifest := func(change func(*ocispec.Manifest)) func(*testing.T, *evil) {
		return func(t *testing.T, e *evil) {
			m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: descOf(ocispec.MediaTypeImageConfig, e.img.config), Layers: []ocispec.Descriptor{descOf(ocispec.MediaTypeImageLayer, e.img.layer)}}
			m.SchemaVersion = 2
			change(&m)
			e.manifest = jsonOf(t, m)
			e.blobs[digest.FromString(e.manifest)] = e.manifest
		}
	}
	text := func(kind, content string) func(*testing.T, *evil) {
		return func(_ *testing.T, e *evil) {
			e.manifest, e.kind = content, kind
			e.blobs[digest.FromString(content)] = content
		}
	}
	for name, tt := range map[string]struct {
		set  func(*testing.T, *evil)
		is   func(error) bool
		part string
	}{
		"401": {func(_ *testing.T, e *evil) { e.meddle = status(401, "") }, errdefs.IsUnauthorized, "credentials"},
		"403": {func(_ *testing.T, e *evil) {
			e.meddle = status(403, `{"errors":[{"code":"DENIED","message":"go\naway"}]}`)
		}, errdefs.IsPermissionDenied, "(go away)"},
		"404": {func(_ *testing.T, e *evil) { e.meddle = status(404, "") }, errdefs.IsNotFound, "manifest unknown"},
		"418": {func(_ *testing.T, e *evil) { e.meddle = status(418, "<html>tea") }, errdefs.IsUnavailable, "418"},
		"429": {func(_ *testing.T, e *evil) { e.meddle = status(429, "") }, errdefs.IsUnavailable, "too many requests"},
		"500": {func(_ *testing.T, e *evil) { e.meddle = status(500, "") }, errdefs.IsUnavailable, "500"},
		"503": {func(_ *testing.T, e *evil) { e.meddle = status(503, "") }, errdefs.IsUnavailable, "503"},
		"redirects in circles": {func(_ *testing.T, e *evil) {
			e.meddle = func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
				return true
			}
		}, errdefs.IsUnavailable, "redirects"},
		"a layer cut":       {blobsOnly(func(_ digest.Digest, c string) (string, int) { return c[:700], len(c) }), errdefs.IsUnavailable, "fetching layer"},
		"a layer too short": {blobsOnly(func(_ digest.Digest, c string) (string, int) { return c[:700], 700 }), func(err error) bool { return errdefs.IsUnavailable(err) || errdefs.IsDataLoss(err) }, "fetching layer"},
		"a layer too long":  {blobsOnly(func(_ digest.Digest, c string) (string, int) { return c + "more", len(c) + 4 }), errdefs.IsDataLoss, "other bytes"},
		"a layer changed":   {blobsOnly(func(_ digest.Digest, c string) (string, int) { return "X" + c[1:], len(c) }), errdefs.IsDataLoss, "other bytes"},
		"a manifest changed": {func(_ *testing.T, e *evil) {
			e.meddle = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/sha256:") {
					return false
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(e.manifest)))
				_, _ = io.WriteString(w, strings.Replace(e.manifest, "schemaVersion", "SchemaVersion", 1))
				return true
			}
		}, errdefs.IsDataLoss, "other bytes"},
		"no JSON":            {text(ocispec.MediaTypeImageManifest, "<html>welcome to our hotel</html>"), errdefs.IsInvalidArgument, "manifest"},
		"schema 1":           {text("application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1}`), errdefs.IsNotImplemented, "schema 1"},
		"both in one":        {text(ocispec.MediaTypeImageManifest, `{"schemaVersion":2,"config":{"digest":"`+digest.FromString("x").String()+`"},"manifests":[]}`), errdefs.IsInvalidArgument, "neither"},
		"an unknown type":    {text("application/x-what", `{"schemaVersion":2,"what":1}`), errdefs.IsInvalidArgument, "neither"},
		"a bad digest":       {manifest(func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../../etc/passwd" }), errdefs.IsInvalidArgument, "digest"},
		"an unknown hash":    {manifest(func(m *ocispec.Manifest) { m.Layers[0].Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" }), errdefs.IsInvalidArgument, "digest"},
		"a negative size":    {manifest(func(m *ocispec.Manifest) { m.Layers[0].Size = -5 }), errdefs.IsInvalidArgument, "size"},
		"a size that lies":   {manifest(func(m *ocispec.Manifest) { m.Layers[0].Size = 1 << 50 }), func(err error) bool { return err != nil }, "fetching layer"},
		"a huge config":      {manifest(func(m *ocispec.Manifest) { m.Config.Size = 1 << 40 }), errdefs.IsInvalidArgument, "too large"},
		"too many layers":    {manifest(func(m *ocispec.Manifest) { m.Layers = make([]ocispec.Descriptor, maxEntries+1) }), errdefs.IsInvalidArgument, "more than"},
		"a layer of no kind": {manifest(func(m *ocispec.Manifest) { m.Layers[0].MediaType = "application/x-what" }), errdefs.IsInvalidArgument, "x-what"},
		"no image":           {manifest(func(m *ocispec.Manifest) { m.Config.MediaType = "application/x-what" }), errdefs.IsInvalidArgument, "not an image"},
		"a config of nonsense": {func(t *testing.T, e *evil) {
			manifest(func(m *ocispec.Manifest) { m.Config = descOf(ocispec.MediaTypeImageConfig, "{") })(t, e)
			e.blobs[digest.FromString("{")] = "{"
		}, errdefs.IsInvalidArgument, "image config"},
		"a large manifest": {func(t *testing.T, e *evil) {
			text(ocispec.MediaTypeImageManifest, `{"schemaVersion":2,"x":"`+strings.Repeat("x", 5<<20)+`"}`)(t, e)
		}, errdefs.IsInvalidArgument, "too large"},
		"too many manifests": {func(t *testing.T, e *evil) {
			serveIndex(t, e, indexOf(t, make([]ocispec.Descriptor, maxEntries+1)...))
		}, errdefs.IsInvalidArgument, "more than"},
		"indexes without end": {func(t *testing.T, e *evil) {
			inner, kind := e.img.manifest, ocispec.MediaTypeImageManifest
			for range maxNesting + 2 {
				d := descOf(kind, inner)
				d.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
				inner, kind = indexOf(t, d), ocispec.MediaTypeImageIndex
				e.blobs[digest.FromString(inner)] = inner
			}
			serveIndex(t, e, inner)
		}, errdefs.IsInvalidArgument, "in one another"},
		"a missing layer": {manifest(func(m *ocispec.Manifest) { m.Layers[0] = descOf(ocispec.MediaTypeImageLayer, "not there") }), errdefs.IsNotFound, "fetching layer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEvil(t)
			tt.set(t, e)
			host := serve(t, e, nil)
			for _, platform := range []string{"linux/amd64", AllPlatforms} {
				s := newStore(t)
				_, err := s.Pull(t.Context(), host+"/app:1", PullOptions{Platform: platform})
				if !tt.is(err) || !strings.Contains(err.Error(), tt.part) {
					t.Errorf("%s: %v (%T), want %q", platform, err, errdefs.Resolve(err), tt.part)
				}
				if err != nil && (strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 3000) {
					t.Errorf("an error that is no line: %q", err)
				}
				if len(references(t, s)) != 0 {
					t.Errorf("%s: the images %v are there", platform, references(t, s))
				}
				if _, err := s.Prune(t.Context(), PruneOptions{}); err != nil || len(blobFiles(t, s)) != 0 {
					t.Errorf("%s: %d blobs left, %v", platform, len(blobFiles(t, s)), err)
				}
			}
		})
	}
}

// TestPatience waits as the registry asks.
func TestPatience(t *testing.T) {
	var refused atomic.Int32
	e := newEvil(t)
	e.meddle = func(w http.ResponseWriter, r *http.Request) bool {
		if refused.Add(1) > 2 {
			return false
		}
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	host := serve(t, e, nil)
	start := time.Now()
	mustPull(t, newStore(t), host+"/app:1")
	if took := time.Since(start); took < 2*time.Second || refused.Load() != 6 {
		t.Errorf("took %s and %d requests, want two pauses of a second and 6 requests", took, refused.Load())
	}
	for header, ok := range map[string]bool{"": false, "5": true, "31": false, "-1": false, "soon": false, time.Now().Add(time.Second).UTC().Format(http.TimeFormat): true} {
		resp := &http.Response{StatusCode: 503, Header: http.Header{"Retry-After": {header}}}
		if _, got := retryAfter(resp); got != ok {
			t.Errorf("Retry-After %q: waited for: %v, want %v", header, got, ok)
		}
	}
}

// asked is a middleware that counts requests and remembers for whom they were.
type asked struct {
	n  atomic.Int32
	mu sync.Mutex
	ns map[string]bool
}

func (a *asked) wrap(next http.Handler) http.Handler {
	a.ns = map[string]bool{}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.n.Add(1)
		a.mu.Lock()
		a.ns[r.URL.Query().Get("ns")] = true
		a.mu.Unlock()
		next.ServeHTTP(w, r)
	})
}

func TestMirrors(t *testing.T) {
	var atMirror, atOrigin asked
	mirror, origin := serveRegistry(t, atMirror.wrap), serveRegistry(t, atOrigin.wrap)
	push(t, mirror+"/team/app:1", makeImage(t, "amd64", blob(1, 1000)))
	push(t, origin+"/team/app:2", makeImage(t, "amd64", blob(2, 1000), blob(3, 1000)))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	s, _ := openStore(t, t.TempDir(), func(o *Options) {
		o.Registries = map[string]Registry{origin: {Mirrors: []string{"http://" + dead, "http://" + mirror}}}
	})
	reset := func() { atMirror.n.Store(0); atOrigin.n.Store(0) }
	reset()
	mustPull(t, s, origin+"/team/app:1")
	if atMirror.n.Load() == 0 || atOrigin.n.Load() != 0 || !atMirror.ns[origin] {
		t.Errorf("the mirror was asked %d times (for %v), the registry %d times", atMirror.n.Load(), atMirror.ns, atOrigin.n.Load())
	}
	mustPull(t, s, origin+"/team/app:2") // the mirror does not have it
	if atOrigin.n.Load() == 0 {
		t.Error("the registry was not asked for what the mirror does not have")
	}
	reset()
	if err := s.Tag(t.Context(), origin+"/team/app:1", origin+"/team/app:3"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Push(t.Context(), origin+"/team/app:3", PushOptions{}); err != nil || atMirror.n.Load() != 0 {
		t.Errorf("push: %v, the mirror was asked %d times", err, atMirror.n.Load())
	}
	s, _ = openStore(t, t.TempDir(), func(o *Options) { o.Registries = map[string]Registry{origin: {Mirrors: []string{"nonsense"}}} })
	if _, err := s.Pull(t.Context(), origin+"/team/app:1", amd64); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("a mirror that is no URL: %v", err)
	}
}

// TestTLS reaches registries by certificate authorities, and without.
func TestTLS(t *testing.T) {
	e := newEvil(t)
	srv := httptest.NewTLSServer(e)
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "https://")
	plain := serve(t, e, nil)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "bad.pem")
	if err := os.WriteFile(bad, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	pull := func(host string, change func(*Options)) error {
		s, _ := openStore(t, t.TempDir(), change)
		_, err := s.Pull(t.Context(), host+"/app:1", amd64)
		return err
	}
	set := func(host string, r Registry) func(*Options) {
		return func(o *Options) { o.Registries = map[string]Registry{host: r} }
	}
	for name, err := range map[string]error{
		"own authority":          pull(host, set(host, Registry{CA: ca})),
		"insecure":               pull(host, set(host, Registry{Insecure: true})),
		"insecure in plain HTTP": pull(plain, set(plain, Registry{Insecure: true})),
		"everybody's authority": pull(host, func(o *Options) {
			o.CA = []string{ca}
			o.Registries = map[string]Registry{host: {CA: ca}}
		}),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	checkError(t, pull(host, set(host, Registry{CA: bad})), errdefs.IsFailedPrecondition, "bad.pem", "no certificate")
	checkError(t, pull(host, set(host, Registry{CA: ca + "x"})), errdefs.IsFailedPrecondition, "no such file")
	checkError(t, pull(plain, set(plain, Registry{CA: ca})), errdefs.IsFailedPrecondition, "plain HTTP")
	// The authority of another one does not do.
	otherCA := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(otherCA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: selfSigned(t)}), 0o600); err != nil {
		t.Fatal(err)
	}
	checkError(t, pull(host, set(host, Registry{CA: otherCA})), errdefs.IsFailedPrecondition, "certificate")
}

// TestProxy goes through the proxy that is set.
func TestProxy(t *testing.T) {
	var through atomic.Int32
	e := newEvil(t)
	proxy := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		through.Add(1)
		if r.URL.Host != "mirror.example" {
			t.Errorf("the proxy was asked for %s", r.URL)
		}
		e.ServeHTTP(w, r)
	}), nil)
	s, _ := openStore(t, t.TempDir(), func(o *Options) {
		o.Proxy = Proxy{HTTP: "http://" + proxy}
		o.Registries = map[string]Registry{"r.example": {Mirrors: []string{"http://mirror.example/some/path"}}}
	})
	mustPull(t, s, "r.example/app:1")
	if through.Load() == 0 {
		t.Error("nothing went through the proxy")
	}
}

func TestLogin(t *testing.T) {
	s := newStore(t)
	for _, kind := range []string{"basic", "token"} {
		host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			user, password, _ := r.BasicAuth()
			_ = r.ParseForm()
			right := user == "ann" && password == "s3cret" || r.Form.Get("username") == "ann" && r.Form.Get("password") == "s3cret"
			switch {
			case r.URL.Path == "/token" && right:
				_, _ = io.WriteString(w, `{"access_token":"tok","token":"tok"}`)
			case r.URL.Path == "/token":
				w.WriteHeader(http.StatusUnauthorized)
			case kind == "basic" && !right:
				w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
				w.WriteHeader(http.StatusUnauthorized)
			case kind == "token" && r.Header.Get("Authorization") != "Bearer tok":
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="reg"`, r.Host))
				w.WriteHeader(http.StatusUnauthorized)
			}
		}), nil)
		if err := s.Login(t.Context(), host, "ann", "s3cret"); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		err := s.Login(t.Context(), host, "ann", "wr0ng")
		checkError(t, err, errdefs.IsUnauthorized, host)
		if strings.Contains(err.Error(), "wr0ng") || strings.Contains(hint.Of(err), "wr0ng") {
			t.Errorf("the password is in the error: %v", err)
		}
	}
	checkError(t, s.Login(t.Context(), serve(t, http.NotFoundHandler(), nil), "ann", "x"), errdefs.IsNotFound, "no registry answers")
	checkError(t, s.Login(t.Context(), "127.0.0.1:1", "ann", "x"), errdefs.IsUnavailable, "127.0.0.1:1")
	for _, bad := range []string{"", "Upper.example", "a b", "host/path", "http://r.example"} {
		checkError(t, s.Login(t.Context(), bad, "ann", "x"), errdefs.IsInvalidArgument)
	}
}

// selfSigned is the certificate of an authority that has signed nothing.
func selfSigned(t *testing.T) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
