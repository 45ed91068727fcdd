package cloudconfig

import (
	"encoding/base64"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/containerd/errdefs"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/provision/hostkey"
	"github.com/atollvm/atoll/internal/provision/plan"
)

const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE me"

func applied(t *testing.T, config string) *plan.Plan {
	t.Helper()
	p := plan.New()
	if err := Apply([]byte(config), p); err != nil {
		t.Fatalf("%s\n%v", config, err)
	}
	return p
}

func inline(s string) []*agentv1.Piece {
	return []*agentv1.Piece{{Kind: &agentv1.Piece_Inline{Inline: []byte(s)}}}
}

func id(n uint32) *agentv1.Owner { return &agentv1.Owner{Id: proto.Uint32(n)} }

func written(path, content string, mode uint32) *agentv1.File {
	return &agentv1.File{Node: &agentv1.Node{Path: path, Overwrite: proto.Bool(true), Mode: proto.Uint32(mode), User: id(0), Group: id(0)}, Contents: inline(content), HasContents: true}
}

func TestApply(t *testing.T) {
	for _, tt := range []struct {
		name, config string
		want         *agentv1.Provision
	}{
		{"nothing", "#cloud-config\n", &agentv1.Provision{}},
		{"comments", "#cloud-config\n# more\n", &agentv1.Provision{}},
		{"users", `
users:
- default
- alice
- name: bob
  gecos: Bob B.
  groups: sudo, docker
  primary-group: staff
  shell: /bin/zsh
  uid: 1234
  lock_passwd: no
  hashed_passwd: $6$abc$def
  sudo: ["ALL=(ALL) NOPASSWD:ALL"]
  ssh-authorized-keys: ["` + key + `"]
- {name: svc, system: true, groups: [adm], create_groups: false, sudo: false, homedir: /srv/svc, no_user_group: on}
`, &agentv1.Provision{
			Groups: []*agentv1.Group{{Name: "sudo"}, {Name: "docker"}, {Name: "staff"}},
			Users: []*agentv1.User{
				{Name: "alice", LockPassword: true},
				{Name: "bob", Gecos: "Bob B.", Groups: []string{"sudo", "docker"}, PrimaryGroup: "staff", Shell: "/bin/zsh", Uid: proto.Uint32(1234),
					PasswordHash: proto.String("$6$abc$def"), Sudo: []string{"ALL=(ALL) NOPASSWD:ALL"}, SshAuthorizedKeys: []string{key}},
				{Name: "svc", System: true, NoCreateHome: true, NoUserGroup: true, Home: "/srv/svc", Groups: []string{"adm"}, LockPassword: true},
			},
		}},
		{"users by name", "users: alice,bob", &agentv1.Provision{Users: []*agentv1.User{{Name: "alice", LockPassword: true}, {Name: "bob", LockPassword: true}}}},
		{"groups", "groups:\n- ops\n- {web: [alice], db: }\nusers: [alice]\n", &agentv1.Provision{
			Groups: []*agentv1.Group{{Name: "ops"}, {Name: "web"}, {Name: "db"}},
			Users:  []*agentv1.User{{Name: "alice", LockPassword: true, Groups: []string{"web"}}},
		}},
		{"keys of root", "ssh_authorized_keys: ['" + key + "']", &agentv1.Provision{Users: []*agentv1.User{{Name: "root", SshAuthorizedKeys: []string{key}}}}},
		{"keys of the default user", "user: admin\nssh_authorized_keys: ['" + key + "']", &agentv1.Provision{
			Users: []*agentv1.User{{Name: "admin", LockPassword: true, SshAuthorizedKeys: []string{key}}}}},
		{"keys of both", "user: admin\nusers: [default]\ndisable_root: false\nssh_authorized_keys: ['" + key + "']", &agentv1.Provision{
			Users: []*agentv1.User{{Name: "admin", LockPassword: true, SshAuthorizedKeys: []string{key}}, {Name: "root", SshAuthorizedKeys: []string{key}}}}},
		{"no default user", "user: admin\nusers: [bob]\nssh_authorized_keys: ['" + key + "']", &agentv1.Provision{
			Users: []*agentv1.User{{Name: "bob", LockPassword: true}, {Name: "root", SshAuthorizedKeys: []string{key}}}}},
		{"passwords", "users: [alice]\nchpasswd:\n  expire: false\n  users: [{name: alice, password: $6$a$b, type: hash}]\n  list: |\n    root:$1$a$b\n", &agentv1.Provision{
			Users: []*agentv1.User{{Name: "alice", PasswordHash: proto.String("$6$a$b")}, {Name: "root", PasswordHash: proto.String("$1$a$b")}}}},
		{"password", "user: {name: alice, lock_passwd: true}\npassword: $5$a$b\n", &agentv1.Provision{Users: []*agentv1.User{{Name: "alice", PasswordHash: proto.String("$5$a$b")}}}},
		{"files", `
write_files:
- path: /etc/motd
  content: |
    Hello
- {path: /a, permissions: '0600', owner: "alice:staff", content: aGk=, encoding: b64}
- {path: /b, permissions: 0755, owner: alice, content: x}
- {path: /c, permissions: 0o640, owner: "5:6", content: !!binary aGk=, defer: yes}
- {path: /d, append: true, content: more}
- {path: /e, content: H4sIAAAAAAAAA8vIBACsKpPYAgAAAA==, encoding: gz+b64}
- path: /empty
`, &agentv1.Provision{Files: []*agentv1.File{
			written("/etc/motd", "Hello\n", 0o644),
			{Node: &agentv1.Node{Path: "/a", Overwrite: proto.Bool(true), Mode: proto.Uint32(0o600), User: &agentv1.Owner{Name: "alice"}, Group: &agentv1.Owner{Name: "staff"}}, Contents: inline("hi"), HasContents: true},
			{Node: &agentv1.Node{Path: "/b", Overwrite: proto.Bool(true), Mode: proto.Uint32(0o755), User: &agentv1.Owner{Name: "alice"}, Group: &agentv1.Owner{Name: "alice"}}, Contents: inline("x"), HasContents: true},
			{Node: &agentv1.Node{Path: "/c", Overwrite: proto.Bool(true), Mode: proto.Uint32(0o640), User: id(5), Group: id(6)}, Contents: inline("hi"), HasContents: true, Defer: true},
			{Node: &agentv1.Node{Path: "/d", Mode: proto.Uint32(0o644), User: id(0), Group: id(0)}, Append: inline("more")},
			written("/e", "hi", 0o644),
			written("/empty", "", 0o644),
		}}},
		{"packages", "packages: [curl, [nginx, '1.2-3'], pwgen]\npackage_update: true\npackage_upgrade: no\n", &agentv1.Provision{
			Packages: &agentv1.Packages{Names: []string{"curl", "nginx=1.2-3", "pwgen"}, Update: true}}},
		{"zone and locale", "timezone: Europe/Berlin\nlocale: de_DE.UTF-8\n", &agentv1.Provision{Timezone: "Europe/Berlin", Locale: "de_DE.UTF-8"}},
		{"mounts", "mounts:\n- [vdc, /data]\n- [tmpfs, /scratch, tmpfs, 'size=1m,mode=1777', '0', 0]\n- [/dev/vdd, none, swap, sw]\n", &agentv1.Provision{Mounts: []*agentv1.FileSystemMount{
			{Source: "/dev/vdc", Path: "/data", Type: "auto", Options: "defaults,nofail"},
			{Source: "tmpfs", Path: "/scratch", Type: "tmpfs", Options: "size=1m,mode=1777"},
			{Source: "/dev/vdd", Path: "none", Type: "swap", Options: "sw"},
		}}},
		{"true already", "growpart: {mode: auto, devices: [/], ignore_growroot_disabled: false}\nresize_rootfs: noblock\nssh_deletekeys: true\nntp: {}\nssh_pwauth: unchanged\nmanage_etc_hosts: localhost\npackage_reboot_if_required: false\n", &agentv1.Provision{}},
		{"password authentication", "ssh_pwauth: no\n", &agentv1.Provision{Files: []*agentv1.File{{
			Node: &agentv1.Node{Path: sshdConfig, Overwrite: proto.Bool(true), Mode: proto.Uint32(0o600)}, Contents: inline("PasswordAuthentication no\n"), HasContents: true}}}},
		{"merge keys", "a: &a {path: /x, content: one}\nwrite_files: [{<<: *a, content: two}]\n", nil},
	} {
		if tt.want == nil {
			if err := Check([]byte(tt.config)); err == nil || !strings.Contains(err.Error(), "line 1: a: no such key") || strings.Contains(err.Error(), "write_files") {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if diff := cmp.Diff(tt.want, applied(t, tt.config).Provision, protocmp.Transform()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestNames(t *testing.T) {
	for _, tt := range []struct{ config, name, hosts string }{
		{"hostname: web", "web", ""},
		{"hostname: web.example", "web", "web.example web"},
		{"fqdn: web.example.org", "web", "web.example.org web"},
		{"hostname: www\nfqdn: web.example", "www", "web.example www"},
		{"fqdn: web.example\nprefer_fqdn_over_hostname: true", "web.example", "web.example web"},
		{"fqdn: web.example\nmanage_etc_hosts: false", "web", ""},
		{"fqdn: web.example\nmanage_etc_hosts: true", "web", "web.example web"},
		{"hostname: web\npreserve_hostname: true", "", ""},
		{"{}", "", ""},
	} {
		p := applied(t, tt.config)
		hosts := ""
		for _, h := range p.Hosts {
			hosts += strings.Join(h.GetNames(), " ")
		}
		if p.Hostname != tt.name || hosts != tt.hosts {
			t.Errorf("%q: %q, hosts %q", tt.config, p.Hostname, hosts)
		}
	}
	p := applied(t, "ntp:\n  enabled: true\n  servers: [192.0.2.1]\n  pools: [pool.example]\noutput: {all: '| tee /x'}\n")
	if diff := cmp.Diff([]string{"192.0.2.1", "pool.example"}, p.NTPServers); diff != "" {
		t.Errorf("NTP (-want +got):\n%s", diff)
	}
	if len(p.Warnings) != 1 {
		t.Errorf("warnings: %q", p.Warnings)
	}
	if p := applied(t, "ntp: {enabled: no, servers: [192.0.2.1]}"); len(p.NTPServers) > 0 {
		t.Errorf("NTP that is off: %q", p.NTPServers)
	}
}

// The commands are run: words with all that shells stumble over, state from one to the next, and the end at the first failure.
func TestCommands(t *testing.T) {
	run := func(config string) (string, error) {
		p := applied(t, config)
		file := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(file, p.Commands[0].GetScript(), 0o700); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), file).CombinedOutput()
		return string(out), err
	}
	out, err := run("runcmd:\n- [printf, '%s|', \"it's\", '$HOME `x`', 7]\n- cd /\n- pwd\n- |\n  if true; then\n    echo a\n  fi\n")
	if err != nil || out != "it's|$HOME `x`|7|/\na\n" {
		t.Errorf("%q, %v", out, err)
	}
	out, err = run("runcmd:\n- echo one\n- [sh, -c, 'exit 3']\n- echo three\n")
	var exit *exec.ExitError
	if out != "one\nruncmd: item 2: exit code 3\n" || !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("%q, %v", out, err)
	}
	p := applied(t, "runcmd: [a]\nfinal_message: It's up\nbootcmd: [b]\n")
	for i, want := range []*agentv1.Command{{Name: "bootcmd", EachBoot: true, Early: true}, {Name: "runcmd"}, {Name: "final_message"}} {
		got := proto.CloneOf(p.Commands[i])
		got.Script = nil
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("command %d (-want +got):\n%s", i, diff)
		}
	}
	if out, err := run("final_message: \"It's %s up\"\n"); err != nil || out != "It's %s up\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct{ config, want string }{
		{"a: b\n", "line 1: a: no such key"},
		{"hostname: a\n\nhostnam: b\n", "line 3: hostnam: no such key"},
		{"power_state: {mode: reboot}\n", "line 1: power_state: not implemented"},
		{"apt:\n  sources: {}\n", "line 1: apt: not implemented"},
		{"merge_how: x\n", "merge_how: not implemented"},
		{"- a\n", "line 1: want keys with values"},
		{"hostname: a\nhostname: b\n", "line 2: hostname is there twice"},
		{"hostname: [a]\n", "line 1: hostname: want a string"},
		{"hostname: yes\n", "hostname: yes is a boolean in YAML: put it in quotes"},
		{"hostname: ~\n", "hostname: there is nothing"},
		{"hostname: -x\n", "hostname: not a host name"},
		{"hostname: a\n---\nhostname: b\n", "line 2: a second document begins"},
		{"hostname: 'a\n", "line 2: found unexpected end of stream"},
		{"users:\n- name: a\n  inactive: '5'\n", "line 3: users[0].inactive: not implemented"},
		{"users:\n- name: a\n  passwort: x\n", "line 3: users[0].passwort: no such key"},
		{"users:\n- {gecos: x}\n", "line 2: users[0]: a user without a name"},
		{"users: [a, a]\n", "users[1]: the user a is there twice"},
		{"users: [{name: a, plain_text_passwd: secret1}]\n", "users[0].plain_text_passwd: not implemented"},
		{"users: [{name: a, passwd: secret1}]\n", "users[0].passwd: not a hash of crypt(5)"},
		{"users: [{name: a, passwd: $6$a$b, hashed_passwd: $6$a$b}]\n", "give one of passwd and hashed_passwd"},
		{"users: [{name: a, uid: -1}]\n", "users[0].uid: want a number"},
		{"users: [{name: a, sudo: true}]\n", "users[0].sudo: want a rule"},
		{"users: [{name: a, ssh_authorized_keys: [nonsense]}]\n", "users[0].ssh_authorized_keys[0]: not a public SSH key"},
		{"users: [{name: a, ssh_authorized_keys: ['-----BEGIN OPENSSH PRIVATE KEY-----']}]\n", "it is a private key"},
		{"users: [{name: a, shell: zsh}]\n", "users[0].shell: not an absolute path"},
		{"users: [{name: 'a:b'}]\n", "users[0].name: not a name"},
		{"groups: [{web: [nobody]}]\n", "groups[0].web[0]: not among users"},
		{"disable_root: true\nssh_authorized_keys: ['" + key + "']\n", "line 2: ssh_authorized_keys: they would be root's"},
		{"password: $6$a$b\n", "password: it is the password of no user"},
		{"chpasswd: {list: ['a:secret1']}\n", "chpasswd.list[0]: want USER:HASH"},
		{"chpasswd: {users: [{name: a, type: RANDOM}]}\n", "only hash is implemented"},
		{"ssh_keys: {dsa_private: x}\n", "ssh_keys.dsa_private: no such key"},
		{"ssh_keys: {rsa_private: secret1}\n", "ssh_keys.rsa_private: not a private key"},
		{"ssh_keys: {rsa_public: x}\n", "there is no rsa_private with it"},
		{"ssh_deletekeys: false\n", "ssh_deletekeys: the image's host keys never stay"},
		{"write_files: [{content: x}]\n", "write_files[0]: a file without a path"},
		{"write_files: [{path: a}]\n", "write_files[0].path: not an absolute path"},
		{"write_files: [{path: /a, permissions: 644}]\n", "write_files[0].permissions: 644 is a decimal number to YAML: put it in quotes"},
		{"write_files: [{path: /a, permissions: '0999'}]\n", "want an octal number"},
		{"write_files: [{path: /a, permissions: '77777'}]\n", "want an octal number"},
		{"write_files: [{path: /a, encoding: rot13, content: x}]\n", "write_files[0].encoding: want text/plain"},
		{"write_files: [{path: /a, encoding: b64, content: '*'}]\n", "write_files[0].content: it is not base64"},
		{"write_files: [{path: /a, encoding: gz+b64, content: aGk=}]\n", "write_files[0].content: it is not gzip"},
		{"write_files: [{path: /a, source: {uri: 'http://x'}}]\n", "write_files[0].source: not implemented"},
		{"write_files: [{path: /a, content: yes}]\n", "yes is a boolean in YAML"},
		{"write_files: [{path: /a, owner: 'a b'}]\n", "want USER:GROUP"},
		{"packages: [[a]]\n", "packages[0]: want a name and a version"},
		{"packages: ['-y']\n", "packages[0]: not a name of a package"},
		{"packages: [{snap: [x]}]\n", "packages[0]: packages of one manager only"},
		{"package_update: perhaps\n", "package_update: want true or false"},
		{"package_reboot_if_required: true\n", "package_reboot_if_required: not implemented"},
		{"runcmd: echo\n", "runcmd: want a list"},
		{"runcmd: [{a: b}]\n", "runcmd[0]: want a string"},
		{"runcmd: [~]\n", "runcmd[0]: there is nothing"},
		{"timezone: Mars/Olympus\n", "timezone: no such time zone"},
		{"locale: german\n", "locale: not a locale"},
		{"ntp: {peers: [x]}\n", "ntp.peers: not implemented"},
		{"ntp: {ntp_client: chrony}\n", "ntp.ntp_client: not implemented"},
		{"mounts: [[vdc]]\n", "mounts[0]: want a device, a path"},
		{"mounts: [[ephemeral0, /mnt]]\n", "mounts[0][0]: devices by a cloud's names"},
		{"mounts: [[vdc, ~]]\n", "mounts[0][1]: taking a default mount away"},
		{"growpart: {devices: [/dev/vdb]}\n", "growpart.devices[0]: only / has grown"},
		{"ca-certs: {remove-defaults: true}\n", "ca_certs.remove-defaults: not implemented"},
		{"ca_certs: {trusted: [x]}\n", "ca_certs.trusted[0]: no certificate"},
		{"final_message: up after $uptime\n", "final_message: variables are not implemented"},
	} {
		err := Check([]byte(tt.config))
		if err == nil || !strings.Contains(err.Error(), tt.want) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v\nwant %s", tt.config, err, tt.want)
			continue
		}
		if strings.Contains(err.Error(), "secret1") {
			t.Errorf("%q: a secret is in: %v", tt.config, err)
		}
	}
	// All of them at once, by line.
	err := Check([]byte("hostname: [x]\nfoo: 1\nruncmd:\n- {}\n"))
	want := "cloud-config:\n  line 1: hostname: want a string\n  line 2: foo: no such key\n  line 4: runcmd[0]: want a string: invalid argument"
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

func TestHostKeys(t *testing.T) {
	keys, err := hostkey.Generate()
	if err != nil {
		t.Fatal(err)
	}
	indent := func(s []byte) string {
		return "|\n    " + strings.ReplaceAll(strings.TrimSpace(string(s)), "\n", "\n    ") + "\n"
	}
	k, other := keys[0], keys[1]
	config := "ssh_keys:\n  " + k.Type + "_private: " + indent(k.Private) + "  " + k.Type + "_public: " + string(k.Public) + "\n"
	p := applied(t, config)
	got := p.GetSshHostKeys()[0]
	if again, err := hostkey.Parse(got.GetPrivate()); err != nil || got.GetType() != k.Type || string(got.GetPublic()) != string(k.Public) || string(again.Public) != string(k.Public) {
		t.Errorf("%s %s, %v", got.GetType(), got.GetPublic(), err)
	}
	for text, config := range map[string]string{
		"it is a key of type": "ssh_keys:\n  rsa_private: " + indent(k.Private),
		"not the public part": "ssh_keys:\n  " + k.Type + "_private: " + indent(k.Private) + "  " + k.Type + "_public: " + string(other.Public) + "\n",
	} {
		if err := Check([]byte(config)); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v\nwant %s", err, text)
		}
	}
}

func TestMerge(t *testing.T) {
	parse := func(from, config string) *Config {
		c, err := Parse(from, []byte(config))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a := parse("part 1", "hostname: one\npackages: [a]\nruncmd: [x]\nssh_authorized_keys: ['"+key+"']\n")
	a.Merge(parse("part 2", "packages: [b]\nhostname: two\ndisable_root: true\n"))
	p := plan.New()
	err := a.Apply(p)
	if err == nil || !strings.Contains(err.Error(), "cloud-config: part 1, line 4: ssh_authorized_keys: they would be") {
		t.Errorf("faults of merged parts: %v", err)
	}
	a.Merge(parse("part 3", "disable_root: false\n"))
	p = plan.New()
	if err := a.Apply(p); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"b"}, p.GetPackages().GetNames()); diff != "" || p.Hostname != "two" || len(p.Commands) != 1 {
		t.Errorf("%s, %q, %d commands", diff, p.Hostname, len(p.Commands))
	}
}

// Large files travel beside the message, and aliases cannot make a large document of a small one.
func TestBounds(t *testing.T) {
	big := strings.Repeat("x", 1<<20)
	p := applied(t, "write_files: [{path: /a, encoding: b64, content: "+base64.StdEncoding.EncodeToString([]byte(big))+"}]\n")
	if c := p.Contents(); len(c) != 1 || c[0].Size != 1<<20 {
		t.Errorf("contents: %v", c)
	}
	bomb := "runcmd:\n- &a [" + strings.Repeat("x,", 2000) + "]\n" + strings.Repeat("- *a\n", 2000)
	if err := Check([]byte(bomb)); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("aliases: %v", err)
	}
	loop := "users:\n- &a {name: x, <<: *a}\n"
	if err := Check([]byte(loop)); err == nil {
		t.Error("an alias of itself was taken")
	}
	if err := Check([]byte(strings.Repeat("a: 1\n", 100000))); err == nil || len(err.Error()) > 10000 {
		t.Errorf("many faults make an error of %d bytes", len(err.Error()))
	}
}

func FuzzCheck(f *testing.F) {
	for _, s := range []string{
		"#cloud-config\nusers:\n- default\n- {name: a, groups: [b], passwd: $6$a$b, <<: {}}\n", "write_files: [{path: /a, content: !!binary aGk=, permissions: 0644, encoding: gz}]",
		"runcmd: [[a, b], c]\nbootcmd: [&x a, *x]\n", "mounts: [[a, /b, c, d, 0, 0]]\nchpasswd: {list: |\n a:$6$x$y\n}", "groups: {a: b}\nuser: c\npassword: '*'\n",
		"ntp: {servers: [a]}\npackages: [[a, 1]]\n", "<<: &a\n  <<: *a\n", "? [a]\n: b\n", "a: !!str &x *x", "ssh_keys: {rsa_private: x}\nca-certs: {trusted: [x]}\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		began := time.Now()
		err := Check(data)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %s", took)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v", err)
		}
		if err == nil { // what was checked can be carried out
			if err := Apply(data, plan.New()); err != nil {
				t.Errorf("after a check that passed: %v", err)
			}
		}
	})
}
