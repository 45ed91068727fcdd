package cli

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPushCmd(t *testing.T) {
	a := newAtoll(t)
	r := a.run("push", "hello")
	if r.code != 0 || r.out != "sha256:90\n" || !strings.Contains(r.errOut, "exists") || !strings.Contains(r.errOut, "Warning: only this platform's image was pushed: linux/arm64") {
		t.Errorf("%+v", r)
	}
	if r := a.run("push", "-q", "other"); r.code != 1 || r.out != "" || !strings.Contains(r.errOut, "Hint: atoll tag") {
		t.Errorf("%+v", r)
	}
}

func TestSaveCmd(t *testing.T) {
	a := newAtoll(t)
	if out := a.ok("save", "hello", "b"); out != "hello+b as docker-archive" {
		t.Errorf("stdout %q", out)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "x.tar")
	a.ok("save", "--format", "oci-archive", "-o", path, "hello")
	if data, err := os.ReadFile(path); string(data) != "hello as oci-archive" || err != nil {
		t.Errorf("file %q, %v", data, err)
	}
	// A save that fails leaves the file that was there, and no other.
	if r := a.run("save", "-o", path, "cut"); r.code != 1 || !strings.Contains(r.errOut, "the disk is broken") {
		t.Errorf("%+v", r)
	}
	files, _ := os.ReadDir(dir)
	if data, _ := os.ReadFile(path); string(data) != "hello as oci-archive" || len(files) != 1 {
		t.Errorf("after a failure: %q, %d files", data, len(files))
	}
	if r := a.run("save", "-o", filepath.Join(dir, "no/such/x.tar"), "hello"); r.code != 1 || !strings.Contains(r.errOut, "no such file") {
		t.Errorf("%+v", r)
	}
}

func TestLoadCmd(t *testing.T) {
	a := newAtoll(t)
	a.in = "one:1 id:x " + strings.Repeat("y", 3*archiveChunk)
	if out := a.ok("load", "-q"); !strings.HasPrefix(out, "Loaded image: one:1\nLoaded image ID: sha256:1d\n") {
		t.Errorf("stdout %.200q", out)
	}
	if string(a.fake.loaded) != a.in {
		t.Errorf("%d bytes arrived, %d were sent", len(a.fake.loaded), len(a.in))
	}
	// The daemon's refusal is what is shown, however much there still was to send.
	a.in = "bad" + strings.Repeat("y", 20*archiveChunk)
	if r := a.run("load"); r.code != 1 || !strings.Contains(r.errOut, "invalid argument") || !strings.Contains(r.errOut, "Hint: save it again") {
		t.Errorf("%+v", r)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.run("load", "-i", dir)
	if h, err := tar.NewReader(bytes.NewReader(a.fake.loaded)).Next(); err != nil || h.Name != "index.json" {
		t.Errorf("a directory arrived as %+v, %v", h, err)
	}
	if r := a.run("load", "-i", filepath.Join(dir, "nosuch")); r.code != 1 || !strings.Contains(r.errOut, "no such file") || !strings.Contains(r.errOut, "Hint") {
		t.Errorf("%+v", r)
	}
}

// TestLoadBrokenInput ends the call when the archive cannot be read: the daemon must not take a part for the whole.
func TestLoadBrokenInput(t *testing.T) {
	a := newAtoll(t)
	var out, errOut syncBuffer
	env := a.environment(&out, &errOut)
	env.Stdin = io.MultiReader(strings.NewReader("one:1 "), brokenReader{})
	if code := Main(t.Context(), []string{"load"}, env); code != 1 || !strings.Contains(errOut.String(), "the tape is torn") {
		t.Errorf("exit code %d, %s", code, errOut.String())
	}
	if a.fake.loaded != nil {
		t.Errorf("the daemon loaded %q", a.fake.loaded)
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("the tape is torn") }

func TestImportCmd(t *testing.T) {
	a := newAtoll(t)
	a.in = "tar"
	if out := a.ok("import", "-q", "-c", "CMD x", "-m", "why", "--platform", "linux/arm64", "-", "mine:1"); out != "sha256:1337\n" {
		t.Errorf("stdout %q", out)
	}
	s := a.fake.imported
	if s.GetReference() != "mine:1" || s.GetChanges()[0] != "CMD x" || s.GetMessage() != "why" || s.GetPlatform() != "linux/arm64" {
		t.Errorf("start %v", s)
	}
	if r := a.run("import", "https://example.com/x.tar"); r.code != 1 || !strings.Contains(r.errOut, "Hint: curl -L") {
		t.Errorf("%+v", r)
	}
}

func TestHistoryCmd(t *testing.T) {
	a := newAtoll(t)
	out := a.ok("history", "hello")
	for _, want := range []string{"IMAGE", "CREATED BY", "abababababab", "<missing>", `CMD ["serve"]`, "3MiB", "kit", "…"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if out := a.ok("history", "--no-trunc", "hello"); strings.Contains(out, "…") || !strings.Contains(out, strings.Repeat("ab", 32)) {
		t.Errorf("--no-trunc:\n%s", out)
	}
	var rows []historyView
	if err := json.Unmarshal([]byte(a.ok("history", "--format", "json", "hello")), &rows); err != nil || len(rows) != 2 || rows[0].Tags[0] != "hello:1.0" {
		t.Errorf("%+v, %v", rows, err)
	}
}

func TestImagePruneCmd(t *testing.T) {
	a := newAtoll(t)
	a.in = "n\n"
	if r := a.run("image", "prune"); r.code != 0 || r.out != "" || len(a.fake.pruned) != 0 || !strings.Contains(r.errOut, "[y/N]") {
		t.Errorf("no: %+v", r)
	}
	a.in = "y\n"
	if out := a.ok("image", "prune", "-a"); out != "untagged: old:1\ndeleted: sha256:0d\nTotal reclaimed space: 2MiB\n" {
		t.Errorf("yes: %q", out)
	}
	a.in = ""
	if out := a.ok("image", "prune", "--dry-run", "--filter", "until=24h"); !strings.HasPrefix(out, "would untag: old:1\n") {
		t.Errorf("dry run: %q", out)
	}
	if p := a.fake.pruned; len(p) != 2 || !p[0].GetAll() || !p[1].GetDryRun() || p[1].GetFilters()[0] != "until=24h" {
		t.Errorf("requests %v", p)
	}
}

func TestImagesFilters(t *testing.T) {
	a := newAtoll(t)
	a.ok("images", "-a", "-f", "dangling=true", "team/*")
	if d := cmp.Diff([]string{"dangling=true", "reference=team/*"}, a.fake.filters); d != "" {
		t.Error(d)
	}
	if out := a.ok("images", "--digests"); !strings.Contains(out, "DIGEST") {
		t.Error(out)
	}
}

func TestLoginCmd(t *testing.T) {
	a := newAtoll(t)
	dir := filepath.Join(t.TempDir(), "docker")
	a.env["DOCKER_CONFIG"] = dir
	file := filepath.Join(dir, "config.json")

	a.in = "wrong\n"
	if r := a.run("login", "-u", "ann", "--password-stdin", "r.example:5000"); r.code != 1 || strings.Contains(r.errOut, "wrong") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Error("a login that failed is kept")
	}
	a.in = "s3cret\n"
	r := a.run("login", "-u", "ann", "--password-stdin", "https://r.example:5000/v2/")
	if r.code != 0 || r.out != "Login Succeeded\n" || !strings.Contains(r.errOut, "Warning: the password is stored unencrypted in "+file) {
		t.Errorf("%+v", r)
	}
	a.ok("login", "-u", "ann", "-p", "s3cret")
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	var have struct {
		Auths map[string]struct{ Auth string }
	}
	data, _ := os.ReadFile(file)
	if err := json.Unmarshal(data, &have); err != nil || have.Auths["r.example:5000"].Auth != "YW5uOnMzY3JldA==" || have.Auths["https://index.docker.io/v1/"].Auth == "" {
		t.Errorf("kept %s, %v", data, err)
	}
	a.ok("logout", "r.example:5000")
	a.ok("logout")
	if data, _ = os.ReadFile(file); strings.Contains(string(data), "YW5u") {
		t.Errorf("after logout: %s", data)
	}
	if r := a.run("logout", "r.example:5000"); r.code != 0 || !strings.Contains(r.errOut, "Not logged in") {
		t.Errorf("%+v", r)
	}
	a.in = ""
	for _, args := range [][]string{{"login"}, {"login", "-u", "ann"}, {"login", "-u", "ann", "--password-stdin"}} {
		if r := a.run(args...); r.code != 1 || !strings.Contains(r.errOut, "Hint") {
			t.Errorf("%v: %+v", args, r)
		}
	}
	if r := a.run("login", "--password-stdin"); r.code != 2 {
		t.Errorf("%+v", r)
	}
}

// TestLoginHelper keeps a login with the credential helper that Docker's file names.
func TestLoginHelper(t *testing.T) {
	a := newAtoll(t)
	dir := t.TempDir()
	a.env["DOCKER_CONFIG"] = dir
	script := "#!/bin/sh\necho \"$1\" >>" + dir + "/called\ncat >>" + dir + "/called\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"credHelpers":{"r.example":"test"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	r := a.run("login", "-u", "ann", "-p", "s3cret", "r.example")
	if r.code != 0 || strings.Contains(r.errOut, "unencrypted") {
		t.Errorf("%+v", r)
	}
	a.ok("logout", "r.example")
	called, _ := os.ReadFile(filepath.Join(dir, "called"))
	if !strings.Contains(string(called), "store\n") || !strings.Contains(string(called), `"Secret":"s3cret"`) || !strings.Contains(string(called), "erase\nr.example") {
		t.Errorf("the helper was called so:\n%s", called)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "config.json")); strings.Contains(string(data), "s3cret") || strings.Contains(string(data), "YW5u") {
		t.Errorf("the file has it too: %s", data)
	}
}
