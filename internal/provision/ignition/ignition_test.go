package ignition

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/plan"
)

func TestIs(t *testing.T) {
	for doc, want := range map[string]bool{
		`{"ignition": {"version": "3.4.0"}}`:               true,
		"\n  {\"ignition\": {}}":                           true,
		`{"ignition": {"version": `:                        true, // whoever wrote it wants to hear what is wrong
		"variant: fcos\nversion: 1.5.0\n":                  true,
		"# mine\nversion: 1.5.0\nvariant : fcos\n":         true,
		"variant: fcos\n\tbroken":                          true,
		`{"a": "ignition"}`:                                false,
		`{"a": {"ignition": {}}}`:                          false,
		"#cloud-config\nvariant: fcos\n":                   false,
		"#!/bin/sh\nvariant: fcos\n":                       false,
		"Content-Type: multipart/mixed\n\nvariant: fcos\n": false,
		"packages: [a]\n":                                  false,
		"a:\n  variant: fcos\n":                            false,
		"":                                                 false,
		"{":                                                false,
		"{\"x\": 1":                                        false,
		"## template: jinja\n#cloud-config\nvariant: fcos\n\n": false,
	} {
		if got := Is([]byte(doc)); got != want {
			t.Errorf("Is(%q) is %v", doc, got)
		}
	}
}

// All that is wrong is said at once, with its path and line.
func TestCheckFaults(t *testing.T) {
	for _, c := range []struct {
		name, doc string
		want      []string
	}{
		{"Ignition", `{
  "ignition": {"version": "3.4.0", "config": {"merge": [{"source": "s3://bucket/key?versionId=secret"}]}},
  "storage": {
    "raid": [{"name": "a", "level": "raid1", "devices": ["/dev/vdb"]}],
    "disks": [{"device": "/dev/vda"}],
    "files": [
      {"path": "relative", "mode": 420},
      {"path": "/a", "contents": {"source": "tftp://host/path"}},
      {"path": "/b", "user": {"id": -1}}
    ]
  },
  "systemd": {"units": [{"name": "../x.service"}]},
  "kernelArguments": {"shouldExist": ["a\nb"]}
}`, []string{
			"$.storage.files.0.path, line 7 col 16: path not absolute",
			"$.ignition.config.merge.0.source, line 2 col 68: source s3://bucket/key?…: scheme s3 is not implemented: data, http and https are",
			"$.storage.raid, line 4 col 14: storage.raid is not implemented: a machine's root disk comes from its image",
			"$.storage.disks, line 5 col 15: storage.disks is not implemented: a machine's root disk comes from its image",
			"$.storage.files.1.contents.source, line 8 col 45: source tftp://host/path: scheme tftp is not implemented: data, http and https are",
			"$.storage.files.2.user.id, line 9 col 37: -1 is no ID: 0 to 4294967294 are",
			`$.systemd.units.0.name, line 12 col 34: "../x.service" is no name of a file`,
			`$.kernelArguments.shouldExist.0, line 13 col 39: "a\nb" is no kernel argument`,
		}},
		{"embedded", `{"ignition": {"version": "3.4.0", "config": {"merge": [
  {"source": "data:,%7B%22ignition%22%3A%7B%22version%22%3A%223.0.0%22%7D%2C%22storage%22%3A%7B%22luks%22%3A%5B%7B%22name%22%3A%22x%22%7D%5D%2C%22disks%22%3A%5B%7B%22device%22%3A%22%2Fdev%2Fx%22%7D%5D%7D%7D"}]}},
  "storage": {"disks": [{"device": "/dev/vda"}]}}`, []string{
			"$.storage.disks, line 3 col 25: storage.disks is not implemented: a machine's root disk comes from its image",
			"config data:…: $.storage.disks, line 1 col 75: storage.disks is not implemented: a machine's root disk comes from its image",
		}},
		{"no JSON", "{\"ignition\": {\"version\": \"3.4.0\"},\n}", []string{"line 2 col 1: invalid character '}' looking for beginning of object key string"}},
		{"wrong type", "{\"ignition\": {\"version\": \"3.4.0\"},\n\"storage\": 1}", []string{"line 2 col 13: json: cannot unmarshal number into Go struct field Config.storage of type types.Storage"}},
		{"no version", `{"ignition": {}}`, []string{"invalid config version (couldn't parse)"}},
		{"old version", `{"ignition": {"version": "2.3.0"}}`, []string{`$.ignition.version: version "2.3.0" is not known; 3.0.0 to 3.6.0 and 3.7.0-experimental are`}},
		{"a wrong hash", `{"ignition": {"version": "3.4.0"}, "storage": {"files": [{"path": "/a", "contents": {"source": "data:,a",
  "verification": {"hash": "sha256-` + strings.Repeat("0", 64) + `"}}}]}}`, []string{
			"file /a: source data:…: its hash is ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb, and the config wants " + strings.Repeat("0", 64),
		}},
		{"no gzip", `{"ignition": {"version": "3.4.0"}, "storage": {"files": [{"path": "/a", "append": [{"source": "data:,a", "compression": "gzip"}]}]}}`,
			[]string{"file /a: source data:…: unpacking it:"}},
		{"Butane", "variant: fcos\nversion: 1.5.0\nstorage:\n  filesystems:\n  - {device: /dev/vdb, path: /var, format: ext4}\n  files:\n  - path: /a\n    contents:\n      source: gs://a/b\n", []string{
			"$.storage.filesystems, line 5 col 3: storage.filesystems is not implemented: use the machine's volumes, or mount with a systemd unit",
			"$.storage.files.0.contents.source, line 9 col 15: source gs://a/b: scheme gs is not implemented",
		}},
		{"Butane's keys", "variant: fcos\nversion: 1.5.0\nstorage:\n  luks: []\n  files:\n  - path: /a\n    contnts: {}\nboot_device:\n  layout: x86_64\n", []string{
			"$.storage.files.0.contnts, line 7 col 5: unused key contnts",
			"$.boot_device, line 9 col 3: boot_device is not implemented",
		}},
		{"Butane's local", "variant: flatcar\nversion: 1.1.0\nstorage:\n  disks: [{device: /dev/vda}]\n  files:\n  - path: /a\n    contents:\n      local: b\n", []string{
			"$.storage.files.0.contents.local, line 8 col 14: local files are embedded when atoll is given the config by its file's name",
			"$.storage.disks, line 4 col 10: storage.disks is not implemented",
		}},
		{"Butane of OpenShift", "variant: openshift\nversion: 4.14.0\n", []string{"$.variant: openshift makes a MachineConfig for OpenShift's operator; write fcos"}},
		{"Butane of nobody", "variant: x\nversion: 1.0.0\n", []string{`$.variant: "x" is not known; fcos, fiot, flatcar, r4e are`}},
		{"Butane of the future", "variant: fiot\nversion: 9.0.0\n", []string{`$.version: version "9.0.0" of variant fiot is not known; 1.0.0, 1.1.0-experimental are`}},
		{"two Butanes", "variant: fcos\nversion: 1.5.0\n---\nvariant: fcos\n", []string{"more than one YAML document"}},
		{"no YAML", "variant: fcos\nversion: 1.5.0\n\t- a: b\n", []string{"yaml: line 2: found a tab character that violates indentation"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Check([]byte(c.doc))
			if err == nil || hint.Of(err) == "" {
				t.Fatalf("%v, with the hint %q", err, hint.Of(err))
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("there is no %q in\n%v", want, err)
				}
			}
			if n := strings.Count(err.Error(), "\n"); len(c.want) > 1 && n != len(c.want) {
				t.Errorf("%d faults, want %d:\n%v", n, len(c.want), err)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("a secret is told: %v", err)
			}
		})
	}
}

func TestCheckWarns(t *testing.T) {
	warnings, err := Check([]byte(`{"ignition": {"version": "3.4.0"}, "storage": {"files": [{"path": "/a", "mde": 1}]}}`))
	if want := []string{"$.storage.files.0.mde, line 1 col 73: unused key mde"}; err != nil || !cmp.Equal(warnings, want) {
		t.Errorf("%q, %v", warnings, err)
	}
}

// A config elsewhere is left for Apply.
func TestCheckStaysOffTheNetwork(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request") }))
	defer s.Close()
	if _, err := Check([]byte(fmt.Sprintf(`{"ignition": {"version": "3.4.0", "config": {"merge": [{"source": %q}]},
  "security": {"tls": {"certificateAuthorities": [{"source": %q}]}}},
  "storage": {"files": [{"path": "/a", "contents": {"source": %q}}]}}`, s.URL, s.URL, s.URL))); err != nil {
		t.Error(err)
	}
}

func TestTranslate(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"motd": "hello\n", "tree/a": "one", "tree/b/c": "two", "key": "ssh-ed25519 AAAA me\n", "x.service": "[Service]\nExecStart=/bin/true\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	butane := []byte(`variant: fcos
version: 1.5.0
passwd:
  users:
    - name: me
      ssh_authorized_keys_local: [key]
storage:
  files:
    - path: /etc/motd
      mode: 0600
      contents: {local: motd}
  trees:
    - local: tree
      path: /srv
systemd:
  units:
    - name: x.service
      contents_local: x.service
`)
	got, warnings, err := Translate(butane, dir)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("%v, %v", warnings, err)
	}
	p := plan.New()
	if err := Apply(t.Context(), got, p, Options{}); err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, f := range p.GetFiles() {
		files = append(files, fmt.Sprintf("%s %o %s", f.GetNode().GetPath(), f.GetNode().GetMode(), f.GetContents()[0].GetInline()))
	}
	if diff := cmp.Diff([]string{"/etc/motd 600 hello\n", "/srv/a 644 one", "/srv/b/c 644 two"}, files); diff != "" {
		t.Error(diff)
	}
	if k := p.GetUsers()[0].GetSshAuthorizedKeys(); !cmp.Equal(k, []string{"ssh-ed25519 AAAA me"}) {
		t.Errorf("keys %q", k)
	}
	if u := string(p.GetUnits()[0].GetContents()); u != "[Service]\nExecStart=/bin/true\n" {
		t.Errorf("unit %q", u)
	}

	// A warning is for the one who gets the result to say, with which it comes again.
	special := []byte("variant: fcos\nversion: 1.6.0\nstorage:\n  directories:\n  - {path: /a, mode: 02755}\n")
	got, warnings, err = Translate(special, "")
	again, againErr := Check(got)
	if err != nil || againErr != nil || len(warnings) != 0 || len(again) != 1 {
		t.Errorf("%q, %v, then %q, %v", warnings, err, again, againErr)
	}

	outside := []byte("variant: fcos\nversion: 1.5.0\nstorage:\n  files:\n  - path: /a\n    contents: {local: ../secret}\n")
	if _, _, err := Translate(outside, filepath.Join(dir, "tree")); err == nil {
		t.Error("a file outside of the directory was embedded")
	}
}

func gzipped(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func config(format string, args ...any) []byte {
	return fmt.Appendf(nil, `{"ignition": {"version": "3.4.0"}, "storage": {"files": [`+format+`]}}`, args...)
}

func TestApplyFetches(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	sum := sha256.Sum256(large)
	tries := 0
	mux := http.NewServeMux()
	mux.HandleFunc("/large.gz", func(w http.ResponseWriter, r *http.Request) { w.Write(gzipped(large)) })
	mux.HandleFunc("/busy", func(w http.ResponseWriter, r *http.Request) {
		if tries++; tries == 1 {
			http.Error(w, "later", http.StatusServiceUnavailable)
			return
		}
		if tries == 2 { // and an answer that is cut
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("sm"))
			return
		}
		w.Write([]byte("small"))
	})
	s := httptest.NewServer(mux)
	defer s.Close()
	spool := filepath.Join(t.TempDir(), "spool")
	p := plan.New()
	doc := config(`{"path": "/large", "contents": {"source": "%s/large.gz", "compression": "gzip", "verification": {"hash": "sha256-%s"}}, "append": [{"source": "data:,end"}]},
{"path": "/small", "append": [{"source": "%s/busy"}]}, {"path": "/empty", "contents": {"source": "data:,"}}, {"path": "/untouched"}`, s.URL, hex.EncodeToString(sum[:]), s.URL)
	if err := Apply(t.Context(), doc, p, Options{Spool: spool}); err != nil {
		t.Fatal(err)
	}
	contents := p.Contents()
	if len(contents) != 1 || contents[0].Size != int64(len(large)) {
		t.Fatalf("contents %+v", contents)
	}
	r, err := contents[0].Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, large) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	files := p.GetFiles()
	if got := files[0].GetAppend()[0].GetInline(); string(got) != "end" {
		t.Errorf("appended %q", got)
	}
	if got := files[1].GetAppend()[0].GetInline(); string(got) != "small" || tries != 3 || files[1].GetHasContents() {
		t.Errorf("%q after %d tries", got, tries)
	}
	if !files[2].GetHasContents() || len(files[2].GetContents()) > 0 || files[3].GetHasContents() {
		t.Errorf("empty: %v, untouched: %v", files[2], files[3])
	}
	filepath.WalkDir(spool, func(path string, d fs.DirEntry, _ error) error {
		info, err := d.Info()
		if err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
		return nil
	})
}

// What fails says which source and why, tells no secret, leaves the plan as it was, and leaves nothing in the spool of its own.
func TestApplyFails(t *testing.T) {
	mux := http.NewServeMux()
	zeros := strings.Repeat("0", 64)
	big := strings.Repeat("x", 200_000)
	mux.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, big) })
	mux.HandleFunc("/self", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"ignition": {"version": "3.4.0", "config": {"merge": [{"source": "http://%s/self"}]}}}`, r.Host)
	})
	mux.HandleFunc("/disks", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"ignition": {"version": "3.4.0"}, "storage": {"disks": [{"device": "/dev/vda"}]}}`)
	})
	mux.HandleFunc("/link", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"ignition": {"version": "3.4.0"}, "storage": {"links": [{"path": "/a", "target": "/b"}]}}`)
	})
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", http.StatusFound) })
	mux.HandleFunc("/busy", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusBadGateway) })
	mux.HandleFunc("/bomb", func(w http.ResponseWriter, r *http.Request) { w.Write(gzipped(make([]byte, 1<<20))) })
	s := httptest.NewServer(mux)
	defer s.Close()
	tls := httptest.NewTLSServer(mux)
	defer tls.Close()
	closed := httptest.NewServer(mux)
	closed.Close()
	merge := func(path string) []byte {
		return fmt.Appendf(nil, `{"ignition": {"version": "3.4.0", "config": {"merge": [{"source": %q}]}}, "storage": {"files": [{"path": "/a/b"}]}}`, s.URL+path)
	}
	for _, c := range []struct {
		name  string
		doc   []byte
		class func(error) bool
		want  []string
	}{
		{"hash", config(`{"path": "/ok", "contents": {"source": "data:,a"}}, {"path": "/a", "contents": {"source": "%s/big?token=secret", "verification": {"hash": "sha256-%s"}}}`, s.URL, zeros), errdefs.IsDataLoss,
			[]string{"file /a: source " + s.URL + "/big?…: its hash is 91e3faafd322", zeros}},
		{"not there", config(`{"path": "/a", "contents": {"source": "%s/nothing"}}`, s.URL), errdefs.IsNotFound, []string{"404 Not Found"}},
		{"round and round", config(`{"path": "/a", "contents": {"source": "%s/round"}}`, s.URL), errdefs.IsUnavailable, []string{"more than 10 redirects"}},
		{"busy", config(`{"path": "/a", "contents": {"source": "%s/busy"}}`, s.URL), errdefs.IsUnavailable, []string{"502 Bad Gateway", "tried for"}},
		{"nobody", config(`{"path": "/a", "contents": {"source": "%s/a?token=secret"}}`, closed.URL), errdefs.IsUnavailable, []string{"connection refused"}},
		{"a stranger", config(`{"path": "/a", "contents": {"source": "%s/big"}}`, tls.URL), errdefs.IsFailedPrecondition, []string{"certificate"}},
		{"a bomb", config(`{"path": "/a", "contents": {"source": "%s/bomb", "compression": "gzip"}}`, s.URL), errdefs.IsResourceExhausted, []string{"more than the 500000 bytes"}},
		{"several that are too much", config(`{"path": "/a", "contents": {"source": "%s/big"}, "append": [{"source": "%s/big"}, {"source": "%s/big"}]}`, s.URL, s.URL, s.URL), errdefs.IsResourceExhausted, []string{"more than the 100000 bytes"}},
		{"itself", merge("/self"), errdefs.IsInvalidArgument, []string{"more than 64 configs"}},
		{"refused elsewhere", merge("/disks"), errdefs.IsInvalidArgument, []string{"config " + s.URL + "/disks: $.storage.disks, line 1 col 58: storage.disks is not implemented"}},
		{"a contradiction", merge("/link"), errdefs.IsInvalidArgument, []string{"$.storage.files.0: file path includes link in config"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spool, p := t.TempDir(), plan.New()
			f := newFetcher(Options{Spool: spool})
			f.patience, f.left = 300*time.Millisecond, 500_000
			err := applyWith(context.Background(), f, c.doc, p)
			if err == nil || !c.class(err) || hint.Of(err) == "" {
				t.Fatalf("%v, hint %q", err, hint.Of(err))
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("there is no %q in %v", want, err)
				}
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("a secret is told: %v", err)
			}
			if len(p.GetFiles()) > 0 {
				t.Error("the plan has changed")
			}
			if left, _ := os.ReadDir(spool); len(left) > 2 {
				t.Errorf("the spool has %v", left)
			}
		})
	}
}

// What was fetched cannot lead the host to itself, unless to where the operator's own config leads.
func TestFetchedConfigsDoNotReachLoopback(t *testing.T) {
	inside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "internal") }))
	defer inside.Close()
	mux := http.NewServeMux()
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		w.Write(config(`{"path": "/a", "contents": {"source": "%s"}}`, inside.URL))
	})
	mux.HandleFunc("/same", func(w http.ResponseWriter, r *http.Request) {
		w.Write(config(`{"path": "/a", "contents": {"source": "http://%s/text"}}`, r.Host))
	})
	mux.HandleFunc("/text", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "text") })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, inside.URL, http.StatusFound) })
	mux.HandleFunc("/embedded", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"ignition": {"version": "3.4.0", "config": {"replace": {"source": "data:;base64,%s"}}}}`, base64.StdEncoding.EncodeToString(config(`{"path": "/a", "contents": {"source": "%s"}}`, inside.URL)))
	})
	mux.HandleFunc("/proxy", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"ignition": {"version": "3.4.0", "proxy": {"httpProxy": %q}, "config": {"replace": {"source": "http://config.example.org/"}}}}`, inside.URL)
	})
	s := httptest.NewServer(mux)
	defer s.Close()
	merge := func(path string) []byte {
		return fmt.Appendf(nil, `{"ignition": {"version": "3.4.0", "config": {"merge": [{"source": %q}]}}}`, s.URL+path)
	}
	own := config(`{"path": "/a", "contents": {"source": "%s"}}`, inside.URL)
	for name, tc := range map[string]struct {
		doc []byte
		ok  bool
	}{
		"own": {own, true}, "own, embedded": {fmt.Appendf(nil, `{"ignition": {"version": "3.4.0", "config": {"merge": [{"source": "data:;base64,%s"}]}}}`, base64.StdEncoding.EncodeToString(own)), true},
		"same server": {merge("/same"), true}, "fetched": {merge("/file"), false}, "fetched, embedded": {merge("/embedded"), false}, "redirect": {config(`{"path": "/a", "contents": {"source": "%s/away"}}`, s.URL), false},
		"proxy": {merge("/proxy"), false}, "metadata": {config(`{"path": "/a", "contents": {"source": "http://169.254.169.254/latest/"}}`), false},
	} {
		alive := 0
		err := Apply(t.Context(), tc.doc, plan.New(), Options{Spool: t.TempDir(), Alive: func() { alive++ }})
		if tc.ok != (err == nil) || err != nil && (!errdefs.IsPermissionDenied(err) || hint.Of(err) == "") {
			t.Errorf("%s: %v, hint %q", name, err, hint.Of(err))
		}
		if tc.ok && alive == 0 {
			t.Errorf("%s: nobody was told that bytes came", name)
		}
	}
}

// A full disk is not taken for a fault of the source.
func TestSpoolIsFull(t *testing.T) {
	f := newFetcher(Options{Spool: "/dev/full/spool"})
	err := applyWith(t.Context(), f, config(`{"path": "/a", "contents": {"source": "data:,%s"}}`, strings.Repeat("x", mostInMemory+1)), plan.New())
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "keeping it in /dev/full/spool: ") {
		t.Error(err)
	}
}

func FuzzCheck(f *testing.F) {
	f.Add([]byte(`{"ignition": {"version": "3.4.0", "config": {"merge": [{"source": "data:,%7B%7D"}]}}, "storage": {"files": [{"path": "/a", "contents": {"source": "data:;base64,YQ==", "compression": "gzip"}}]}}`))
	f.Add([]byte("variant: fcos\nversion: 1.5.0\nstorage:\n  files:\n  - path: /a\n    contents: {inline: x}\n"))
	f.Add([]byte("variant: flatcar\nversion: 1.1.0\na: &a [*a]\n"))
	f.Add([]byte("variant: fcos\nversion: 1.6.0\nstorage:\n  disks: [{device: /dev/a, partitions: [{label: root}, null]}]\n  luks: [{name: a, clevis: {tang: [{url: x}]}}]\n  filesystems: [{device: a, path: /a, format: ext4, with_mount_unit: true}]\n  trees: [{local: a}]\n  links: [{path: /a, target: b, hard: true}]\nboot_device: {mirror: {devices: [a, b]}, luks: {tpm2: true}}\ngrub: {users: [{name: a, password_hash: b}]}\npasswd: {users: [null]}\nsystemd: {units: [{name: a, dropins: [null]}]}\n"))
	f.Add([]byte(`{"ignition": {"version": "3.7.0-experimental"}, "passwd": {"users": [{"name": "a"}]}, "systemd": {"units": [{"name": "a.service", "contents": "[a]"}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		warnings, err := Check(raw)
		if err != nil && len(warnings) > 0 {
			t.Error("warnings and an error")
		}
		Is(raw)
	})
}
