package provision

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/hostkey"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
)

const (
	keyA = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJmB3nUoIfkCMoFb0kNoTxHS9rLp8FUSxcfNT0n6jQ9M a@example"
	keyB = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJmB3nUoIfkCMoFb0kNoTxHS9rLp8FUSxcfNT0n6jQ9N b@example"
	hash = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/"
)

func uid(n uint32) *uint32 { return &n }

func TestCheckGathersEveryFault(t *testing.T) {
	keys, _ := hostkey.Generate()
	r := Request{
		Users: []User{
			{Name: "a b"}, {Name: "ok", UID: uid(1000), Home: "rel"}, {Name: "ok"}, {Name: "two", UID: uid(1000), PasswordHash: "hunter2"},
			{Name: "three", Groups: []string{"x y"}, SSHAuthorizedKeys: []string{"nonsense"}},
		},
		SSHAuthorizedKeys: []string{keyA, string(keys[0].Private)},
		SSHHostKeys:       [][]byte{keys[0].Private, keys[0].Private, []byte(keyA)},
		Timezone:          "Europe/Berlim",
		Locale:            "german",
		NTPServers:        []string{"a b", "2001:db8::1"},
		Packages:          []string{"-o", "curl"},
		UserData:          []byte("echo hello\n"),
		Ignition:          []byte(`{"ignition": {"version": "9.9.9"}}`),
		Files:             []File{{Path: "rel"}, {Path: "/a/../b"}, {Path: "/ok", Mode: 0o10000, Owner: "a b"}, {Path: "/twice"}, {Path: "/twice"}},
		Mounts:            []FileSystemMount{{Path: "/m", Type: "bind"}, {Path: "/n", Type: "ext4"}, {Path: "/n", Type: "tmpfs"}, {Path: "/proc", Type: "tmpfs"}},
		Secrets:           []Secret{{Name: "../x"}, {Name: "big", Data: make([]byte, MaxSecrets+1)}, {Name: "set", Mode: 0o4400, Owner: "x y"}},
	}
	_, err := r.Check()
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("class of %v", err)
	}
	for _, want := range []string{
		`user "a b"`, `user "ok": path "rel"`, `user "ok": it is given twice`, `user "two": uid 1000 is that of user "ok"`, `user "two": the password hash`,
		`user "three": group "x y"`, `user "three": SSH key 1`, "SSH key 2: it is a private key", "SSH host key 2: it is of type ed25519, as key 1 is",
		"SSH host key 3: it is a public key", `time zone "Europe/Berlim"`, `locale "german"`, `NTP server "a b"`, `package "-o"`, "user-data: its first line",
		"ignition: ", `file "rel"`, `file "/a/../b"`, `file "/ok": mode 010000`, `file "/ok": owner "a b"`, `file "/twice": it is given twice`,
		`mount at "/m": type bind`, `mount at "/n": a mount of type ext4 needs a source`, `mount at "/n": it is given twice`, `mount at "/proc": it is the kernel's`,
		`secret "../x"`, "secrets: they have", `secret "set": mode 04400`, `secret "set": owner "x y"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	for _, secret := range []string{"hunter2", "PRIVATE KEY", "nonsense"} {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error shows %q", secret)
		}
	}
	if t.Failed() {
		t.Log(err)
	}
}

func TestCheckPasses(t *testing.T) {
	keys, _ := hostkey.Generate()
	r := Request{
		Users: []User{
			{Name: "ada", UID: uid(1000), Home: "/home/ada", Shell: "/bin/bash", Groups: []string{"adm", "dialout"}, Sudo: true, PasswordHash: hash,
				SSHAuthorizedKeys: []string{`from="10.0.0.0/8",no-pty ` + keyA}},
			{Name: "locked", PasswordHash: "!"}, {Name: "_apt-x.y"},
		},
		SSHAuthorizedKeys: []string{keyA}, SSHHostKeys: [][]byte{keys[0].Private, keys[1].Private}, Timezone: "Europe/Berlin", Locale: "de_DE.UTF-8",
		NTPServers: []string{"time.example.com", "192.0.2.1"}, Packages: []string{"curl", "libstdc++6", "nginx=1.22.1-9"}, UserData: []byte("#!/bin/sh\n"),
		Files:   []File{{Path: "/etc/x", Data: []byte("x"), Mode: 0o4755, Owner: "ada:adm"}, {Path: "/etc/y", Owner: "1000"}},
		Mounts:  []FileSystemMount{{Path: "/scratch", Type: "tmpfs", Options: "size=1m"}, {Path: "/data", Type: "ext4", Source: "/dev/vdc"}},
		Secrets: []Secret{{Name: "token", Data: []byte("x")}},
	}
	if warnings, err := r.Check(); err != nil || len(warnings) > 0 {
		t.Errorf("%v %v", warnings, err)
	}
	if _, err := (&Request{}).Check(); err != nil {
		t.Error(err)
	}
}

func TestFaultsHaveHints(t *testing.T) {
	for _, r := range []Request{{Timezone: "berlin"}, {UserData: []byte("x")}, {Locale: "?"}, {Packages: []string{"-x"}}, {SSHAuthorizedKeys: []string{"x"}}, {Users: []User{{Name: "x", PasswordHash: "p"}}}} {
		if _, err := r.Check(); hint.Of(err) == "" {
			t.Errorf("%v: no hint", err)
		}
	}
}

func TestKindOf(t *testing.T) {
	for doc, want := range map[string]kind{
		"#!/bin/sh\n": script, "#cloud-config\n{}": cloudInit, "\x1f\x8b\x08": cloudInit, "#include\nhttp://x": cloudInit,
		"Content-Type: multipart/mixed; boundary=x": cloudInit, "MIME-Version: 1.0\n": cloudInit,
		`{"ignition":{"version":"3.4.0"}}`: ignitionOrButane, "variant: fcos\nversion: 1.5.0\n": ignitionOrButane,
		"": unknown, "echo x": unknown, `{"a":1}`: unknown, "\x7fELF": unknown,
	} {
		if got := kindOf([]byte(doc)); got != want {
			t.Errorf("%q: %d, want %d", doc, got, want)
		}
	}
}

// What flags say beats what documents say.
func TestCompileFlagsBeatDocuments(t *testing.T) {
	keys, _ := hostkey.Generate()
	r := Request{
		Ignition: []byte(`{"ignition":{"version":"3.4.0"},"passwd":{"users":[{"name":"ada","uid":2000,"shell":"/bin/sh","sshAuthorizedKeys":["` + keyB + `"]}]},
			"storage":{"files":[{"path":"/etc/motd","contents":{"source":"data:,document"}},{"path":"/etc/kept","contents":{"source":"data:,kept"}}]}}`),
		Users:             []User{{Name: "ada", UID: uid(1000), Sudo: true}, {Name: "bob", SSHAuthorizedKeys: []string{keyB}}},
		SSHAuthorizedKeys: []string{keyA},
		Files:             []File{{Path: "/etc/motd", Data: []byte("flag")}},
		Timezone:          "Europe/Berlin",
		UserData:          []byte("#!/bin/sh\ntrue\n"),
		Mounts:            []FileSystemMount{{Path: "/t", Type: "tmpfs"}},
		Secrets:           []Secret{{Name: "s", Data: []byte("v")}, {Name: "app", Data: []byte("v"), Owner: "1000:0", Mode: 0o440}},
		Packages:          []string{"curl", "curl"},
		NTPServers:        []string{"ntp.example"},
	}
	if _, err := r.Check(); err != nil {
		t.Fatal(err)
	}
	p, err := Compile(t.Context(), r, Options{HostKeys: keys, Spool: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	users := map[string]*agentv1.User{}
	for _, u := range p.GetUsers() {
		users[u.GetName()] = u
	}
	if u := users["ada"]; u.GetUid() != 1000 || u.GetShell() != "/bin/sh" || len(u.GetSudo()) != 1 || !cmp.Equal(u.GetSshAuthorizedKeys(), []string{keyB, keyA}) {
		t.Errorf("ada is %v", u)
	}
	if u := users["bob"]; !cmp.Equal(u.GetSshAuthorizedKeys(), []string{keyB}) {
		t.Errorf("bob is %v", u)
	}
	if u := users["root"]; !cmp.Equal(u.GetSshAuthorizedKeys(), []string{keyA}) {
		t.Errorf("root is %v", u)
	}
	contents := map[string]string{}
	for _, f := range p.GetFiles() {
		for _, piece := range f.GetContents() {
			contents[f.GetNode().GetPath()] += string(piece.GetInline())
		}
	}
	if contents["/etc/motd"] != "flag" || len(p.GetFiles()) != 2 {
		t.Errorf("files are %q", contents)
	}
	loc, err := time.LoadLocationFromTZData("x", p.GetZone())
	if err != nil || p.GetTimezone() != "Europe/Berlin" {
		t.Errorf("zone %q: %v", p.GetTimezone(), err)
	} else if name, _ := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC).In(loc).Zone(); name != "CEST" {
		t.Errorf("summer time is %q", name)
	}
	want := &agentv1.Provision{
		Mounts: []*agentv1.FileSystemMount{{Source: "tmpfs", Path: "/t", Type: "tmpfs"}},
		Secrets: []*agentv1.Secret{{Name: "s", Data: []byte("v")}, {Name: "app", Data: []byte("v"), User: &agentv1.Owner{Id: proto.Uint32(1000)},
			Group: &agentv1.Owner{Id: proto.Uint32(0)}, Mode: proto.Uint32(0o440)}},
		Packages: &agentv1.Packages{Names: []string{"curl"}},
		Commands: []*agentv1.Command{{Name: "user-data", Script: r.UserData}},
	}
	got := &agentv1.Provision{Mounts: p.GetMounts(), Secrets: p.GetSecrets(), Packages: p.GetPackages(), Commands: p.GetCommands()}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if len(p.GetSshHostKeys()) != 2 || p.GetSshHostKeys()[0].GetType() != "ed25519" {
		t.Errorf("host keys %v", p.GetSshHostKeys())
	}
}

func TestStanding(t *testing.T) {
	p := plan.New()
	if s, err := StandingOf(p); err != nil || !s.Empty() {
		t.Errorf("a plan that asks for nothing leaves %v, %v", s, err)
	}
	p.First, p.Users, p.Locale = true, []*agentv1.User{{Name: "x"}}, "C.UTF-8"
	p.Secrets, p.Mounts = []*agentv1.Secret{{Name: "s", Data: []byte("v")}}, []*agentv1.FileSystemMount{{Path: "/t"}}
	p.Commands = []*agentv1.Command{{Name: "once"}, {Name: "each", EachBoot: true}}
	p.Hosts, p.KernelArgs, p.DropArgs, p.NTPServers = []*agentv1.HostEntry{{Address: "192.0.2.1"}}, []string{"quiet"}, []string{"debug"}, []string{"ntp"}
	s, err := StandingOf(p)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var read Standing
	if err := json.Unmarshal(data, &read); err != nil {
		t.Fatal(err)
	}
	again, err := read.Plan()
	if err != nil {
		t.Fatal(err)
	}
	want := &agentv1.Provision{Secrets: p.Secrets, Mounts: p.Mounts, Commands: p.Commands[1:], Locale: "C.UTF-8"}
	if d := cmp.Diff(want, again.Provision, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if len(again.Hosts) != 1 || again.KernelArgs[0] != "quiet" || again.DropArgs[0] != "debug" || again.NTPServers[0] != "ntp" {
		t.Errorf("%+v", again)
	}
}

// Nothing that may be secret is in what is shown of a request, and that it is there is.
func TestRedacted(t *testing.T) {
	r := Request{
		Users: []User{{Name: "ada", PasswordHash: "S-hash", SSHAuthorizedKeys: []string{"S-key"}}}, SSHAuthorizedKeys: []string{"S-key"},
		SSHHostKeys: [][]byte{[]byte("S-host")}, UserData: []byte("S-data"), Ignition: []byte("S-ign"), Timezone: "Europe/Berlin",
		Files: []File{{Path: "/f", Data: []byte("S-file")}}, Secrets: []Secret{{Name: "tok", Data: []byte("S-secret")}},
	}
	red := r.Redacted()
	for _, v := range []any{red.Users[0].PasswordHash, red.Users[0].SSHAuthorizedKeys, red.SSHAuthorizedKeys, red.SSHHostKeys, red.UserData, red.Ignition, red.Files[0].Data, red.Secrets[0].Data} {
		if data, _ := json.Marshal(v); string(data) != "null" && string(data) != `""` {
			t.Errorf("%s is shown", data)
		}
	}
	want := []string{"userData", "ignition", "sshAuthorizedKeys", "sshHostKeys", "users.ada.passwordHash", "users.ada.sshAuthorizedKeys", "files./f", "secrets.tok"}
	if d := cmp.Diff(want, red.Withheld); d != "" {
		t.Error(d)
	}
	if r.Users[0].PasswordHash == "" {
		t.Error("the request itself was changed")
	}
}

func FuzzCheck(f *testing.F) {
	f.Add([]byte("#!/bin/sh\n"), "Europe/Berlin", "root:x", "/a")
	f.Add([]byte("#cloud-config\n"), "../x", "\x00", "//")
	f.Fuzz(func(t *testing.T, doc []byte, zone, owner, path string) {
		r := Request{UserData: doc, Timezone: zone, Files: []File{{Path: path, Owner: owner}}, Users: []User{{Name: owner, Home: path, PasswordHash: zone}}, SSHAuthorizedKeys: []string{owner}}
		if _, err := r.Check(); err != nil {
			return
		}
		if filepath.Clean(path) != path {
			t.Errorf("path %q has passed", path)
		}
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // nothing is fetched
		_, _ = Compile(ctx, r, Options{Spool: dir})
	})
}

// What the machine writes at each boot cannot be a file of the first.
func TestFilesOfEachBoot(t *testing.T) {
	appended := `{"ignition":{"version":"3.4.0"},"storage":{"files":[{"path":"%s","append":[{"source":"data:,1.2.3.4%%20x"}]}]}}`
	for name, tt := range map[string]struct {
		r              Request
		hostname, want string
	}{
		"hostname by flag":     {Request{Files: []File{{Path: "/etc/hostname", Data: []byte("web.example\n")}, {Path: "/etc/motd"}}}, "web.example", ""},
		"hostname by Ignition": {Request{Ignition: []byte(`{"ignition":{"version":"3.4.0"},"storage":{"files":[{"path":"/etc/hostname","contents":{"source":"data:,web"}}, {"path":"/etc/motd"}]}}`)}, "web", ""},
		"no hostname":          {Request{Files: []File{{Path: "/etc/hostname", Data: []byte("a b")}}}, "", "--hostname"},
		"appended hostname":    {Request{Ignition: fmt.Appendf(nil, appended, "/etc/hostname")}, "", "--hostname"},
		"hosts":                {Request{Files: []File{{Path: "/etc/hosts"}}}, "", "--add-host"},
		"appended hosts":       {Request{Ignition: fmt.Appendf(nil, appended, "/etc/hosts")}, "", "--add-host"},
		"resolv.conf":          {Request{UserData: []byte("#cloud-config\nwrite_files:\n- path: /etc/resolv.conf\n  content: x\n")}, "", "--dns"},
	} {
		p, err := Compile(t.Context(), tt.r, Options{Spool: t.TempDir()})
		if tt.want != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(hint.Of(err), tt.want) {
				t.Errorf("%s: %v, hint %q", name, err, hint.Of(err))
			}
			continue
		}
		if err != nil || p.Hostname != tt.hostname || len(p.GetFiles()) != 1 || p.GetFiles()[0].GetNode().GetPath() != "/etc/motd" {
			t.Errorf("%s: %v, %q, %v", name, err, p.Hostname, p.GetFiles())
		}
	}
}
