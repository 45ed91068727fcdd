package machine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/containerd/errdefs"
)

func TestRequestIsKeptWhole(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "m")
	if err := prepareProvisioning(dir, provision.Request{UserData: []byte("#!/bin/sh\n")}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, requestFile)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	var k kept
	if err := readWhole(path, &k); err != nil || string(k.Request.UserData) != "#!/bin/sh\n" || len(k.HostKeys) != 2 {
		t.Errorf("%+v, %v", k, err)
	}
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
		t.Errorf("left: %q", names)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := readWhole(path, &k); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("a torn file: %v", err)
	}
	if err := readWhole(filepath.Join(dir, standingFile), &k); err != nil {
		t.Errorf("a file that is not there: %v", err)
	}
	// What a power cut may leave of a file that was not synced: new keys will do, a lost request will not.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	asked := &Machine{Spec: Spec{Provisioning: provision.Request{Withheld: []string{"userData"}}}}
	if _, err := readRequest(dir, asked); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("a lost request: %v", err)
	}
	first, err := readRequest(dir, &Machine{})
	if err != nil || len(first.HostKeys) != 2 {
		t.Errorf("lost keys: %v, %v", first, err)
	}
	if again, err := readRequest(dir, &Machine{}); err != nil || !bytes.Equal(again.HostKeys[0].Private, first.HostKeys[0].Private) {
		t.Errorf("the keys change: %v", err)
	}
}

func TestKernelArgs(t *testing.T) {
	p := plan.New()
	if got := kernelArgs(`a="b  c"  d`, p); got != `a="b  c"  d` {
		t.Errorf("nothing asked for: %q", got)
	}
	p.KernelArgs, p.DropArgs = []string{"quiet", "d"}, []string{"debug"}
	if got := kernelArgs("debug d e", p); got != "d e quiet" {
		t.Errorf("%q", got)
	}
}

func TestTakeHostname(t *testing.T) {
	for _, c := range []struct {
		name              string
		spec, before, doc string
		want              string
	}{
		{"the default gives way", "web-1", "", "doc", "doc"},
		{"a chosen one stays", "chosen", "", "doc", "chosen"},
		{"an earlier document's gives way", "doc", "doc", "other", "other"},
		{"no document", "web-1", "", "", "web-1"},
	} {
		s := &starting{m: Machine{Spec: Spec{Name: "web_1", Hostname: c.spec}, Provisioning: ProvisionStatus{Hostname: c.before}}, plan: plan.New()}
		s.plan.Hostname = c.doc
		if err := s.takeHostname(); err != nil || s.m.Spec.Hostname != c.want {
			t.Errorf("%s: %q, %v", c.name, s.m.Spec.Hostname, err)
		}
	}
	s := &starting{m: Machine{Spec: Spec{Name: "a", Hostname: "a"}}, plan: plan.New()}
	s.plan.Hostname = "a b"
	if err := s.takeHostname(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v", err)
	}
}

func TestProvisionLog(t *testing.T) {
	dir := t.TempDir()
	l := &provisionLog{dir: dir}
	if err := l.begin(); err != nil {
		t.Fatal(err)
	}
	write := func(step, text string) {
		t.Helper()
		if err := l.write(step, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	write("packages", "one\ntwo")
	write("packages", " more\n")
	write("command x", "three\x1b[31m")
	if got := l.tail("command x"); got != "three[31m" {
		t.Errorf("tail %q", got)
	}
	if got := l.tail("users"); got != "" {
		t.Errorf("another step's tail %q", got)
	}
	path := filepath.Join(dir, provisionLogFile)
	if data, _ := os.ReadFile(path); string(data) != "== packages\none\ntwo more\n== command x\nthree\x1b[31m" {
		t.Errorf("%q", data)
	}
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	// However much a guest writes, the log is bounded, and its end is there.
	line := bytes.Repeat([]byte("x"), 64<<10)
	for range 3 * provisionLogLimit / len(line) {
		write("command x", string(line))
	}
	write("command x", "\nthe end\n")
	total := int64(0)
	for _, name := range []string{provisionLogFile, provisionLogOld} {
		if st, err := os.Stat(filepath.Join(dir, name)); err == nil {
			total += st.Size()
		}
	}
	if total > 2*provisionLogLimit || total < provisionLogLimit {
		t.Errorf("%d bytes", total)
	}
	if got := l.tail("command x"); got != "the end" {
		t.Errorf("tail %q", shorten(got))
	}
	if err := errors.Join(l.close(), l.begin()); err != nil {
		t.Fatal(err)
	}
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 0 {
		t.Errorf("left: %q", names)
	}
}

func TestFailureShowsOutput(t *testing.T) {
	code := 3
	s := &starting{m: Machine{Spec: Spec{Name: "web"}, Provisioning: ProvisionStatus{Due: DueFirst}}, log: &provisionLog{dir: t.TempDir()}, provisionStep: "command user-data"}
	if err := s.log.write(s.provisionStep, []byte("no such host\n")); err != nil {
		t.Fatal(err)
	}
	cause := &host.Failure{Step: "provisioning: command user-data", Message: "user-data: exit code 3", ExitCode: &code}
	status := s.provisionFailed(cause)
	if status.FailedStep != "command user-data" || status.ExitCode == nil || *status.ExitCode != 3 || status.Due != DueFirst {
		t.Errorf("%+v", status)
	}
	if got := s.withOutput(cause).Error(); got != "exit code 3; its last lines:\nno such host" {
		t.Errorf("%q", got)
	}
	if got := (&starting{running: "kernel", log: s.log}).provisionFailed(errors.New("none")); got.FailedStep != "" {
		t.Errorf("a missing kernel is no fault of provisioning: %+v", got)
	}
	if !strings.Contains(errNoProgress.Error(), "no progress") {
		t.Error(errNoProgress)
	}
}

func BenchmarkPrepareProvisioning(b *testing.B) {
	dir := b.TempDir()
	for i := 0; b.Loop(); i++ {
		if err := prepareProvisioning(filepath.Join(dir, fmt.Sprint(i)), provision.Request{}); err != nil {
			b.Fatal(err)
		}
	}
}
