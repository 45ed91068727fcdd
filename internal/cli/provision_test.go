package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
)

const publicKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJmB3nUoIfkCMoFb0kNoTxHS9rLp8FUSxcfNT0n6jQ9M"

func inFiles(t *testing.T, files map[string]string) {
	t.Helper()
	t.Chdir(t.TempDir())
	for name, text := range files {
		if err := os.WriteFile(name, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
}

func TestParseUser(t *testing.T) {
	inFiles(t, map[string]string{"key.pub": "# mine\n" + publicKey + " a\n\n" + publicKey + " b\n", "hash": "$6$x$y\n", "id": "-----BEGIN OPENSSH PRIVATE KEY-----\n"})
	for given, want := range map[string]*atollv1.User{
		"ada":                           {Name: "ada"},
		"ada:sudo":                      {Name: "ada", Sudo: true},
		"ada:uid=0,sudo,shell=/bin/zsh": {Name: "ada", Uid: proto.Uint32(0), Sudo: true, Shell: "/bin/zsh"},
		"ada:sudo=false,groups=a+b,home=/x,password-hash=$6$r=1$y": {Name: "ada", Groups: []string{"a", "b"}, Home: "/x", PasswordHash: "$6$r=1$y"},
		"ada:password-hash-file=hash":                              {Name: "ada", PasswordHash: "$6$x$y"},
		"ada:ssh-key=key.pub":                                      {Name: "ada", SshAuthorizedKeys: []string{publicKey + " a", publicKey + " b"}},
		"ada:ssh-key=" + publicKey + ",uid=7":                      {Name: "ada", Uid: proto.Uint32(7), SshAuthorizedKeys: []string{publicKey}},
	} {
		got, err := parseUser(given)
		if err != nil {
			t.Errorf("%s: %v", given, err)
		}
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Errorf("%s: %s", given, d)
		}
	}
	for given, want := range map[string]string{
		"": "want NAME", ":sudo": "want NAME", "ada:uid=x": "not a number", "ada:wheel": "not KEY=VALUE", "ada:colour=red": "unknown key", "ada:sudo=maybe": "true or false",
		"ada:ssh-key=nothere": "no such file", "ada:ssh-key=id": "private key", "ada:password-hash=x,password-hash-file=hash": "give one of them",
	} {
		if _, err := parseUser(given); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", given, err, want)
		}
	}
}

func TestParseFile(t *testing.T) {
	inFiles(t, map[string]string{"a": "text"})
	for given, want := range map[string]*atollv1.File{
		"a:/etc/a":              {Path: "/etc/a", Data: []byte("text"), Mode: 0o640},
		"a:/etc/":               {Path: "/etc/a", Data: []byte("text"), Mode: 0o640},
		"a:/etc/a:4755":         {Path: "/etc/a", Data: []byte("text"), Mode: 0o4755},
		"a:/etc/a::ada":         {Path: "/etc/a", Data: []byte("text"), Mode: 0o640, Owner: "ada"},
		"a:/etc/a:0600:ada:adm": {Path: "/etc/a", Data: []byte("text"), Mode: 0o600, Owner: "ada:adm"},
	} {
		got, err := parseFile(given)
		if err != nil {
			t.Errorf("%s: %v", given, err)
		}
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Errorf("%s: %s", given, d)
		}
	}
	for given, want := range map[string]string{"a": "want FILE:PATH", "a:b": "not an absolute path", "b:/b": "no such file", ".:/b": "not a regular file", "a:/b:9": "not a mode", ":/b": "want FILE:PATH"} {
		if _, err := parseFile(given); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", given, err, want)
		}
	}
}

func TestParseSecret(t *testing.T) {
	inFiles(t, map[string]string{"tok": "text"})
	e := &environment{Env: Env{LookupEnv: os.LookupEnv}}
	for given, want := range map[string]*atollv1.Secret{
		"id=a,src=tok":                            {Name: "a", Data: []byte("text")},
		"id=a,src=tok,uid=1000":                   {Name: "a", Data: []byte("text"), Owner: "1000:0"},
		"id=a,src=tok,gid=7,mode=0440":            {Name: "a", Data: []byte("text"), Owner: "0:7", Mode: 0o440},
		"id=a,src=tok,uid=0,gid=0,mode=400":       {Name: "a", Data: []byte("text"), Mode: 0o400},
		"id=a,type=file,source=tok,uid=1,gid=002": {Name: "a", Data: []byte("text"), Owner: "1:002"},
	} {
		got, err := e.machineSecret(given)
		if err != nil {
			t.Errorf("%s: %v", given, err)
		}
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Errorf("%s: %s", given, d)
		}
	}
	for given, want := range map[string]string{
		"src=tok": "id= is missing", "id=a,src=tok,uid=app": "uid=app: want a number", "id=a,src=tok,mode=9": "mode=9", "id=a,src=tok,mode=04000": "mode=04000",
		"id=a,src=tok,owner=x": "unknown key",
	} {
		if _, err := e.machineSecret(given); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", given, err, want)
		}
	}
}

func TestParseMount(t *testing.T) {
	for given, want := range map[string]*atollv1.FileSystemMount{
		"type=tmpfs,target=/t": {Type: "tmpfs", Path: "/t"},
		"type=tmpfs,dst=/t,tmpfs-mode=0700,tmpfs-size=1m,readonly": {Type: "tmpfs", Path: "/t", Options: "ro,size=1m,mode=0700"},
		"type=ext4,source=/dev/vdc,target=/d,options=noatime+ro":   {Type: "ext4", Source: "/dev/vdc", Path: "/d", Options: "noatime,ro"},
	} {
		got, err := parseMount(given)
		if err != nil {
			t.Errorf("%s: %v", given, err)
		}
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Errorf("%s: %s", given, d)
		}
	}
	for given, want := range map[string]string{
		"type=bind,source=/a,target=/b": "directories of the host or volumes", "target=/b": "directories of the host or volumes", "type=tmpfs": "target= is missing",
		"type=ext4,target=/x,tmpfs-size=1m": "is for type=tmpfs", "type=tmpfs,target=/x,mode=1": "unknown key",
	} {
		if _, err := parseMount(given); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", given, err, want)
		}
	}
}

// What the flags name is read here, as the daemon may not.
func TestProvisioningOfRun(t *testing.T) {
	a := newAtoll(t)
	inFiles(t, map[string]string{"script": "#!/bin/sh\n", "key.pub": publicKey + " me\n", "local": "embedded", "cfg.bu": "variant: fcos\nversion: 1.5.0\nstorage:\n  files:\n  - path: /x\n    contents: {local: local}\n"})
	a.ok("create", "--user-data", "script", "--ssh-key", "key.pub", "--ssh-key", publicKey, "--package", "a,b", "--package", "c", "--ntp", "n", "--locale", "C.UTF-8", "--timezone", "UTC", "hello")
	want := &atollv1.Provisioning{
		UserData: []byte("#!/bin/sh\n"), SshAuthorizedKeys: []string{publicKey + " me", publicKey}, Packages: []string{"a", "b", "c"}, NtpServers: []string{"n"},
		Locale: "C.UTF-8", Timezone: "UTC",
	}
	if d := cmp.Diff(want, a.fake.machines[0].Spec.GetProvisioning(), protocmp.Transform()); d != "" {
		t.Error(d)
	}
	a.in = "#cloud-config\n"
	a.ok("create", "--user-data", "-", "hello")
	if got := a.fake.machines[1].Spec.GetProvisioning(); string(got.GetUserData()) != "#cloud-config\n" {
		t.Errorf("user-data %q", got.GetUserData())
	}
	a.ok("create", "--ignition", "cfg.bu", "hello")
	if got := string(a.fake.machines[2].Spec.GetProvisioning().GetIgnition()); !strings.Contains(got, `"data:,embedded"`) {
		t.Errorf("ignition %s", got)
	}
	a.ok("create", "hello")
	if got := a.fake.machines[3].Spec.GetProvisioning(); got != nil {
		t.Errorf("nothing was asked for: %v", got)
	}
	a.ok("start", "--reprovision", "--timezone", "UTC", a.fake.machines[3].Spec.Name)
	if r := a.fake.restarted; r == nil || r.GetProvisioning().GetTimezone() != "UTC" {
		t.Errorf("start: %v", r)
	}
	for want, args := range map[string][]string{
		"would read standard input": {"create", "-i", "--user-data", "-", "hello"},
		"time zone":                 {"create", "--timezone", "berlin", "hello"},
		"it is empty":               {"create", "--user-data", "/dev/null", "hello"},
		"no such file":              {"create", "--ignition", filepath.Join(t.TempDir(), "x"), "hello"},
		"add --reprovision":         {"start", "--package", "x", "made_up_0"},
		"goes with --tail only":     {"logs", "--provisioning", "-f", "made_up_0"},
	} {
		if r := a.run(args...); r.code == 0 || !strings.Contains(r.errOut, want) {
			t.Errorf("%v: exit code %d, %q, want %q", args, r.code, r.errOut, want)
		}
	}
}
