package userdata

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/plan"
)

func packed(text string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	z.Write([]byte(text))
	z.Close()
	return b.String()
}

// multi is a MIME message of parts, each a header's lines and a body.
func multi(parts ...string) string {
	return "Content-Type: multipart/mixed; boundary=\"=B=\"\nMIME-Version: 1.0\n\n--=B=\n" + strings.Join(parts, "\n--=B=\n") + "\n--=B=--\n"
}

func part1(kind, body string, more ...string) string {
	return "Content-Type: " + kind + "\n" + strings.Join(append(more, ""), "\n") + "\n" + body
}

// commands are what a plan runs: name, when, and the first word that says what.
func commands(p *plan.Plan) []string {
	var out []string
	for _, c := range p.Commands {
		when := ""
		if c.GetEarly() {
			when += " early"
		}
		if c.GetEachBoot() {
			when += " each"
		}
		text := string(c.GetScript())
		if _, runcmd, ok := strings.Cut(text, "atoll_item=1\n"); ok {
			text = runcmd
		}
		out = append(out, c.GetName()+when+": "+strings.TrimSpace(strings.TrimPrefix(text, "#!/bin/sh\n")))
	}
	return out
}

func TestApply(t *testing.T) {
	const script = "#!/bin/sh\necho a\n"
	for _, tt := range []struct {
		name, doc string
		want      []string
		hostname  string
	}{
		{"script", script, []string{"user-data: echo a"}, ""},
		{"packed script", packed(script), []string{"user-data: echo a"}, ""},
		{"config", "#cloud-config\nhostname: a\n", nil, "a"},
		{"packed twice", packed(packed("#cloud-config\nhostname: a\n")), nil, "a"},
		{"boothook", "#cloud-boothook\n#!/bin/sh\necho early\n", []string{"user-data early each: echo early"}, ""},
		{"one part", "Content-Type: text/cloud-config\n\nhostname: a\n", nil, "a"},
		{"later keys replace earlier ones", multi(
			part1("text/cloud-config", "#cloud-config\nhostname: a\nruncmd: [one]\n"),
			part1("text/cloud-config", "hostname: b\n")), []string{"runcmd: one"}, "b"},
		{"order", multi(
			part1("text/x-shellscript", "#!/bin/sh\nz", `Content-Disposition: attachment; filename="zzz.sh"`),
			part1("text/x-shellscript", "#!/bin/sh\nb"),
			part1("text/cloud-config", "runcmd: [run]\nbootcmd: [boot]\nfinal_message: end\n"),
			part1("text/x-shellscript-per-boot", "#!/bin/sh\neach"),
			part1("text/x-shellscript-per-once", "#!/bin/sh\nonce"),
			part1("text/x-shellscript-per-instance", "#!/bin/sh\ninstance"),
			part1("text/cloud-boothook", "#!/bin/sh\nhook", "Content-Disposition: attachment; filename=hook.sh")),
			[]string{"hook.sh early each: hook", "bootcmd early each: boot", "part-005: once", "part-004 each: each", "part-006: instance", "part-002: b", "runcmd: run", "zzz.sh: z", "final_message: printf '%s\\n' 'end'"}, ""},
		{"encodings", multi(
			part1("text/x-shellscript; charset=\"utf-8\"", base64.StdEncoding.EncodeToString([]byte("#!/bin/sh\nö")), "Content-Transfer-Encoding: base64"),
			part1("text/x-shellscript", "#!/bin/sh=0Aa=3Db", "Content-Transfer-Encoding: quoted-printable"),
			part1("application/octet-stream", base64.StdEncoding.EncodeToString([]byte(packed("#cloud-config\nhostname: a\n"))), "Content-Transfer-Encoding: base64")),
			[]string{"part-001: ö", "part-002: a=b"}, "a"},
		{"plain parts", multi(part1("text/plain", script), part1("text/plain", "#cloud-config\nhostname: a")), []string{"part-001: echo a"}, "a"},
		{"parts in parts", multi(part1(`multipart/mixed; boundary="C"`, "--C\nContent-Type: text/cloud-config\n\nhostname: a\n--C--\n")), nil, "a"},
		{"a message in a part", multi(part1("message/rfc822", "Content-Type: text/cloud-config\n\nhostname: a\n")), nil, "a"},
		{"crlf", strings.ReplaceAll(multi(part1("text/cloud-config", "hostname: a\n")), "\n", "\r\n"), nil, "a"},
		{"archive", "#cloud-config-archive\n- |\n  #!/bin/sh\n  one\n- {type: text/cloud-config, content: {hostname: a}}\n- type: text/x-shellscript\n  filename: x.sh\n  content: |\n    #!/bin/sh\n    two\n",
			[]string{"part-001: one", "x.sh: two"}, "a"},
	} {
		p := plan.New()
		if err := Apply(t.Context(), []byte(tt.doc), p, Options{}); err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, commands(p)); diff != "" || p.Hostname != tt.hostname {
			t.Errorf("%s: hostname %q, commands (-want +got):\n%s", tt.name, p.Hostname, diff)
		}
	}
}

func TestFaults(t *testing.T) {
	deep := "Content-Type: text/cloud-config\n\nhostname: a\n"
	for range mostDepth + 1 {
		deep = part1("message/rfc822", deep)
	}
	many := make([]string, mostParts+1)
	for i := range many {
		many[i] = part1("text/cloud-config", "hostname: a\n")
	}
	for _, tt := range []struct{ doc, want string }{
		{"hello\nworld", `its first line "hello" tells nothing`},
		{"## template: jinja\n#cloud-config\nhostname: a\n", "parts of type text/jinja2 are not implemented"},
		{multi(part1("text/cloud-config", "## template: jinja\n#cloud-config\nhostname: a\n")), "part 1: parts of type text/jinja2 are not implemented"},
		{"#part-handler\n", "parts of type text/part-handler"},
		{"#cloud-config-jsonp\n", "parts of type text/cloud-config-jsonp"},
		{"#upstart-job\n", "parts of type text/upstart-job"},
		{"#cloud-config\npower_state: {}\n", "cloud-config: line 2: power_state: not implemented"},
		{multi(part1("text/cloud-config", "hostname: a\n"), part1("text/cloud-config", "\nfoo: a\n", `Content-Disposition: attachment; filename="x.yaml"`)), `cloud-config: part 2 ("x.yaml"), line 2: foo: no such key`},
		{multi(part1("text/x-python", "x")), "part 1: parts of type text/x-python"},
		{multi(part1("text/cloud-config", "hostname: a\n", "Merge-Type: list(append)")), "part 1: the header Merge-Type is not implemented"},
		{multi(part1("text/cloud-config", "hostname: a\n", "Launch-Index: 1")), "the header Launch-Index"},
		{multi(part1("text/x-shellscript", "", "Content-Transfer-Encoding: rot13")), "its Content-Transfer-Encoding"},
		{multi(part1("text/x-shellscript", "*", "Content-Transfer-Encoding: base64")), "part 1: reading it:"},
		{multi(part1("text/x-shellscript", " ")), "part 1: the script is empty"},
		{"Content-Type: multipart/mixed\n\nx", "its Content-Type has no boundary"},
		{"Content-Type: multipart/mixed; boundary=x\n\nx", "it has no parts"},
		{"Content-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: text/plain\n\n#!/bin/sh", "part 1: reading it: unexpected EOF"},
		{"Content-Type: x y\n\nx", "its Content-Type"},
		{"MIME-Version: 1.0\nbroken\n", "reading it as a MIME message"},
		{"\x1f\x8bxx", "unpacking it"},
		{deep, "parts in parts go deeper"},
		{multi(many...), "there are more than 256 parts"},
		{packed(strings.Repeat("#!", mostBytes)), "unpacking it: there are more than"},
		{"#!/bin/sh\n" + strings.Repeat("#", mostMessage), "scripts, users and all else but files have"},
		{"#include\n", "it includes nothing"},
		{"#include file:///etc/shadow\n", `"file:///etc/shadow" is no URL of http or https`},
		{"#include\nhttp://a/\nftp://b/%s\n", `"ftp://b/%s" is no URL`},
		{"#cloud-config-archive\na: b\n", "reading the archive"},
		{"#cloud-config-archive\n- {type: text/x-shellscript, content: '#!/bin/sh', launch-index: 1}\n", "line 2: launch-index: not implemented"},
	} {
		_, err := Check([]byte(tt.doc))
		if err == nil || !strings.Contains(err.Error(), tt.want) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.80q: %v\nwant %s", tt.doc, err, tt.want)
		}
	}
	_, err := Check([]byte("#cloud-config\nfoo: 1\n"))
	if hint.Of(err) == "" {
		t.Errorf("no hint with %v", err)
	}
	warnings, err := Check([]byte("#cloud-config\noutput: {}\n"))
	if err != nil || len(warnings) != 1 {
		t.Errorf("warnings %q, %v", warnings, err)
	}
}

func TestInclude(t *testing.T) {
	gone := make(chan struct{})
	defer close(gone)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/config":
			fmt.Fprint(w, "#cloud-config\nhostname: included\n")
		case "/script":
			fmt.Fprint(w, packed("#!/bin/sh\nincluded\n"))
		case "/more":
			fmt.Fprintf(w, "#include-once\nhttp://%s/script\n\n# a comment\n", r.Host)
		case "/loop":
			fmt.Fprintf(w, "#include http://%s/loop\n", r.Host)
		case "/wrong":
			fmt.Fprint(w, "#cloud-config\n\nfoo: a\n")
		case "/big":
			for range mostBytes>>20 + 1 {
				w.Write(make([]byte, 1<<20))
			}
		case "/slow":
			select {
			case <-r.Context().Done():
			case <-gone:
			}
		default:
			http.NotFound(w, r)
		}
	}))
	defer s.Close()
	p := plan.New()
	doc := "#include " + s.URL + "/config\n" + s.URL + "/more\n"
	if _, err := Check([]byte(doc)); err != nil {
		t.Error(err)
	}
	if err := Apply(t.Context(), []byte(doc), p, Options{}); err != nil {
		t.Fatal(err)
	}
	if got := commands(p); p.Hostname != "included" || len(got) != 1 || !strings.HasSuffix(got[0], ": included") {
		t.Errorf("%q, %q", p.Hostname, got)
	}
	for path, want := range map[string]string{
		"/none":  "/none: the server says 404 Not Found",
		"/wrong": "/wrong, line 3: foo: no such key",
		"/loop":  "parts in parts go deeper",
		"/big":   "there are more than",
		"/slow":  "context deadline exceeded",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		if path != "/slow" {
			ctx = t.Context()
		}
		err := Apply(ctx, []byte("#include\n"+s.URL+path), plan.New(), Options{})
		cancel()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	// What is included cannot lead to where only the operator's own document may.
	inside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "#!/bin/sh\n") }))
	defer inside.Close()
	outside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, inside.URL, http.StatusFound)
			return
		}
		fmt.Fprint(w, packed(multi(part1("text/x-include-url", inside.URL+"\n"))))
	}))
	defer outside.Close()
	for url, ok := range map[string]bool{inside.URL: true, outside.URL + "/document": false, outside.URL + "/redirect": false, "http://169.254.169.254/latest/user-data": false} {
		alive := 0
		err := Apply(t.Context(), []byte("#include "+url), plan.New(), Options{Alive: func() { alive++ }})
		if ok != (err == nil) || err != nil && !errdefs.IsPermissionDenied(err) || ok && alive == 0 {
			t.Errorf("%s: %v", url, err)
		}
	}
	// A password in a URL is not shown.
	err := Apply(t.Context(), []byte("#include "+strings.Replace(s.URL, "//", "//me:secret1@", 1)+"/none"), plan.New(), Options{})
	if err == nil || strings.Contains(err.Error(), "secret1") {
		t.Errorf("%v", err)
	}
}

func FuzzCheck(f *testing.F) {
	for _, s := range []string{
		multi(part1("text/x-shellscript", "#!/bin/sh\n"), part1("text/cloud-config", "hostname: a\n", "Content-Transfer-Encoding: quoted-printable")),
		multi(part1(`multipart/mixed; boundary="C"`, "--C\n\n#!x\n--C--\n")), "#include http://a/\n", "#cloud-config-archive\n- {type: a, content: {b: c}}\n- '#!x'\n",
		packed("#!/bin/sh\n"), "Content-Type: text/plain\n\n#cloud-boothook\n", "## template: jinja\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := Check(data); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v", err)
		}
	})
}
