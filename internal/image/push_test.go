package image

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// transfers keeps the last word on each blob.
type transfers map[string]Transfer

func (t transfers) take(tr Transfer) { t[tr.ID] = tr }

func (t transfers) count(status string) (n int) {
	for _, tr := range t {
		if tr.Status == status {
			n++
		}
	}
	return n
}

// uploads counts what is sent to a registry, and may spoil it.
type uploads struct {
	mu    sync.Mutex
	puts  int
	spoil func(w http.ResponseWriter, r *http.Request, put int) bool // true: it has answered
}

func (u *uploads) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut || r.Method == http.MethodPatch {
			u.mu.Lock()
			u.puts++
			n, spoil := u.puts, u.spoil
			u.mu.Unlock()
			if spoil != nil && spoil(w, r, n) {
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// checkRemote reads an image back with another client and checks every digest in it.
func checkRemote(t *testing.T, reference string) v1.Image {
	t.Helper()
	r, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(r, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	if err == nil {
		err = validate.Image(img, validate.Fast)
	}
	if err != nil {
		t.Fatalf("reading back %s: %v", reference, err)
	}
	return img
}

func eachRegistry(t *testing.T, f func(t *testing.T, serve func(*testing.T, func(http.Handler) http.Handler) string)) {
	t.Run("go-containerregistry", func(t *testing.T) { f(t, serveRegistry) })
	t.Run("docker-registry", func(t *testing.T) { f(t, serveDebian) })
}

func TestPush(t *testing.T) {
	eachRegistry(t, func(t *testing.T, serve func(*testing.T, func(http.Handler) http.Handler) string) {
		var up uploads
		host := serve(t, up.wrap)
		s := newStore(t)
		img := store(t, s, host+"/team/app:1", makeImage(t, "amd64", blob(1, 2<<20), blob(2, 100), blob(2, 100)))
		seen := transfers{}
		got, err := s.Push(t.Context(), host+"/team/app:1", PushOptions{Progress: seen.take})
		if err != nil {
			t.Fatal(err)
		}
		if got.Digest != img.Digest || got.Partial != nil || len(seen) != 4 || seen.count("done") != 4 {
			t.Errorf("pushed %+v, %+v", got, seen)
		}
		checkRemote(t, host+"/team/app:1")
		// What is there is not sent again, also not to another repository of the registry.
		sent := up.puts
		seen = transfers{}
		if _, err := s.Push(t.Context(), host+"/team/app:1", PushOptions{Progress: seen.take}); err != nil || up.puts != sent || seen.count("exists") != 4 {
			t.Errorf("again: %v, %d uploads, %+v", err, up.puts-sent, seen)
		}
		if err := s.Tag(t.Context(), host+"/team/app:1", host+"/other/app:2"); err != nil {
			t.Fatal(err)
		}
		seen = transfers{}
		if _, err := s.Push(t.Context(), host+"/other/app:2", PushOptions{Progress: seen.take}); err != nil {
			t.Fatal(err)
		}
		if up.puts-sent != 1 || seen.count("mounted") != 3 && seen.count("exists") != 3 {
			t.Errorf("to another repository: %d uploads, want only the manifest; %+v", up.puts-sent, seen)
		}
		checkRemote(t, host+"/other/app:2")
	})
}

func TestPushIndex(t *testing.T) {
	eachRegistry(t, func(t *testing.T, serve func(*testing.T, func(http.Handler) http.Handler) string) {
		host := serve(t, nil)
		idx := makeIndex(map[string]v1.Image{"amd64": makeImage(t, "amd64", blob(1, 1000)), "arm64": makeImage(t, "arm64", blob(2, 1000))})
		push(t, host+"/multi:1", idx)
		want, _ := idx.Digest()

		// One platform of it is pushed as one image, and what is not there is named.
		s := newStore(t)
		img := mustPull(t, s, host+"/multi:1")
		if err := s.Tag(t.Context(), host+"/multi:1", host+"/one:1"); err != nil {
			t.Fatal(err)
		}
		got, err := s.Push(t.Context(), host+"/one:1", PushOptions{})
		if err != nil || got.Digest != img.Digest || !slices.Equal(got.Partial, []string{"linux/arm64"}) {
			t.Errorf("one platform: %+v, %v", got, err)
		}
		_, err = s.Push(t.Context(), host+"/one:1", PushOptions{Platform: AllPlatforms})
		checkError(t, err, errdefs.IsFailedPrecondition, "linux/arm64 is not here")
		_, err = s.Push(t.Context(), host+"/one:1", PushOptions{Platform: "linux/arm64"})
		checkError(t, err, errdefs.IsNotFound, "no image for linux/arm64 is here")

		// All of it is pushed as the index that it was.
		s = newStore(t)
		if _, err := s.Pull(t.Context(), host+"/multi:1", PullOptions{Platform: AllPlatforms}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.GC(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Tag(t.Context(), host+"/multi:1", host+"/copy:1"); err != nil {
			t.Fatal(err)
		}
		got, err = s.Push(t.Context(), host+"/copy:1", PushOptions{})
		if err != nil || got.Digest.String() != want.String() || got.Partial != nil {
			t.Errorf("the index: %+v, %v", got, err)
		}
		r, _ := name.ParseReference(host + "/copy:1")
		back, err := remote.Index(r)
		if err != nil {
			t.Fatal(err)
		}
		if d, _ := back.Digest(); d != want {
			t.Errorf("the registry has %s, want %s", d, want)
		}
		arm, err := s.Resolve(t.Context(), host+"/copy:1", "linux/arm64")
		if err != nil || arm.Platform.Architecture != "arm64" {
			t.Errorf("linux/arm64 of the whole index: %+v, %v", arm.Platform, err)
		}
		if got, err = s.Push(t.Context(), host+"/copy:1", PushOptions{Platform: "linux/arm64"}); err != nil || got.Digest != arm.Digest {
			t.Errorf("linux/arm64 alone: %+v, %v", got, err)
		}
		// The builder finds each platform here.
		mirror := httptest.NewServer(s.Handler())
		defer mirror.Close()
		for _, path := range []string{"/manifests/1", "/manifests/" + arm.Digest.String(), "/blobs/" + arm.ConfigDesc.Digest.String(), "/blobs/" + arm.Layers[0].Digest.String()} {
			resp, err := http.Get(mirror.URL + "/v2/copy" + path + "?ns=" + host)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("the store's own registry answers %s for %s", resp.Status, path)
			}
		}
		// With the index its other platforms go.
		for _, n := range []string{"/multi:1", "/copy:1"} {
			if _, err := s.Remove(t.Context(), host+n, true); err != nil {
				t.Fatal(err)
			}
		}
		if left := blobFiles(t, s); len(left) != 0 {
			t.Errorf("%d blobs left", len(left))
		}
	})
}

func TestPushRecovers(t *testing.T) {
	eachRegistry(t, func(t *testing.T, serve func(*testing.T, func(http.Handler) http.Handler) string) {
		var up uploads
		host := serve(t, up.wrap)
		s := newStore(t)
		store(t, s, host+"/app:1", makeImage(t, "amd64", blob(1, 3<<20), blob(2, 100)))
		cut := func(w http.ResponseWriter, r *http.Request, put int) bool {
			if put > 3 {
				return false
			}
			if put == 1 {
				_, _ = io.CopyN(io.Discard, r.Body, 10)
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		up.spoil = cut
		if _, err := s.Push(t.Context(), host+"/app:1", PushOptions{}); err != nil {
			t.Fatal(err)
		}
		checkRemote(t, host+"/app:1")
	})
}

func TestPushRefused(t *testing.T) {
	answer := func(code int, body string) func(w http.ResponseWriter, r *http.Request, put int) bool {
		return func(w http.ResponseWriter, r *http.Request, put int) bool {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
			return true
		}
	}
	for code, tt := range map[int]struct {
		is   func(error) bool
		part string
	}{
		http.StatusUnauthorized:          {errdefs.IsUnauthorized, "credentials"},
		http.StatusForbidden:             {errdefs.IsPermissionDenied, "refuses access"},
		http.StatusRequestEntityTooLarge: {errdefs.IsInvalidArgument, "too large"},
		http.StatusNotFound:              {errdefs.IsFailedPrecondition, "takes no images"},
		http.StatusInternalServerError:   {errdefs.IsUnavailable, "fails"},
	} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			var up uploads
			host := serveRegistry(t, up.wrap)
			s := newStore(t)
			store(t, s, host+"/app:1", makeImage(t, "amd64", blob(1, 100)))
			up.spoil = answer(code, `{"errors":[{"code":"DENIED","message":"not today"}]}`)
			_, err := s.Push(t.Context(), host+"/app:1", PushOptions{})
			checkError(t, err, tt.is, tt.part, host)
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("an error of several lines: %q", err)
			}
		})
	}
	s := newStore(t)
	img := store(t, s, "team/app:1", makeImage(t, "amd64", blob(1, 100)))
	_, err := s.Push(t.Context(), "team/app:2", PushOptions{})
	checkError(t, err, errdefs.IsNotFound, "team/app:2")
	_, err = s.Push(t.Context(), img.Digest.Encoded()[:12], PushOptions{})
	checkError(t, err, errdefs.IsNotFound, "no image of that name")
	_, err = s.Push(t.Context(), "team/app@"+img.Digest.String(), PushOptions{})
	checkError(t, err, errdefs.IsInvalidArgument, "needs a tag")
}

// TestPushAuth pushes with a token that is for pushing, and not for the taking.
func TestPushAuth(t *testing.T) {
	basic := base64.StdEncoding.EncodeToString([]byte("ann:s3cret"))
	for _, kind := range []string{"basic", "token"} {
		t.Run(kind, func(t *testing.T) {
			var tokens atomic.Int32
			host := serveRegistry(t, func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/token" {
						_ = r.ParseForm()
						if r.Form.Get("password") != "s3cret" && r.Header.Get("Authorization") != "Basic "+basic {
							w.WriteHeader(http.StatusUnauthorized)
							return
						}
						tokens.Add(1)
						_ = json.NewEncoder(w).Encode(map[string]any{"access_token": "t " + r.Form.Get("scope"), "token": "t " + r.Form.Get("scope")})
						return
					}
					got := r.Header.Get("Authorization")
					if kind == "basic" && got != "Basic "+basic {
						w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
						w.WriteHeader(http.StatusUnauthorized)
						return
					}
					if kind == "token" && (!strings.Contains(got, "push") || !strings.Contains(got, "repository:app:")) {
						w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="reg",scope="repository:app:pull,push"`, r.Host))
						w.WriteHeader(http.StatusUnauthorized)
						return
					}
					next.ServeHTTP(w, r)
				})
			})
			conf := t.TempDir()
			s, _ := openStore(t, t.TempDir(), func(o *Options) { o.DockerConfigDir = conf })
			store(t, s, host+"/app:1", makeImage(t, "amd64", blob(1, 100)))
			_, err := s.Push(t.Context(), host+"/app:1", PushOptions{})
			checkError(t, err, errdefs.IsUnauthorized, host)
			login := fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, basic)
			if err := os.WriteFile(filepath.Join(conf, "config.json"), login, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Push(t.Context(), host+"/app:1", PushOptions{}); err != nil {
				t.Fatal(err)
			}
			if kind == "token" && tokens.Load() == 0 {
				t.Error("no token was asked for")
			}
		})
	}
}

// TestReferrers takes an artifact to a registry and back: to one with the referrers API and to one without.
func TestReferrers(t *testing.T) {
	eachRegistry(t, func(t *testing.T, serve func(*testing.T, func(http.Handler) http.Handler) string) {
		const kind = "application/vnd.atoll.rootdisk.v1+erofs"
		host := serve(t, nil)
		s := newStore(t)
		img := store(t, s, host+"/app:1", makeImage(t, "amd64", blob(1, 1000)))
		disk := blob(7, 50000)
		desc := ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(disk), Size: int64(len(disk))}
		release := s.Hold()
		if err := s.writeBlob(t.Context(), desc, disk); err != nil {
			t.Fatal(err)
		}
		made, err := s.Attach(t.Context(), img.Digest, Artifact{
			Type: kind, Config: []byte(`{"verity":"abc"}`), ConfigType: "application/vnd.atoll.rootdisk.config.v1+json",
			Blobs: []ocispec.Descriptor{desc}, Annotations: map[string]string{"org.example": "x"},
		})
		if err != nil {
			t.Fatal(err)
		}
		other, err := s.Attach(t.Context(), made.Digest, Artifact{Type: "application/vnd.example.signature"})
		if err != nil {
			t.Fatal(err)
		}
		release()
		if _, err := s.GC(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Attach(t.Context(), digest.FromString("nothing"), Artifact{Type: kind}); !errdefs.IsNotFound(err) {
			t.Errorf("attached to nothing: %v", err)
		}
		for range 2 { // the second time changes nothing
			if _, err := s.Push(t.Context(), host+"/app:1", PushOptions{Referrers: []string{AnyArtifact}}); err != nil {
				t.Fatal(err)
			}
		}

		plain := newStore(t)
		mustPull(t, plain, host+"/app:1")
		if found, _ := plain.Referrers(t.Context(), img.Digest, ""); len(found) != 0 {
			t.Errorf("artifacts that nobody asked for: %v", found)
		}
		far := newStore(t)
		if _, err := far.Pull(t.Context(), host+"/app:1", PullOptions{Platform: "linux/amd64", Referrers: []string{kind}}); err != nil {
			t.Fatal(err)
		}
		if _, err := far.GC(t.Context()); err != nil {
			t.Fatal(err)
		}
		found, err := far.Referrers(t.Context(), img.Digest, kind)
		if d := gocmp.Diff([]ocispec.Descriptor{made}, found); d != "" || err != nil {
			t.Fatal(d, err)
		}
		a, err := far.ArtifactOf(t.Context(), found[0])
		if err != nil || string(a.Config) != `{"verity":"abc"}` || len(a.Blobs) != 1 || a.Blobs[0].Digest != desc.Digest || a.Type != kind {
			t.Errorf("artifact %+v, %v", a, err)
		}
		if found, _ := far.Referrers(t.Context(), img.Digest, "application/other"); len(found) != 0 {
			t.Errorf("of another type: %v", found)
		}
		// An artifact goes with its subject.
		if _, err := s.Remove(t.Context(), host+"/app:1", false); err != nil {
			t.Fatal(err)
		}
		if left := blobFiles(t, s); len(left) != 0 {
			t.Errorf("%d blobs left, among them %s or %s?", len(left), made.Digest, other.Digest)
		}
		if found, _ := s.Referrers(t.Context(), img.Digest, ""); len(found) != 0 {
			t.Errorf("artifacts of an image that is gone: %v", found)
		}
	})
}

func TestArtifactAlone(t *testing.T) {
	host := serveRegistry(t, nil)
	s := newStore(t)
	defer s.Hold()()
	kernel := blob(3, 9000)
	desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(kernel), Size: int64(len(kernel))}
	if err := s.writeBlob(t.Context(), desc, kernel); err != nil {
		t.Fatal(err)
	}
	const kind = "application/vnd.atoll.kernel.v1"
	made, err := s.PutArtifact(t.Context(), Artifact{Type: kind, Blobs: []ocispec.Descriptor{desc}})
	if err == nil {
		err = s.PushArtifact(t.Context(), host+"/kernels/mine:1", made, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	far := newStore(t)
	release := far.Hold()
	got, err := far.PullArtifact(t.Context(), host+"/kernels/mine:1", []string{kind}, nil)
	if err != nil || got.Digest != made.Digest {
		t.Fatal(got, err)
	}
	if n := len(blobFiles(t, far)); n != 3 {
		t.Errorf("%d blobs, want manifest, empty config, kernel", n)
	}
	_, err = far.PullArtifact(t.Context(), host+"/kernels/mine:1", []string{"application/other"}, nil)
	checkError(t, err, errdefs.IsInvalidArgument, kind)
	_, err = far.Pull(t.Context(), host+"/kernels/mine:1", amd64)
	checkError(t, err, errdefs.IsInvalidArgument, "not an image")
	release()
	if n := len(blobFiles(t, far)); n != 0 {
		t.Errorf("after the hold: %d blobs", n)
	}
}
