package machine

import (
	"strings"
	"testing"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestArgv(t *testing.T) {
	img := Image{Entrypoint: []string{"/entry", "one two"}, Cmd: []string{"a", "$b"}}
	for _, c := range []struct {
		name string
		spec Spec
		img  Image
		want []string
	}{
		{"image's own", Spec{}, img, []string{"/entry", "one two", "a", "$b"}},
		{"command replaces CMD", Spec{Command: []string{"-x"}}, img, []string{"/entry", "one two", "-x"}},
		{"entrypoint drops CMD", Spec{SetEntrypoint: true, Entrypoint: []string{"/sh"}}, img, []string{"/sh"}},
		{"entrypoint and command", Spec{SetEntrypoint: true, Entrypoint: []string{"/sh"}, Command: []string{"-c", "x"}}, img, []string{"/sh", "-c", "x"}},
		{"cleared entrypoint", Spec{SetEntrypoint: true, Command: []string{"ls"}}, img, []string{"ls"}},
		{"only CMD", Spec{}, Image{Cmd: []string{"/bin/sh", "-c", "echo 'a  b'"}}, []string{"/bin/sh", "-c", "echo 'a  b'"}},
		{"only ENTRYPOINT", Spec{}, Image{Entrypoint: []string{"x"}}, []string{"x"}},
	} {
		got, err := argv(c.spec, c.img)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
	_, err := argv(Spec{Image: "x"}, Image{})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(hint.Of(err), "atoll run x COMMAND") {
		t.Errorf("nothing to run: %v, hint %q", err, hint.Of(err))
	}
}

func TestEnvironment(t *testing.T) {
	got := environment(true, "h", []string{"A=1", "PATH=/img", "B="}, []string{"A=2=3", "C=$x"})
	want := []string{"PATH=/img", "HOSTNAME=h", "TERM=xterm", "A=2=3", "B=", "C=$x"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestValidateGathersEveryFault(t *testing.T) {
	s := Spec{Name: "../x", MemoryBytes: 1 << 20, DiskBytes: 1, Env: []string{"=x"}, WorkingDir: "rel", VMM: "none",
		Ports: []network.PortMapping{{HostPort: 80, GuestPort: 1, Protocol: "tcp"}, {HostPort: 80, GuestPort: 2, Protocol: "tcp"}}}.withDefaults()
	err := s.validate()
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("class: %v", err)
	}
	for _, part := range []string{`"../x"`, "no image", "memory of 1MiB", "disk size of 1B", `"=x"`, `"rel"`, `"none"`, "80/tcp"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is missing in: %v", part, err)
		}
	}
	if hint.Of(err) == "" {
		t.Error("no hint")
	}
	for name, want := range map[string]string{"a_b": "a-b", "a..b": "a.b", "a._b.": "a.-b"} {
		if s := (Spec{Name: name, Image: "i"}).withDefaults(); s.Hostname != want || s.validate() != nil {
			t.Errorf("%s: hostname %q: %v", name, s.Hostname, s.validate())
		}
	}
	for _, hostname := range []string{"a..b", "-a", "a b", strings.Repeat("a", 65)} {
		if err := (Spec{Name: "n", Image: "i", Hostname: hostname}).withDefaults().validate(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("hostname %q: %v", hostname, err)
		}
	}
	for _, name := range []string{"", strings.Repeat("a", 64), "a b", "-a", "0123456789ab"} {
		s := Spec{Name: name, Image: "i"}.withDefaults()
		if err := s.validate(); err == nil {
			t.Errorf("name %q is taken", name)
		}
	}
	for _, name := range []string{"web", "a_b.c-1", strings.Repeat("a", 63)} {
		s := Spec{Name: name, Image: "i"}.withDefaults()
		if err := s.validate(); err != nil {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

func TestConsoleTailIsHarmless(t *testing.T) {
	if got := string(printable([]byte("ok\x1b[31m\x00\xffred\u009b2J\u0080\x9d\n\ttab"))); got != "ok[31mred2J\n\ttab" {
		t.Errorf("got %q", got)
	}
}

func TestCheckPart(t *testing.T) {
	for _, s := range []Spec{{}, {MemoryBytes: 1 << 30, KernelArgs: []string{"root=/dev/vda2"}}, {Ports: []network.PortMapping{{GuestPort: 80, Protocol: "tcp"}}}} {
		if err := s.CheckPart(); err != nil {
			t.Errorf("%+v: %v", s, err)
		}
	}
	err := Spec{Hostname: "-bad", KernelArgs: []string{"panic=0"}, Provisioning: provision.Request{
		Locale:   "de DE",
		Ignition: []byte(`{"ignition": {"version": "3.4.0"}, "kernelArguments": {"shouldExist": ["quiet", "init=/bin/sh"]}}`),
	}}.CheckPart()
	for _, part := range []string{`hostname "-bad"`, `"panic=0"`, `locale "de DE"`, `ignition: kernel argument "init=/bin/sh" would break`} {
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), part) {
			t.Errorf("%q is missing in: %v", part, err)
		}
	}
}
