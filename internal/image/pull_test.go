package image

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	gocmp "github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

func TestMain(m *testing.M) {
	// The child of TestPullAfterKill.
	if dir := os.Getenv("IMAGE_TEST_PULL_DIR"); dir != "" {
		t := &testing.T{}
		s, _ := openStore(t, dir, nil)
		_, err := s.Pull(context.Background(), os.Getenv("IMAGE_TEST_PULL_REF"), PullOptions{Platform: "linux/amd64"})
		fmt.Println(err)
		os.Exit(3)
	}
	os.Exit(m.Run())
}

var amd64 = PullOptions{Platform: "linux/amd64"}

func mustPull(t *testing.T, s *Store, reference string) Image {
	t.Helper()
	img, err := s.Pull(t.Context(), reference, amd64)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// blobFiles returns the digests of the blobs on disk, having checked every one.
func blobFiles(t *testing.T, s *Store) []digest.Digest {
	t.Helper()
	files, err := os.ReadDir(filepath.Join(s.dir, "blobs", "sha256"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var ds []digest.Digest
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(s.dir, "blobs", "sha256", f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if got := digest.FromBytes(data).Encoded(); got != f.Name() {
			t.Errorf("bad blob in the store: %s has the content of %s", f.Name(), got)
		}
		ds = append(ds, digest.Digest("sha256:"+f.Name()))
	}
	return ds
}

func checkError(t *testing.T, err error, is func(error) bool, parts ...string) {
	t.Helper()
	if !is(err) {
		t.Errorf("wrong class of error: %v", err)
	}
	if hint.Of(err) == "" {
		t.Errorf("no hint with %v", err)
	}
	for _, p := range parts {
		if err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("error does not say %q: %v", p, err)
		}
	}
}

func TestPull(t *testing.T) {
	for name, serve := range map[string]func(*testing.T) string{
		"go-containerregistry": func(t *testing.T) string { return serveRegistry(t, nil) },
		"docker-registry":      debianRegistry,
	} {
		t.Run(name, func(t *testing.T) {
			host := serve(t)
			layers := [][]byte{blob(1, 3<<20), blob(2, 100), blob(3, 1<<20), blob(4, 5000), blob(2, 100)}
			pushed := makeImage(t, "amd64", layers...)
			push(t, host+"/team/app:1.0", pushed)
			s := newStore(t)
			events, _ := s.events.Listen(time.Time{})
			last := map[string]Transfer{}
			img, err := s.Pull(t.Context(), host+"/team/app:1.0", PullOptions{Platform: "linux/amd64", Progress: func(tr Transfer) { last[tr.ID] = tr }})
			if err != nil {
				t.Fatal(err)
			}
			want, _ := pushed.Digest()
			raw, _ := pushed.RawConfigFile()
			if img.Digest.String() != want.String() || !bytes.Equal(img.RawConfig, raw) {
				t.Errorf("pulled %s, want %s; or the config has changed", img.Digest, want)
			}
			c := img.Config.Config
			if c.Healthcheck == nil || c.Healthcheck.Interval != time.Minute || c.StopSignal != "SIGUSR1" || c.OnBuild[0] != "RUN true" ||
				c.Shell[0] != "/bin/ash" || c.Entrypoint[1] != "-x" {
				t.Errorf("config %+v", c)
			}
			if d := gocmp.Diff([]string{host + "/team/app:1.0"}, img.References); d != "" {
				t.Error(d)
			}
			if img.Platform.Architecture != "amd64" || img.Created.Year() != 2026 || img.Size != int64(len(raw))+3<<20+100+1<<20+5000+100 {
				t.Errorf("image %+v", img)
			}
			for i, l := range img.Layers {
				r, err := s.Blob(t.Context(), l)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				r.Close()
				if err != nil || !bytes.Equal(got, layers[i]) {
					t.Errorf("layer %d differs, %v", i, err)
				}
			}
			for id, tr := range last {
				if tr.Status != "done" || tr.Done != tr.Total {
					t.Errorf("last progress of %s: %+v", id, tr)
				}
			}
			if n := len(blobFiles(t, s)); n != 6 || len(last) != 6 {
				t.Errorf("%d blobs, %d progress lines, want 6 (manifest, config, 4 different layers)", n, len(last))
			}
			if e := <-events.C(); e.Type != event.Image || e.Action != "pull" || e.ID != img.Digest.String() || e.Attributes["name"] != host+"/team/app:1.0" {
				t.Errorf("event %+v", e)
			}
			again := mustPull(t, s, host+"/team/app@"+want.String())
			if d := gocmp.Diff([]string{host + "/team/app:1.0", host + "/team/app@" + want.String()}, again.References); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestPullIndex(t *testing.T) {
	host := serveRegistry(t, nil)
	amd, arm := makeImage(t, "amd64", blob(1, 1000)), makeImage(t, "arm64", blob(2, 1000))
	idx := makeIndex(map[string]v1.Image{"amd64": amd, "arm64": arm})
	name := host + "/multi:1"
	push(t, name, idx)
	s := newStore(t)
	img := mustPull(t, s, name)
	if d, _ := amd.Digest(); img.Digest.String() != d.String() {
		t.Errorf("pulled %s, want the amd64 manifest %s", img.Digest, d)
	}
	if n := len(blobFiles(t, s)); n != 4 {
		t.Errorf("%d blobs, want 4: index, manifest, config, layer", n)
	}
	_, err := s.Resolve(t.Context(), name, "linux/arm64")
	checkError(t, err, errdefs.IsNotFound, "is for linux/amd64, not for linux/arm64")
	_, err = s.Pull(t.Context(), name, PullOptions{Platform: "linux/riscv64"})
	checkError(t, err, errdefs.IsNotFound, "no manifest for linux/riscv64, there are linux/amd64, linux/arm64: not found")
	other, err := s.Pull(t.Context(), name, PullOptions{Platform: "linux/arm64"})
	if d, _ := arm.Digest(); err != nil || other.Digest.String() != d.String() {
		t.Errorf("pulled %s, %v; want %s", other.Digest, err, d)
	}
	// The index's own digest names the image too.
	d, _ := idx.Digest()
	byIndex := mustPull(t, s, host+"/multi@"+d.String())
	if got, err := s.Resolve(t.Context(), host+"/multi@"+d.String(), ""); err != nil || got.Digest != byIndex.Digest && got.Digest != other.Digest {
		t.Errorf("by the index's digest: %s, %v", got.Digest, err)
	}
	push(t, host+"/single:1", arm)
	_, err = s.Pull(t.Context(), host+"/single:1", amd64)
	checkError(t, err, errdefs.IsNotFound, "no manifest for linux/amd64, there are linux/arm64")
}

func TestPullResumes(t *testing.T) {
	t.Run("go-containerregistry", func(t *testing.T) { testPullResumes(t, serveRegistry) })
	t.Run("docker-registry", func(t *testing.T) { testPullResumes(t, serveDebian) })
}

func testPullResumes(t *testing.T, serve func(*testing.T, func(http.Handler) http.Handler) string) {
	const size = 8 << 20
	var tr traffic
	host := serve(t, tr.wrap)
	layer := blob(1, size)
	d := digest.FromBytes(layer).String()
	push(t, host+"/app", makeImage(t, "amd64", layer))

	t.Run("cut connections in one pull", func(t *testing.T) {
		s := newStore(t)
		tr.set(func(got string, n int, w http.ResponseWriter) http.ResponseWriter {
			if got == d && n <= 3 {
				return &cutter{ResponseWriter: w, left: 2<<20 + 12345}
			}
			return w
		})
		mustPull(t, s, host+"/app")
		blobFiles(t, s)
		if len(tr.ranges) != 3 || tr.bytes(d) > size+size/10 {
			t.Errorf("ranges %q, %d bytes sent for a layer of %d", tr.ranges, tr.bytes(d), size)
		}
	})
	t.Run("a pull that failed", func(t *testing.T) {
		dir := t.TempDir()
		s, closeStore := openStore(t, dir, nil)
		tr.set(func(got string, n int, w http.ResponseWriter) http.ResponseWriter {
			if got != d {
				return w
			}
			return &cutter{ResponseWriter: w, left: max(0, 5<<20+1-(n-1)<<30)}
		})
		_, err := s.Pull(t.Context(), host+"/app", amd64)
		checkError(t, err, errdefs.IsUnavailable, "fetching layer "+d)
		if slices.Contains(blobFiles(t, s), digest.Digest(d)) {
			t.Error("the half layer is in the store")
		}
		if _, err := s.Resolve(t.Context(), host+"/app", ""); !errdefs.IsNotFound(err) {
			t.Errorf("the half image resolves: %v", err)
		}
		closeStore()
		s, _ = openStore(t, dir, nil)
		tr.set(nil)
		mustPull(t, s, host+"/app")
		blobFiles(t, s)
		if len(tr.ranges) != 1 || tr.bytes(d) > size-5<<20+1<<10 {
			t.Errorf("ranges %q, %d bytes sent though 5 MiB were there", tr.ranges, tr.bytes(d))
		}
	})
	t.Run("a registry without ranges", func(t *testing.T) {
		s := newStore(t)
		tr.closed = true
		defer func() { tr.closed = false }()
		tr.set(func(got string, n int, w http.ResponseWriter) http.ResponseWriter {
			if got == d && n == 1 {
				return &cutter{ResponseWriter: w, left: 5 << 20}
			}
			return w
		})
		mustPull(t, s, host+"/app")
		blobFiles(t, s)
	})
	t.Run("a bad beginning is given up", func(t *testing.T) {
		s := newStore(t)
		ctx, cancel := context.WithCancel(t.Context())
		stall := make(chan struct{})
		tr.set(func(got string, n int, w http.ResponseWriter) http.ResponseWriter {
			if got != d {
				return w
			}
			time.AfterFunc(300*time.Millisecond, cancel)
			return &cutter{ResponseWriter: w, left: 5 << 20, stall: stall}
		})
		if _, err := s.Pull(ctx, host+"/app", amd64); !errors.Is(err, context.Canceled) {
			t.Fatalf("pull: %v", err)
		}
		close(stall)
		left, _ := filepath.Glob(filepath.Join(s.dir, "ingest", "*", "data"))
		if len(left) != 1 {
			t.Fatalf("ingests %q", left)
		}
		f, err := os.OpenFile(left[0], os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteAt([]byte("power was lost here"), 1000)
		f.Close()
		tr.set(nil)
		mustPull(t, s, host+"/app")
		blobFiles(t, s)
		if len(tr.ranges) != 1 {
			t.Errorf("ranges %q: the bad beginning was not tried", tr.ranges)
		}
	})
}

func TestPullAfterKill(t *testing.T) {
	const size = 8 << 20
	var tr traffic
	host := serveRegistry(t, tr.wrap)
	layer := blob(1, size)
	d := digest.FromBytes(layer).String()
	push(t, host+"/app", makeImage(t, "amd64", layer))
	stall, reached := make(chan struct{}), make(chan struct{})
	tr.set(func(got string, n int, w http.ResponseWriter) http.ResponseWriter {
		if got != d {
			return w
		}
		close(reached)
		return &cutter{ResponseWriter: w, left: 5<<20 + 100, stall: stall}
	})
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "IMAGE_TEST_PULL_DIR="+dir, "IMAGE_TEST_PULL_REF="+host+"/app")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-reached
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(5 * time.Millisecond) {
		left, _ := filepath.Glob(filepath.Join(dir, "images", "ingest", "*", "data"))
		if len(left) == 1 {
			if fi, err := os.Stat(left[0]); err == nil && fi.Size() >= 5<<20 {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("the child does not pull")
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	close(stall)
	tr.set(nil)
	s, _ := openStore(t, dir, nil)
	mustPull(t, s, host+"/app")
	blobFiles(t, s)
	if tr.bytes(d) != size-5<<20 {
		t.Errorf("%d bytes sent, want the %d that were not there", tr.bytes(d), size-5<<20)
	}
}

func TestPullCorrupt(t *testing.T) {
	var tr traffic
	host := serveRegistry(t, tr.wrap)
	layer := blob(1, 1<<20)
	d := digest.FromBytes(layer)
	push(t, host+"/app", makeImage(t, "amd64", layer))
	s := newStore(t)
	tr.set(func(got string, _ int, w http.ResponseWriter) http.ResponseWriter {
		if got == d.String() {
			return &flipper{ResponseWriter: w}
		}
		return w
	})
	_, err := s.Pull(t.Context(), host+"/app", amd64)
	checkError(t, err, errdefs.IsDataLoss, d.String(), "other bytes than the digest says")
	if slices.Contains(blobFiles(t, s), d) {
		t.Error("the bad layer is in the store")
	}
	tr.set(nil)
	mustPull(t, s, host+"/app")
	if !slices.Contains(blobFiles(t, s), d) || len(tr.ranges) > 0 {
		t.Errorf("the next pull is not a fresh one: %q", tr.ranges)
	}
}

func TestPullServerErrors(t *testing.T) {
	var mu sync.Mutex
	fails := 0
	host := serveRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			fail := fails > 0 && r.Method != http.MethodPost && r.Method != http.MethodPut
			if fail {
				fails--
			}
			mu.Unlock()
			if fail {
				http.Error(w, "later", http.StatusBadGateway)
				return
			}
			next.ServeHTTP(w, r)
		})
	})
	push(t, host+"/app", makeImage(t, "amd64", blob(1, 100)))
	s := newStore(t)
	mu.Lock()
	fails = 2
	mu.Unlock()
	mustPull(t, s, host+"/app")
	mu.Lock()
	fails = 1000
	mu.Unlock()
	_, err := s.Pull(t.Context(), host+"/app", amd64)
	checkError(t, err, errdefs.IsUnavailable, "502")
}

func TestPullRefuses(t *testing.T) {
	host := serveRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/v2/old/") {
				body := `{"schemaVersion":1,"name":"old","tag":"1","fsLayers":[]}`
				w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
				if strings.HasPrefix(r.URL.Path, "/v2/old/sly/") {
					w.Header().Set("Content-Type", "application/json")
				}
				w.Header().Set("Docker-Content-Digest", digest.FromString(body).String())
				w.Header().Set("Content-Length", fmt.Sprint(len(body)))
				_, _ = io.WriteString(w, body)
				return
			}
			if strings.HasPrefix(r.URL.Path, "/v2/huge/") {
				w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
				w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
				w.Header().Set("Content-Length", fmt.Sprint(9<<20))
				return
			}
			next.ServeHTTP(w, r)
		})
	})
	push(t, host+"/app:1", makeImage(t, "amd64", blob(1, 10)))
	push(t, host+"/chart:1", mutate.ConfigMediaType(makeImage(t, "amd64", blob(1, 10)), "application/vnd.cncf.helm.config.v1+json"))
	s := newStore(t)
	_, err := s.Pull(t.Context(), host+"/app:2", amd64)
	checkError(t, err, errdefs.IsNotFound, "manifest unknown", host+"/app:2")
	_, err = s.Pull(t.Context(), host+"/old:1", amd64)
	checkError(t, err, errdefs.IsNotImplemented, "schema 1")
	_, err = s.Pull(t.Context(), host+"/old/sly:1", amd64)
	checkError(t, err, errdefs.IsNotImplemented, "schema 1")
	_, err = s.Pull(t.Context(), host+"/chart:1", amd64)
	checkError(t, err, errdefs.IsInvalidArgument, "helm.config", "not an image")
	_, err = s.Pull(t.Context(), host+"/App:1", amd64)
	checkError(t, err, errdefs.IsInvalidArgument, `"App" has upper case`)
	if _, err = s.Pull(t.Context(), host+"/huge:1", amd64); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "too large") {
		t.Errorf("huge manifest: %v", err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	start := time.Now()
	_, err = s.Pull(t.Context(), dead+"/app", amd64)
	checkError(t, err, errdefs.IsUnavailable, "connection refused", dead)
	if took := time.Since(start); took > time.Second {
		t.Errorf("an unreachable registry took %s", took)
	}
	if _, err := s.GC(t.Context()); err != nil {
		t.Error(err)
	}
	if n := len(blobFiles(t, s)); n != 0 {
		t.Errorf("%d blobs left by refused pulls", n)
	}
}

func TestExplain(t *testing.T) {
	s, _ := openStore(t, t.TempDir(), func(o *Options) {
		o.Registries = map[string]Registry{"127.0.0.1:7": {CA: "/ca"}, "127.0.0.1:8": {Insecure: true}}
	})
	r, err := ref.Parse("r.example/team/app:1")
	if err != nil {
		t.Fatal(err)
	}
	status := func(code int) error {
		return remoteerrors.ErrUnexpectedStatus{StatusCode: code, Status: http.StatusText(code)}
	}
	for _, tt := range []struct {
		err  error
		is   func(error) bool
		part string
	}{
		{status(401), errdefs.IsUnauthorized, "other credentials"},
		{status(403), errdefs.IsPermissionDenied, "refuses access"},
		{status(429), errdefs.IsUnavailable, "too many requests"},
		{status(503), errdefs.IsUnavailable, "fails"},
		{&url.Error{Op: "Get", Err: http.ErrSchemeMismatch}, errdefs.IsFailedPrecondition, "plain HTTP"},
		{&tls.CertificateVerificationError{Err: errors.New("unknown authority")}, errdefs.IsFailedPrecondition, "unknown authority"},
		{&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "r.example"}}, errdefs.IsUnavailable, "no such host"},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, errdefs.IsUnavailable, "timeout"},
	} {
		checkError(t, s.explain(t.Context(), tt.err, r), tt.is, tt.part, "r.example")
	}
	for host, want := range map[string]bool{"127.0.0.1:7": false, "127.0.0.1:8": false, "r.example": false, "localhost:1": true, "127.9.9.9": true, "[::1]:5": true, "docker.io": false} {
		if got, err := s.registries.plainHTTP(host); got != want || err != nil {
			t.Errorf("plainHTTP(%q) = %v, %v", host, got, err)
		}
	}
}

// TestPassing tells failures of a connection that was there from one that never was.
func TestPassing(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want bool
	}{
		{&url.Error{Op: "Put", Err: &net.OpError{Op: "set", Err: net.ErrClosed}}, true},
		{&url.Error{Op: "Put", Err: &net.OpError{Op: "write", Err: syscall.ECONNRESET}}, true},
		{&url.Error{Op: "Get", Err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}}, false},
		{fmt.Errorf("body: %w", io.ErrUnexpectedEOF), true},
		{remoteerrors.ErrUnexpectedStatus{StatusCode: 404}, false},
	} {
		if got := passing(tt.err); got != tt.want {
			t.Errorf("passing(%v) = %v", tt.err, got)
		}
	}
}

func TestPullAuth(t *testing.T) {
	const user, secret = "ann", "s3cret"
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+secret))
	for _, kind := range []string{"basic", "token"} {
		t.Run(kind, func(t *testing.T) {
			var open bool // while the test pushes
			var mu sync.Mutex
			host := serveRegistry(t, func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					mu.Lock()
					free := open
					mu.Unlock()
					if r.URL.Path == "/token" {
						_ = r.ParseForm()
						if r.Header.Get("Authorization") != basic && (r.Form.Get("username") != user || r.Form.Get("password") != secret) {
							w.WriteHeader(http.StatusUnauthorized)
							return
						}
						if got := r.Form.Get("scope"); got != "repository:app:pull" {
							t.Errorf("scope %q", got)
						}
						_ = json.NewEncoder(w).Encode(map[string]any{"access_token": "tok", "token": "tok", "expires_in": 300})
						return
					}
					want, challenge := basic, `Basic realm="r"`
					if kind == "token" {
						want, challenge = "Bearer tok", fmt.Sprintf(`Bearer realm="http://%s/token",service="reg",scope="repository:app:pull"`, r.Host)
					}
					if !free && r.Header.Get("Authorization") != want {
						w.Header().Set("WWW-Authenticate", challenge)
						w.WriteHeader(http.StatusUnauthorized)
						return
					}
					next.ServeHTTP(w, r)
				})
			})
			set := func(v bool) { mu.Lock(); open = v; mu.Unlock() }
			set(true)
			push(t, host+"/app", makeImage(t, "amd64", blob(1, 100)))
			set(false)
			conf := t.TempDir()
			s, _ := openStore(t, t.TempDir(), func(o *Options) { o.DockerConfigDir = conf })
			login := func(password string) {
				auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
				err := os.WriteFile(filepath.Join(conf, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, auth), 0o600)
				if err != nil {
					t.Fatal(err)
				}
			}
			_, err := s.Pull(t.Context(), host+"/app", amd64)
			checkError(t, err, errdefs.IsUnauthorized, host)
			login("wrong")
			_, err = s.Pull(t.Context(), host+"/app", amd64)
			checkError(t, err, errdefs.IsUnauthorized, host)
			if strings.Contains(err.Error(), "wrong") {
				t.Errorf("the password is in the error: %v", err)
			}
			login(secret)
			mustPull(t, s, host+"/app")
		})
	}
}

func TestPullCredentialHelper(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\ncat >/dev/null\necho '{\"ServerURL\":\"r.example\",\"Username\":\"bob\",\"Secret\":\"pw\"}'\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"credHelpers":{"r.example":"test"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	s, _ := openStore(t, t.TempDir(), func(o *Options) { o.DockerConfigDir = dir })
	user, secret, err := s.credentials("r.example")
	if user != "bob" || secret != "pw" || err != nil {
		t.Errorf("credentials %q %q %v", user, secret, err)
	}
	if user, _, err := s.credentials("other.example"); user != "" || err != nil {
		t.Errorf("credentials of another host %q %v", user, err)
	}
}

func TestPullTogether(t *testing.T) {
	var tr traffic
	host := serveRegistry(t, tr.wrap)
	pushed := makeImage(t, "amd64", blob(1, 4<<20), blob(2, 1<<20))
	push(t, host+"/app", pushed)
	tr.set(nil)
	s := newStore(t)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if _, err := s.Pull(context.Background(), host+"/app", amd64); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	blobFiles(t, s)
	for d, n := range tr.gets {
		if n != 1 {
			t.Errorf("%s was fetched %d times", d, n)
		}
	}
	if len(tr.gets) != 3 {
		t.Errorf("fetched %v, want config and 2 layers", tr.gets)
	}
}

func TestPullFullDisk(t *testing.T) {
	host := serveRegistry(t, nil)
	push(t, host+"/app", makeImage(t, "amd64", blob(1, 6<<20)))
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("a small file system needs root: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }) // the library leaves a probe file to the finalizer
	s, _ := openStore(t, t.TempDir(), func(o *Options) { o.Dir = dir })
	_, err := s.Pull(t.Context(), host+"/app", amd64)
	checkError(t, err, errdefs.IsResourceExhausted, dir, "free", "no space left on device")
	for _, d := range blobFiles(t, s) {
		if fi, _ := os.Stat(filepath.Join(dir, "blobs", "sha256", d.Encoded())); fi.Size() > 1<<20 {
			t.Errorf("the layer is in the store")
		}
	}
}
