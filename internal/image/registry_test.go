package image

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/state"
)

// openStore opens a store in dir as a daemon does it; close ends it, as the daemon's end would.
func openStore(t *testing.T, dir string, change func(*Options)) (s *Store, close func()) {
	t.Helper()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Dir: filepath.Join(dir, "images"), DB: db, Events: event.New(), Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&o)
	}
	if s, err = Open(o); err != nil {
		t.Fatal(err)
	}
	close = sync.OnceFunc(func() { db.Close() })
	t.Cleanup(close)
	return s, close
}

func newStore(t *testing.T) *Store {
	s, _ := openStore(t, t.TempDir(), nil)
	return s
}

// serveRegistry runs a registry on loopback, behind wrap if there is one, and returns its host.
func serveRegistry(t *testing.T, wrap func(http.Handler) http.Handler) string {
	return serve(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))), wrap)
}

// serveDebian is serveRegistry for Debian's docker-registry.
func serveDebian(t *testing.T, wrap func(http.Handler) http.Handler) string {
	target := &url.URL{Scheme: "http", Host: debianRegistry(t)}
	proxy := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.SetXForwarded() // for the Location of an upload
	}}
	return serve(t, proxy, wrap)
}

func serve(t *testing.T, h http.Handler, wrap func(http.Handler) http.Handler) string {
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.Start()
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// debianRegistry runs Debian's docker-registry (the reference implementation) on loopback.
func debianRegistry(t *testing.T) string {
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed (apt-get install docker-registry)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	conf := filepath.Join(dir, "config.yml")
	yml := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q}\n", dir, host)
	if err := os.WriteFile(conf, []byte(yml), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "serve", conf)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("docker-registry: %s", &out)
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; {
		resp, err := http.Get("http://" + host + "/v2/")
		if err == nil {
			resp.Body.Close()
			return host
		}
		if time.Now().After(deadline) {
			t.Fatalf("docker-registry does not answer: %v", err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// blob returns bytes that no compression or guess can make.
func blob(seed uint64, size int) []byte {
	b := make([]byte, size)
	c := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = c.Read(b)
	return b
}

// makeImage makes an image with the layers for an architecture.
func makeImage(t *testing.T, arch string, layers ...[]byte) v1.Image {
	t.Helper()
	img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	for _, l := range layers {
		var err error
		if img, err = mutate.AppendLayers(img, static.NewLayer(l, types.OCILayer)); err != nil {
			t.Fatal(err)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", arch
	cf.Created = v1.Time{Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	cf.Config.Entrypoint = []string{"/bin/app", "-x"}
	cf.Config.StopSignal = "SIGUSR1"
	cf.Config.OnBuild = []string{"RUN true"}
	cf.Config.Shell = []string{"/bin/ash", "-c"}
	cf.Config.Healthcheck = &v1.HealthConfig{Test: []string{"CMD", "true"}, Interval: time.Minute}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

// makeIndex makes an index of images by architecture, and an attestation as BuildKit adds one.
func makeIndex(byArch map[string]v1.Image) v1.ImageIndex {
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for arch, img := range byArch {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: mutate.Annotations(img, map[string]string{"a": "b"}).(v1.Image),
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
	}
	return idx
}

func push(t *testing.T, reference string, what remote.Taggable) {
	t.Helper()
	r, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	switch w := what.(type) {
	case v1.Image:
		err = remote.Write(r, w)
	case v1.ImageIndex:
		err = remote.WriteIndex(r, w)
	default:
		err = remote.Put(r, what)
	}
	if err != nil {
		t.Fatalf("pushing %s: %v", reference, err)
	}
}

// traffic is a middleware that counts and spoils the blobs that a registry sends.
type traffic struct {
	mu     sync.Mutex
	gets   map[string]int   // GETs of blobs by digest
	ranges []string         // the Range headers seen
	sent   map[string]int64 // bytes of blobs by digest
	closed bool             // true: ranges without an end are not understood, as by go-containerregistry's registry
	spoil  func(digest string, get int, w http.ResponseWriter) http.ResponseWriter
}

var blobPath = regexp.MustCompile(`/blobs/(sha256:[0-9a-f]{64})$`)

func (tr *traffic) wrap(next http.Handler) http.Handler {
	tr.gets, tr.sent = map[string]int{}, map[string]int64{}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m := blobPath.FindStringSubmatch(r.URL.Path)
		if m == nil || r.Method != http.MethodGet {
			next.ServeHTTP(w, r)
			return
		}
		tr.mu.Lock()
		tr.gets[m[1]]++
		n := tr.gets[m[1]]
		if h := r.Header.Get("Range"); h != "" {
			tr.ranges = append(tr.ranges, h)
		}
		spoil, closed := tr.spoil, tr.closed
		tr.mu.Unlock()
		if h := r.Header.Get("Range"); strings.HasSuffix(h, "-") && !closed {
			head := httptest.NewRecorder()
			next.ServeHTTP(head, httptest.NewRequest(http.MethodHead, r.URL.Path, nil))
			size, _ := strconv.Atoi(head.Header().Get("Content-Length"))
			r.Header.Set("Range", fmt.Sprint(h, size-1))
		}
		w = counter{w, tr, m[1]}
		if spoil != nil {
			w = spoil(m[1], n, w)
		}
		next.ServeHTTP(w, r)
	})
}

func (tr *traffic) set(spoil func(string, int, http.ResponseWriter) http.ResponseWriter) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.spoil = spoil
	tr.ranges = nil
	clear(tr.gets)
	clear(tr.sent)
}

func (tr *traffic) bytes(d string) int64 {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.sent[d]
}

type counter struct {
	http.ResponseWriter
	tr     *traffic
	digest string
}

func (c counter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.tr.mu.Lock()
	c.tr.sent[c.digest] += int64(n)
	c.tr.mu.Unlock()
	return n, err
}

func (c counter) Flush() { c.ResponseWriter.(http.Flusher).Flush() }

// cutter ends the connection after so many bytes; with stall it first waits until that is closed, the bytes flushed.
type cutter struct {
	http.ResponseWriter
	left  int
	stall <-chan struct{}
}

func (c *cutter) Write(b []byte) (int, error) {
	if len(b) < c.left {
		n, err := c.ResponseWriter.Write(b)
		c.left -= n
		return n, err
	}
	_, _ = c.ResponseWriter.Write(b[:c.left])
	c.ResponseWriter.(http.Flusher).Flush()
	if c.stall != nil {
		<-c.stall
	}
	panic(http.ErrAbortHandler)
}

// flipper changes the first byte that is sent.
type flipper struct {
	http.ResponseWriter
	done bool
}

func (f *flipper) Write(b []byte) (int, error) {
	if f.done {
		return f.ResponseWriter.Write(b)
	}
	f.done = true
	b = bytes.Clone(b)
	b[0] ^= 1
	return f.ResponseWriter.Write(b)
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
