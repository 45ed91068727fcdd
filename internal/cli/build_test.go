package cli

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func TestBuildRequest(t *testing.T) {
	a := newAtoll(t)
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.WriteFile("secret", []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.env["TOKEN"] = "from here"
	a.ok("build", "-q", "--secret", "id=a,src=secret", "--secret", "id=b,env=TOKEN", "--secret", "id=TOKEN", "--secret", "type=env,id=c,src=TOKEN",
		"--build-context", "d=.", "--build-context", "i=docker-image://x", "--build-context", "l=oci-layout://lay:v1", "--build-context", "g=git@h:x.git",
		"--no-cache-filter", "one,two", "--add-host", "v6:[::1]", "--add-host", "v4=192.0.2.1", "--shm-size", "1M", "--ulimit", "nofile=1:2", "--network", "none",
		"--platform", "linux/arm64", "--timeout", "2m", "--cache-from", "reg/cache", "--cache-to", "type=local,dest=c,mode=max", ".")
	want := &atollv1.BuildStart{
		ContextDir: dir, Quiet: true, Platform: "linux/arm64", Network: "none", ShmBytes: 1 << 20, Ulimits: []string{"nofile=1:2"},
		Secrets:       map[string][]byte{"a": []byte("from a file"), "b": []byte("from here"), "TOKEN": []byte("from here"), "c": []byte("from here")},
		BuildContexts: map[string]string{"d": "dir:" + dir, "i": "docker-image://x", "l": "oci-layout://" + filepath.Join(dir, "lay:v1"), "g": "git@h:x.git"},
		NoCacheStages: []string{"one", "two"}, AddHosts: []string{"v6=::1", "v4=192.0.2.1"}, Timeout: durationpb.New(120e9),
		CacheFrom: []*atollv1.CacheOption{{Type: "registry", Attributes: map[string]string{"ref": "reg/cache"}}},
		CacheTo:   []*atollv1.CacheOption{{Type: "local", Attributes: map[string]string{"dest": filepath.Join(dir, "c"), "mode": "max"}}},
	}
	if d := gocmp.Diff(want, a.fake.built, protocmp.Transform()); d != "" {
		t.Error(d)
	}

	a.in = "FROM x\n"
	a.ok("build", "-f", "-", "git://host/x.git#main:dir")
	want = &atollv1.BuildStart{ContextUrl: "git://host/x.git#main:dir", DockerfileText: []byte("FROM x\n")}
	if d := gocmp.Diff(want, a.fake.built, protocmp.Transform()); d != "" {
		t.Error(d)
	}
}

// A context on standard input arrives whole; what comes back as an output is the file, or standard output without a digest.
func TestBuildStreams(t *testing.T) {
	a := newAtoll(t)
	t.Chdir(t.TempDir())
	a.in = strings.Repeat("context ", 100_000)
	if out := a.ok("build", "-f", "sub/Dockerfile", "-o", "type=oci,dest=file", "-"); out != "sha256:beef\n" {
		t.Errorf("stdout %q", out)
	}
	if data, _ := os.ReadFile("file"); string(data) != a.in {
		t.Errorf("the file has %d bytes, want %d", len(data), len(a.in))
	}
	if a.fake.built.GetDockerfile() != "sub/Dockerfile" || !a.fake.built.GetContextStream() {
		t.Errorf("request %v", a.fake.built)
	}
	if out := a.ok("build", "-o", "-", "-"); out != a.in {
		t.Errorf("stdout has %d bytes", len(out))
	}
	a.ok("build", "--iidfile", "iid", "--metadata-file", "meta", ".")
	if data, _ := os.ReadFile("iid"); string(data) != "sha256:beef" {
		t.Errorf("iidfile: %q", data)
	}
	if data, _ := os.ReadFile("meta"); !strings.Contains(string(data), `"containerimage.digest": "sha256:beef"`) || !strings.Contains(string(data), `"a": 1`) {
		t.Errorf("metadata: %s", data)
	}
	if left, _ := filepath.Glob(".atoll-*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A directory output stays in its directory, whatever the archive says.
func TestBuildUnpack(t *testing.T) {
	a := newAtoll(t)
	t.Chdir(t.TempDir())
	outside := filepath.Join(t.TempDir(), "victim")
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data string) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write([]byte(data))
	}
	add(tar.Header{Name: "./d/", Typeflag: tar.TypeDir, Mode: 0o750}, "")
	add(tar.Header{Name: "d/f", Mode: 0o640}, "data")
	add(tar.Header{Name: "d/hard", Typeflag: tar.TypeLink, Linkname: "/d/f"}, "")
	add(tar.Header{Name: "d/soft", Typeflag: tar.TypeSymlink, Linkname: "f"}, "")
	add(tar.Header{Name: "../../up", Mode: 0o644}, "kept inside")
	add(tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, "")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	a.in = b.String()
	a.ok("build", "-o", "dir", "-")
	for path, want := range map[string]string{"dir/d/f": "data", "dir/d/hard": "data", "dir/d/soft": "data", "dir/up": "kept inside"} {
		if data, _ := os.ReadFile(path); string(data) != want {
			t.Errorf("%s: %q", path, data)
		}
	}
	if info, err := os.Stat("dir/d/f"); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode: %v %v", info, err)
	}

	b.Reset()
	w = tar.NewWriter(&b)
	add(tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: filepath.Dir(outside)}, "")
	add(tar.Header{Name: "link/victim", Mode: 0o644}, "out")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	a.in = b.String()
	if r := a.run("build", "-o", "dir2", "-"); r.code != 1 || !strings.Contains(r.errOut, "link/victim") {
		t.Errorf("code %d: %s", r.code, r.errOut)
	}
	if _, err := os.Stat(outside); err == nil {
		t.Error("a link led out of the directory")
	}
}

// The daemon's question reaches an agent made of a key, and its answer comes back; changing the agent is refused.
func TestBuildAgent(t *testing.T) {
	a := newAtoll(t)
	t.Chdir(t.TempDir())
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "comment")
	if err != nil {
		t.Fatal(err)
	}
	locked, err := ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{"key": block, "locked": locked} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a.fake.question = []byte{0, 0, 0, 1, 11} // list identities
	a.ok("build", "-q", "--ssh", "default=key", ".")
	if !bytes.Contains(a.fake.answer, []byte("ecdsa-sha2-nistp256")) {
		t.Errorf("the agent answered %q", a.fake.answer)
	}
	a.fake.question = []byte{0, 0, 0, 1, 19} // remove all identities
	a.ok("build", "-q", "--ssh", "default=key", ".")
	if !bytes.Equal(a.fake.answer, []byte{0, 0, 0, 1, 5}) { // failure
		t.Errorf("removing keys was answered by %v", a.fake.answer)
	}
	for args, want := range map[string]string{
		"default":            "SSH_AUTH_SOCK is not set",
		"default=locked":     "has a passphrase",
		"default=build_test": "no such file",
		"=x":                 "write it as default",
	} {
		if r := a.run("build", "--ssh", args, "."); r.code == 0 || !strings.Contains(r.errOut, want) {
			t.Errorf("--ssh %s: code %d, %s", args, r.code, r.errOut)
		}
	}
}

func TestBuilderCommands(t *testing.T) {
	a := newAtoll(t)
	if out := a.ok("builder", "du"); !strings.Contains(out, "abcdefghijkl   regular   3MiB") || !strings.Contains(out, "RUN make") || strings.Contains(out, "more") || !strings.Contains(out, "Total: 3MiB") {
		t.Error(out)
	}
	if out := a.ok("builder", "prune", "-a", "-f", "--filter", "until=48h", "--keep-storage", "2G"); out != "Total reclaimed space: 5MiB\n" {
		t.Error(out)
	}
	want := &atollv1.PruneBuildRequest{All: true, UnusedFor: durationpb.New(48 * 3600e9), KeepBytes: 2 << 30}
	if d := gocmp.Diff(want, a.fake.cachePruned, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if out := a.ok("system", "prune", "-f"); !strings.Contains(out, "Total reclaimed space: 5MiB") {
		t.Error(out)
	}
	a.fake.pruned = nil
	if r := a.run("builder", "prune"); r.code != 0 || !strings.Contains(r.errOut, "nothing was removed") || a.fake.pruned != nil {
		t.Errorf("code %d: %s", r.code, r.errOut)
	}
	if r := a.run("builder", "prune", "-f", "--filter", "label=x"); r.code != 2 || !strings.Contains(r.errOut, "until=") {
		t.Errorf("code %d: %s", r.code, r.errOut)
	}
}

func TestBuildReports(t *testing.T) {
	a := newAtoll(t)
	if r := a.run("build", "--check", "."); r.code != 1 || r.out != "WARNING: Rule\n" {
		t.Errorf("code %d: %s%s", r.code, r.out, r.errOut)
	}
}
