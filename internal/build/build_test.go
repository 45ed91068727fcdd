//go:build linux

package build

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/moby/buildkit/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "build-child" {
		if child.Run(context.Background(), os.Args[2:]) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// fixture is a builder whose image store holds docker.io/library/base:latest, a busybox, and nothing else.
type fixture struct {
	*Builder
	t       *testing.T
	content content.Store
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("builds need root")
	}
	dir := t.TempDir()
	contentDir := filepath.Join(dir, "images")
	store, err := local.NewStore(contentDir)
	if err != nil {
		t.Fatal(err)
	}
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	push(t, reg, "library/base:latest", busybox(t))
	b := New(Options{
		Dir:             filepath.Join(dir, "build"),
		Child:           []string{os.Args[0], "build-child"},
		ContentDir:      contentDir,
		Registry:        reg,
		KnownBase:       func(n reference.Named) bool { return strings.HasSuffix(n.Name(), "/debian") },
		DockerConfigDir: filepath.Join(dir, "docker"),
		Log:             slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			out, _ := os.ReadFile(filepath.Join(dir, "build", "child.log"))
			t.Logf("child.log:\n%s", out)
		}
	})
	return &fixture{Builder: b, t: t, content: store}
}

// busybox is an image of Debian's static busybox with its applets linked.
func busybox(t *testing.T) v1.Image {
	t.Helper()
	binary, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("apt install busybox-static: %v", err)
	}
	applets, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(h *tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	add(&tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(&tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	add(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(&tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/:/bin/sh\nweb:x:33:33::/:/bin/sh\n"))
	add(&tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nweb:x:33:\nextra:x:44:web\n"))
	add(&tar.Header{Name: "bin/busybox", Mode: 0o755}, binary)
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			add(&tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeLink, Linkname: "bin/busybox", Mode: 0o755}, nil)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Config.Env = []string{"PATH=/bin"}
	img, err = mutate.ConfigFile(img, file)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t *testing.T, reg http.Handler, ref string, img v1.Image) {
	t.Helper()
	srv := httptest.NewServer(reg)
	defer srv.Close()
	r, err := name.ParseReference(strings.TrimPrefix(srv.URL, "http://") + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
}

// contextDir makes a build context of a txtar-like map.
func contextDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for path, data := range files {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func dockerfile(t *testing.T, text string) Request {
	t.Helper()
	return Request{ContextDir: contextDir(t, map[string]string{"Dockerfile": text})}
}

// made is what a build made, read back from the image store.
type made struct {
	manifest ocispec.Manifest
	config   map[string]any
	files    map[string]string
	owners   map[string]int
}

func (f *fixture) build(r Request) made {
	f.t.Helper()
	res, err := f.Build(f.t.Context(), r, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	return f.read(res.Manifest)
}

func (f *fixture) read(desc ocispec.Descriptor) made {
	f.t.Helper()
	img := made{files: map[string]string{}, owners: map[string]int{}}
	f.blob(desc, &img.manifest)
	var config struct{ Config map[string]any }
	f.blob(img.manifest.Config, &config)
	img.config = config.Config
	for _, l := range img.manifest.Layers {
		raw, err := content.ReadBlob(f.t.Context(), f.content, l)
		if err != nil {
			f.t.Fatal(err)
		}
		d, err := compression.DecompressStream(bytes.NewReader(raw))
		if err != nil {
			f.t.Fatal(err)
		}
		r := tar.NewReader(d)
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				f.t.Fatal(err)
			}
			data, _ := io.ReadAll(r)
			img.files["/"+strings.TrimSuffix(h.Name, "/")] = string(data)
			img.owners["/"+h.Name] = h.Uid
		}
		d.Close()
	}
	return img
}

func (f *fixture) blob(desc ocispec.Descriptor, v any) {
	f.t.Helper()
	raw, err := content.ReadBlob(f.t.Context(), f.content, desc)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		f.t.Fatal(err)
	}
}

func (i made) file(t *testing.T, path, want string) {
	t.Helper()
	got, ok := i.files[path]
	if !ok {
		t.Errorf("%s is missing", path)
	} else if got != want {
		t.Errorf("%s holds %q, want %q", path, got, want)
	}
}

func TestDockerfileFeatures(t *testing.T) {
	f := newFixture(t)
	dir := contextDir(t, map[string]string{
		"Dockerfile": `# syntax=docker/dockerfile:1
ARG FROM=base
FROM $FROM AS tools
RUN echo made >/tool

FROM base AS final
ARG WHO=nobody
COPY --from=tools /tool /tool
COPY --from=0 /tool /tool0
COPY --chown=web:33 . /src/
RUN echo "$WHO" >/who
RUN --mount=type=cache,target=/cache echo x >>/cache/n && wc -l </cache/n >/cached
RUN --mount=type=bind,source=in.txt,target=/in.txt cat /in.txt >/bound
RUN <<EOT
echo one >/heredoc
echo two >>/heredoc
EOT
USER web
RUN id -u >/tmp/id && id -G >>/tmp/id
USER 1234
RUN id -u >/tmp/number

FROM final AS unused
RUN exit 9
`,
		".dockerignore": "secret\n",
		"in.txt":        "input",
		"secret":        "hidden",
	})
	img := f.build(Request{ContextDir: dir, Target: "final", BuildArgs: map[string]string{"WHO": "me"}, Labels: map[string]string{"a": "b"}})
	img.file(t, "/tool", "made\n")
	img.file(t, "/tool0", "made\n")
	img.file(t, "/who", "me\n")
	img.file(t, "/cached", "1\n")
	img.file(t, "/bound", "input")
	img.file(t, "/heredoc", "one\ntwo\n")
	img.file(t, "/tmp/id", "33\n33 44\n")
	img.file(t, "/tmp/number", "1234\n")
	img.file(t, "/src/in.txt", "input")
	if _, ok := img.files["/src/secret"]; ok {
		t.Error(".dockerignore took no effect")
	}
	if img.owners["/src/in.txt"] != 33 {
		t.Errorf("owner of /src/in.txt is %d, want 33", img.owners["/src/in.txt"])
	}
	if diff := cmp.Diff(map[string]any{"a": "b"}, img.config["Labels"]); diff != "" {
		t.Error(diff)
	}
	last := img.manifest.Layers[len(img.manifest.Layers)-1]
	if last.MediaType != ocispec.MediaTypeImageLayerZstd {
		t.Errorf("new layers are %s, want zstd", last.MediaType)
	}
}

func TestConfigIsKeptWhole(t *testing.T) {
	f := newFixture(t)
	img := f.build(dockerfile(t, `FROM base
ENV A="b c"
WORKDIR /w
USER web:44
EXPOSE 80 53/udp
VOLUME /data
LABEL l=1
STOPSIGNAL SIGUSR1
SHELL ["/bin/sh", "-e", "-c"]
HEALTHCHECK --interval=7s --retries=2 CMD wget -q localhost
ONBUILD RUN echo "later $x"
ENTRYPOINT ["/bin/echo", "a b", "$HOME", "-n"]
CMD echo "shell   form" $A
`))
	want := map[string]any{
		"ArgsEscaped":  true, // BuildKit's own, for Windows
		"User":         "web:44",
		"Env":          []any{"PATH=/bin", "A=b c"},
		"WorkingDir":   "/w",
		"ExposedPorts": map[string]any{"80/tcp": map[string]any{}, "53/udp": map[string]any{}},
		"Volumes":      map[string]any{"/data": map[string]any{}},
		"Labels":       map[string]any{"l": "1"},
		"StopSignal":   "SIGUSR1",
		"Shell":        []any{"/bin/sh", "-e", "-c"},
		"Healthcheck":  map[string]any{"Test": []any{"CMD-SHELL", "wget -q localhost"}, "Interval": 7e9, "Retries": 2.0},
		"OnBuild":      []any{`RUN echo "later $x"`},
		"Entrypoint":   []any{"/bin/echo", "a b", "$HOME", "-n"},
		"Cmd":          []any{"/bin/sh", "-e", "-c", `echo "shell   form" $A`},
	}
	if diff := cmp.Diff(want, img.config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
}

func TestRebuildIsCached(t *testing.T) {
	f := newFixture(t)
	r := dockerfile(t, "FROM base\nCOPY Dockerfile /\nRUN echo hello >/hello\n")
	first, err := f.Build(t.Context(), r, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		ran := map[string]bool{}
		start := time.Now()
		again, err := f.Build(t.Context(), r, func(s *client.SolveStatus) {
			for _, v := range s.Vertexes {
				if strings.Contains(v.Name, "RUN") || strings.Contains(v.Name, "COPY") {
					ran[v.Name] = ran[v.Name] || v.Cached
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("warm: solve %v, total %v", again.Solve, time.Since(start))
		if first.Manifest.Digest != again.Manifest.Digest {
			t.Errorf("digest %s, was %s", again.Manifest.Digest, first.Manifest.Digest)
		}
		if len(ran) != 2 {
			t.Errorf("saw steps %v, want RUN and COPY", ran)
		}
		for name, cached := range ran {
			if !cached {
				t.Errorf("%s ran again", name)
			}
		}
	}
	// Without the cache the step runs again.
	r.NoCache = true
	ran := false
	if _, err := f.Build(t.Context(), r, func(s *client.SolveStatus) { ran = ran || isRun(s) }); err != nil {
		t.Fatal(err)
	}
	if !ran {
		t.Error("NoCache: RUN did not run")
	}
}

func isRun(s *client.SolveStatus) bool {
	for _, v := range s.Vertexes {
		if strings.Contains(v.Name, "RUN") && v.Completed != nil && !v.Cached {
			return true
		}
	}
	return false
}

// An image that adds no step still has all its layers in the image store.
func TestBaseLayersArrive(t *testing.T) {
	f := newFixture(t)
	img := f.build(dockerfile(t, "FROM base\nLABEL only=label\n"))
	img.file(t, "/tmp", "")
	if _, ok := img.files["/bin/busybox"]; !ok {
		t.Error("/bin/busybox is missing")
	}
}

func TestErrors(t *testing.T) {
	f := newFixture(t)
	missing := filepath.Join(t.TempDir(), "missing")
	for _, c := range []struct {
		name  string
		r     Request
		class func(error) bool
		text  []string
		hint  string
	}{
		{"failing step", quiet(dockerfile(t, "FROM base\n\nRUN echo from the step; exit 3\nRUN true\n")), errdefs.IsFailedPrecondition, []string{
			`process "/bin/sh -c echo from the step; exit 3" did not complete successfully: exit code: 3`,
			"\nfrom the step\n", "Dockerfile:3", "3 | >>> RUN echo from the step; exit 3"}, ""},
		{"syntax error", dockerfile(t, "FROM base\nRUNN true\n"), errdefs.IsInvalidArgument, []string{
			"unknown instruction: RUNN", "2 | >>> RUNN true"}, ""},
		{"empty Dockerfile", dockerfile(t, ""), errdefs.IsInvalidArgument, []string{"Dockerfile cannot be empty"}, ""},
		{"missing file to copy", dockerfile(t, "FROM base\nCOPY nothing /\n"), errdefs.IsInvalidArgument, []string{
			"nothing", "2 | >>> COPY nothing /"}, ""},
		{"unknown stage", Request{ContextDir: dockerfile(t, "FROM base\n").ContextDir, Target: "nope"}, errdefs.IsNotFound,
			[]string{`target stage "nope"`}, "FROM … AS name"},
		{"missing context", Request{ContextDir: missing}, errdefs.IsInvalidArgument, []string{missing, "no such file"}, "Dockerfile"},
		{"context is a file", Request{ContextDir: os.Args[0]}, errdefs.IsInvalidArgument, []string{"not a directory"}, "Dockerfile"},
		{"missing Dockerfile", Request{ContextDir: t.TempDir()}, errdefs.IsInvalidArgument, []string{"Dockerfile", "no such file"}, "-f"},
		{"several platforms", Request{ContextDir: dockerfile(t, "FROM base\n").ContextDir, Platform: "linux/s390x,linux/amd64"},
			errdefs.IsInvalidArgument, []string{"linux/s390x,linux/amd64"}, "once for each"},
		{"no context", Request{}, errdefs.IsInvalidArgument, []string{"one directory, URL or stream"}, ""},
		{"every fault at once", Request{ContextDir: "/", Network: "bridge", ShmSize: -1, AddHosts: []string{"x"}, Ulimits: []string{"y"},
			Secrets: map[string][]byte{"s": make([]byte, maxSecret+1)}, CacheTo: []CacheOption{{Type: "s3"}}, CacheFrom: []CacheOption{{Type: "local"}, {Type: "registry"}}},
			errdefs.IsInvalidArgument, []string{"bridge", "-1", `host "x"`, `ulimit "y"`, `secret "s"`, `"s3"`, "src=", "ref="}, ""},
		{"bad platform", Request{ContextDir: dockerfile(t, "FROM base\n").ContextDir, Platform: "a/b/c/d/e"},
			errdefs.IsInvalidArgument, []string{"a/b/c/d/e"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := f.Build(t.Context(), c.r, nil)
			checkError(t, err, c.class, c.text, c.hint)
		})
	}
}

func quiet(r Request) Request {
	r.Quiet = true
	return r
}

func checkError(t *testing.T, err error, class func(error) bool, text []string, next string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if !class(err) {
		t.Errorf("wrong class: %v", errdefs.Resolve(err))
	}
	for _, want := range text {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q", want)
		}
	}
	if !strings.Contains(hint.Of(err), next) {
		t.Errorf("hint %q lacks %q", hint.Of(err), next)
	}
	t.Logf("%v\nhint: %s", err, hint.Of(err))
}

// FROM falls through to the registry where the store has no such image, and --pull asks only the registry.
func TestFromRegistry(t *testing.T) {
	f := newFixture(t)
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	push(t, reg, "other:v1", busybox(t))
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		asked = append(asked, r.URL.Path)
		reg.ServeHTTP(w, r)
	}))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")

	r := dockerfile(t, "FROM "+host+"/other:v1\nRUN echo hi >/hi\n")
	_, err := f.Build(t.Context(), r, nil)
	checkError(t, err, errdefs.IsNotFound, []string{host + "/other:v1"}, "atoll pull "+host+"/other:v1")

	if err := os.MkdirAll(f.o.DockerConfigDir, 0o700); err != nil {
		t.Fatal(err)
	}
	config := `{"auths":{"` + host + `":{"auth":"bWU6c2VjcmV0"}}}`
	if err := os.WriteFile(filepath.Join(f.o.DockerConfigDir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	f.build(r).file(t, "/hi", "hi\n")
	if len(asked) == 0 {
		t.Error("the registry was not asked")
	}

	// An unknown tag of a registry that answers, and what the store has under --pull.
	for _, pull := range []bool{false, true} {
		image := host + "/nothing:v1"
		if pull {
			image = host + "/library/base:latest" // the store's handler ignores ns, so it would have this one
		}
		r := dockerfile(t, "FROM "+image+"\n")
		r.Pull = pull
		_, err = f.Build(t.Context(), r, nil)
		checkError(t, err, errdefs.IsNotFound, []string{image, "1 | >>> FROM " + image}, "atoll pull "+image)
	}
}

func TestUnknownBase(t *testing.T) {
	b := New(Options{KnownBase: func(n reference.Named) bool { return n.Name() == "docker.io/library/debian" }})
	err := b.unknownBase("docker.io/library/debian:bookworm", "docker.io/library/debian:bookworm: not found", "")
	checkError(t, err, errdefs.IsNotFound, []string{"image debian:bookworm"}, "atoll base build debian:bookworm, or atoll pull debian:bookworm")
	err = b.unknownBase("docker.io/me/app:1", "dial tcp: lookup registry-1.docker.io: no such host", "")
	checkError(t, err, errdefs.IsUnavailable, []string{"image me/app:1", "no such host"}, "atoll pull me/app:1")
}

// sleepFor is a time that no other process sleeps.
var sleepFor = fmt.Sprint(1_000_000 + os.Getpid())

// hang starts a build whose step runs on, and says when it does.
func (f *fixture) hang(ctx context.Context) (running chan struct{}, result chan error) {
	running, result = make(chan struct{}), make(chan error, 1)
	r := dockerfile(f.t, "FROM base\nRUN echo running; exec sleep "+sleepFor+"\n")
	go func() {
		told := false
		_, err := f.Build(ctx, r, func(s *client.SolveStatus) {
			if len(s.Logs) > 0 && !told {
				told = true
				close(running)
			}
		})
		result <- err
	}()
	return running, result
}

func wait[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: nothing after 20 s", what)
		panic("unreachable")
	}
}

func TestCancel(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	running, result := f.hang(ctx)
	wait(t, "the step", running)
	start := time.Now()
	cancel()
	err := wait(t, "the build", result)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want a cancelled build", err)
	}
	t.Logf("%v after %v", err, time.Since(start))
	f.build(dockerfile(t, "FROM base\nRUN echo next >/next\n")).file(t, "/next", "next\n")
}

func TestCloseEndsBuilds(t *testing.T) {
	f := newFixture(t)
	running, result := f.hang(t.Context())
	wait(t, "the step", running)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := wait(t, "the build", result); !errdefs.IsAborted(err) {
		t.Errorf("got %v, want an aborted build", err)
	}
	if pids := sleepers(t); len(pids) > 0 {
		t.Errorf("steps still run: %v", pids)
	}
}

func TestKilledChild(t *testing.T) {
	f := newFixture(t)
	running, result := f.hang(t.Context())
	wait(t, "the step", running)
	bundles, _ := filepath.Glob(filepath.Join(f.o.Dir, "executor", "*", "config.json"))
	if len(bundles) != 1 {
		t.Fatalf("bundles of running steps: %v, want one", bundles)
	}
	pid := f.running.cmd.Process.Pid
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	err := wait(t, "the build", result)
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("the build ended %v after its builder", d)
	}
	checkError(t, err, errdefs.IsUnavailable, []string{"the builder", "died", "killed"}, "")

	f.build(dockerfile(t, "FROM base\nRUN echo again >/again\n")).file(t, "/again", "again\n")
	if pids := sleepers(t); len(pids) > 0 {
		t.Errorf("the killed builder's step still runs: %v", pids)
	}
	left, _ := filepath.Glob(filepath.Join(f.o.Dir, "executor", "*", "config.json"))
	if len(left) > 0 {
		t.Errorf("bundles left: %v", left)
	}
	container := filepath.Base(filepath.Dir(bundles[0]))
	for _, pattern := range []string{"/sys/fs/cgroup/atoll-build/buildkit/", "/sys/fs/cgroup/*/atoll-build/buildkit/"} {
		if groups, _ := filepath.Glob(pattern + container); len(groups) > 0 {
			t.Errorf("cgroups left: %v", groups)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), f.o.Dir) {
		t.Error("the builder's mounts are seen outside")
	}
}

// sleepers lists hang's steps.
func sleepers(t *testing.T) []string {
	t.Helper()
	var pids []string
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if args, _ := os.ReadFile(l); string(args) == "sleep\x00"+sleepFor+"\x00" {
			pids = append(pids, filepath.Base(filepath.Dir(l)))
		}
	}
	return pids
}

// Two builders on one directory: the second gets an error.
func TestSecondBuilder(t *testing.T) {
	f := newFixture(t)
	r := dockerfile(t, "FROM base\n")
	f.build(r)
	second := New(f.o)
	defer second.Close()
	_, err := second.Build(t.Context(), r, nil)
	checkError(t, err, errdefs.IsUnavailable, []string{"starting the builder", "lock"}, "")
}

func TestFullDisk(t *testing.T) {
	f := newFixture(t)
	// A small file system of its own for the build cache.
	if err := os.MkdirAll(f.o.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", f.o.Dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		if err := syscall.Unmount(f.o.Dir, 0); err != nil {
			t.Error(err)
		}
	})
	_, err := f.Build(t.Context(), dockerfile(t, "FROM base\nRUN dd if=/dev/zero of=/big bs=1M count=100\n"), nil)
	checkError(t, err, errdefs.IsResourceExhausted, []string{f.o.Dir, "bytes free"}, "free some space")
}

func TestTimeout(t *testing.T) {
	f := newFixture(t)
	r := dockerfile(t, "FROM base\nRUN sleep "+sleepFor+"\n")
	r.Timeout = 500 * time.Millisecond
	_, err := f.Build(t.Context(), r, nil)
	checkError(t, err, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }, []string{"not done after 500ms"}, "--timeout")
}

// Passwords of URLs are in no message.
func TestRedact(t *testing.T) {
	for _, text := range []string{redact("https://me:hunter2@git.example/x.git#main"), redactAll("fetching https://me:hunter2@git.example/x.git failed")} {
		if strings.Contains(text, "hunter2") || !strings.Contains(text, "git.example/x.git") {
			t.Error(text)
		}
	}
}

func TestFrontendAttrs(t *testing.T) {
	b := New(Options{Proxy: Proxy{HTTP: "http://proxy:1", No: "a,b"}})
	attrs := b.frontendAttrs(Request{
		BuildArgs: map[string]string{"A": "1", "HTTP_PROXY": "http://own:2"}, NoCacheStages: []string{"x", "y"}, Network: "none",
		AddHosts: []string{"h=192.0.2.1", "i=::1"}, Ulimits: []string{"nofile=1:2"}, ShmSize: 64,
	})
	for key, want := range map[string]string{
		"build-arg:A": "1", "build-arg:http_proxy": "http://own:2", "build-arg:HTTP_PROXY": "http://own:2", "build-arg:no_proxy": "a,b",
		"no-cache": "x,y", "force-network-mode": "none", "add-hosts": "h=192.0.2.1,i=::1", "ulimit": "nofile=1:2", "shm-size": "64",
	} {
		if attrs[key] != want {
			t.Errorf("%s is %q, want %q", key, attrs[key], want)
		}
	}
	if _, ok := attrs["build-arg:https_proxy"]; ok {
		t.Error("a proxy that is not set is an ARG")
	}
}

// Who sends a context does not choose how much memory the daemon takes to unpack it.
func TestArchiveOfLargeWindow(t *testing.T) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "Dockerfile", Mode: 0o644}), w.Close()); err != nil {
		t.Fatal(err)
	}
	// A frame that declares its window, as 10 and this many powers of 2, and one raw block.
	frame := func(exponent byte) io.Reader {
		block := 1 | plain.Len()<<3
		head := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3, byte(block), byte(block >> 8), byte(block >> 16)}
		return bytes.NewReader(append(head, plain.Bytes()...))
	}
	archive, err := openArchive(frame(17))
	if err != nil {
		t.Fatalf("zstd with a window of 128 MiB: %v", err)
	}
	archive.Close()
	if _, err := openArchive(frame(18)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "window of more than 128 MiB") {
		t.Errorf("zstd with a window of 256 MiB: %v", err)
	}
}

// FuzzArchive: what a client streams as a context is an archive, or it is not; nothing else happens.
func FuzzArchive(f *testing.F) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	_ = w.WriteHeader(&tar.Header{Name: "a", Size: 1, Mode: 0o644})
	_, _ = w.Write([]byte("x"))
	_ = w.Close()
	for _, seed := range [][]byte{plain.Bytes(), []byte("FROM x"), {0x1f, 0x8b, 8, 0}, []byte("BZh9"), []byte("\xfd7zXZ\x00\x00"), {0x28, 0xb5, 0x2f, 0xfd, 0}, nil} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		archive, err := openArchive(bytes.NewReader(data))
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(archive, 1<<20))
		archive.Close()
	})
}
