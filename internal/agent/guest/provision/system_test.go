package provision

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// testCertificate need only look like one.
const testCertificate = "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n"

// unmountAll takes away what was mounted in a root, the last first.
func unmountAll(t *testing.T, root string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	for _, line := range slices.Backward(lines) {
		if f := strings.Fields(line); strings.HasPrefix(f[1], root+"/") {
			if err := unix.Unmount(f[1], unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestUnits(t *testing.T) {
	root := newRoot(t, map[string]string{
		"usr/lib/systemd/systemd": "", "lib": "→usr/lib",
		"usr/lib/systemd/system/there.service":          "[Install]\nWantedBy=a.target \\\n b.target\nRequiredBy=c.target\nAlias=other.service\nAlso=there.socket\n# WantedBy=no.target\n[Unit]\nWantedBy=no.target\n",
		"usr/lib/systemd/system/there.socket":           "[Install]\nWantedBy=sockets.target\nAlso=there.service\n",
		"usr/lib/systemd/system/getty@.service":         "[Install]\nWantedBy=getty.target\nDefaultInstance=tty1\nAlias=%p-%i-of-%j.service\n",
		"usr/lib/systemd/system/off.service":            "[Install]\nWantedBy=a.target\nAlias=off-alias.service\n",
		"etc/systemd/system/a.target.wants/off.service": "→/lib/systemd/system/off.service", "etc/systemd/system/off-alias.service": "→/lib/systemd/system/off.service",
		"etc/systemd/system/a.target.wants/inst@1.service": "→/lib/systemd/system/inst@.service", "etc/systemd/system/a.target.wants/stays.service": "→/x",
		"etc/systemd/system/was-masked.service": "→/dev/null", "etc/systemd/system/not-masked.service": "x", "usr/lib/systemd/system/was-masked.service": "[Install]\nWantedBy=a.target\n",
		"etc/systemd/system-preset/20-ignition.preset": "enable kept.service\nenable off.service\n",
	})
	yes, no := proto.Bool(true), proto.Bool(false)
	var said bytes.Buffer
	r := &agentv1.Provision{First: true, Units: []*agentv1.Unit{
		{Name: "new.service", Contents: []byte("[Service]\nExecStart=x\n[Install]\nWantedBy=no.target\n"), Enabled: yes, DropIns: []*agentv1.DropIn{
			{Name: "10-x.conf", Contents: []byte("[Install]\nWantedBy=\nWantedBy=multi-user.target\n")}, {Name: "empty.conf"}}},
		{Name: "there.service", Enabled: yes},
		{Name: "getty@.service", Enabled: yes},
		{Name: "getty@ttyS0.service", Enabled: yes},
		{Name: "off.service", Enabled: no},
		{Name: "inst@.service", Enabled: no},
		{Name: "enoent.service", Enabled: yes},
		{Name: "bad.service", Masked: yes},
		{Name: "was-masked.service", Masked: no, Enabled: yes},
		{Name: "not-masked.service", Masked: no},
		{Name: "untouched.service", Contents: []byte{}},
	}}
	if err := Apply(r, Options{Root: root, Output: func(p []byte) { said.Write(p) }}); err != nil {
		t.Fatal(err)
	}
	const dir, lib = "etc/systemd/system/", "→/usr/lib/systemd/system/"
	wantLooks(t, root, map[string]string{
		dir + "new.service.d/empty.conf": "0644 0:0 ", dir + "multi-user.target.wants/new.service": "→/etc/systemd/system/new.service 0:0", dir + "no.target.wants": "none",
		dir + "a.target.wants/there.service": lib + "there.service 0:0", dir + "b.target.wants/there.service": lib + "there.service 0:0",
		dir + "c.target.requires/there.service": lib + "there.service 0:0", dir + "other.service": lib + "there.service 0:0",
		dir + "sockets.target.wants/there.socket":     lib + "there.socket 0:0",
		dir + "getty.target.wants/getty@tty1.service": lib + "getty@.service 0:0", dir + "getty.target.wants/getty@ttyS0.service": lib + "getty@.service 0:0",
		dir + "getty-ttyS0-of-getty.service": lib + "getty@.service 0:0",
		dir + "a.target.wants/off.service":   "none", dir + "off-alias.service": "none", dir + "a.target.wants/inst@1.service": "none", dir + "a.target.wants/stays.service": "→/x 0:0",
		dir + "bad.service": "→/dev/null 0:0", dir + "was-masked.service": "none", dir + "not-masked.service": "0644 0:0 x", dir + "a.target.wants/was-masked.service": lib + "was-masked.service 0:0",
		dir + "untouched.service":                      "none",
		"etc/systemd/system-preset/20-ignition.preset": "0644 0:0 enable enoent.service\nenable getty@.service ttyS0\ndisable inst@.service\nenable new.service\ndisable off.service\nenable there.service\nenable was-masked.service\nenable kept.service\n",
	})
	if !strings.Contains(said.String(), `"enoent.service": there is no such unit`) {
		t.Errorf("said %q", said.String())
	}
}

func TestSSHHostKeys(t *testing.T) {
	root := newRoot(t, map[string]string{
		"etc/ssh/ssh_host_rsa_key": "image's", "etc/ssh/ssh_host_rsa_key.pub": "image's", "etc/ssh/ssh_host_ed25519_key": "image's", "etc/ssh/ssh_host_ed25519_key-cert.pub": "image's",
		"etc/ssh/sshd_config": "stays",
	})
	keys := []*agentv1.SSHHostKey{{Type: "ed25519", Private: []byte("private\n"), Public: []byte("public")}}
	mustApply(t, root, &agentv1.Provision{SshHostKeys: keys})
	wantLooks(t, root, map[string]string{
		"etc/ssh/ssh_host_ed25519_key": "0600 0:0 private\n", "etc/ssh/ssh_host_ed25519_key.pub": "0644 0:0 public\n", "etc/ssh/ssh_host_rsa_key": "none",
		"etc/ssh/ssh_host_rsa_key.pub": "none", "etc/ssh/ssh_host_ed25519_key-cert.pub": "none", "etc/ssh/sshd_config": "0644 0:0 stays",
	})
	without := newRoot(t, nil)
	mustApply(t, without, &agentv1.Provision{SshHostKeys: keys})
	wantLooks(t, without, map[string]string{"etc": "none"})
}

func TestZoneAndLocale(t *testing.T) {
	zone := []byte("TZif2data")
	root := newRoot(t, map[string]string{
		"usr/share/zoneinfo/Europe/Berlin": "TZif", "etc/localtime": "→/usr/share/zoneinfo/Etc/UTC", "usr/lib/locale/fr_FR.utf8/": "", "usr/lib/locale/locale-archive": strings.Repeat("x", 65530) + "\x00de_DE.utf8\x00",
	})
	mustApply(t, root, &agentv1.Provision{Timezone: "Europe/Berlin", Zone: zone, Locale: "fr_FR.UTF-8"})
	wantLooks(t, root, map[string]string{
		"etc/localtime": "→/usr/share/zoneinfo/Europe/Berlin 0:0", "etc/timezone": "0644 0:0 Europe/Berlin\n", "etc/locale.conf": "0644 0:0 LANG=fr_FR.UTF-8\n", "etc/default/locale": "0644 0:0 LANG=fr_FR.UTF-8\n",
	})
	mustApply(t, root, &agentv1.Provision{Timezone: "America/Port-au-Prince", Zone: zone, Locale: "de_DE.UTF-8"})
	wantLooks(t, root, map[string]string{"etc/localtime": "0644 0:0 TZif2data", "etc/timezone": "0644 0:0 America/Port-au-Prince\n", "etc/locale.conf": "0644 0:0 LANG=de_DE.UTF-8\n"})
	mustApply(t, root, &agentv1.Provision{Timezone: "UTC"})
	wantLooks(t, root, map[string]string{"etc/localtime": "none", "etc/timezone": "0644 0:0 UTC\n"})
	if err := apply(t, root, &agentv1.Provision{Locale: "es_ES.UTF-8"}); err == nil {
		t.Error("a locale that is not there")
	}
	musl := newRoot(t, map[string]string{"lib/ld-musl-x86_64.so.1": ""})
	mustApply(t, musl, &agentv1.Provision{Locale: "es_ES.UTF-8"})
}

func TestAuthorities(t *testing.T) {
	cert := "words\n" + testCertificate + "-----BEGIN PRIVATE KEY-----\nAAEC\n-----END PRIVATE KEY-----\n"
	root := newRoot(t, map[string]string{"etc/ssl/certs/ca-certificates.crt": "first", "etc/ssl/cert.pem": "→certs/ca-certificates.crt"})
	for range 2 {
		mustApply(t, root, &agentv1.Provision{CaCertificates: [][]byte{[]byte(cert)}})
	}
	wantLooks(t, root, map[string]string{
		"etc/ssl/certs/ca-certificates.crt": "0644 0:0 first\n" + testCertificate, "etc/ssl/cert.pem": "→certs/ca-certificates.crt 0:0",
		"usr/local/share/ca-certificates/atoll-1.crt": "0644 0:0 " + testCertificate,
	})
	redHat := newRoot(t, map[string]string{"etc/pki/ca-trust/source/": "", "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem": ""})
	mustApply(t, redHat, &agentv1.Provision{CaCertificates: [][]byte{[]byte(cert)}})
	wantLooks(t, redHat, map[string]string{
		"etc/pki/ca-trust/source/anchors/atoll-1.crt": "0644 0:0 " + testCertificate, "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem": "0644 0:0 " + testCertificate,
	})
	empty := newRoot(t, nil)
	mustApply(t, empty, &agentv1.Provision{CaCertificates: [][]byte{[]byte(cert)}})
	wantLooks(t, empty, map[string]string{"etc/ssl/certs/ca-certificates.crt": "0644 0:0 " + testCertificate})
}

// busyboxRoot is a root in which commands can be run.
func busyboxRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("no static busybox: install busybox-static")
	}
	root := newRoot(t, files)
	if err := errors.Join(os.MkdirAll(root+"/bin", 0o755), os.MkdirAll(root+"/dev", 0o755), os.WriteFile(root+"/bin/busybox", busybox, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "cat", "ls", "echo", "stat", "rm", "sleep", "env"} {
		if err := os.Symlink("busybox", root+"/bin/"+name); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { unmountAll(t, root) })
	return root
}

// runIn runs commands in a root, as the agent does in its own.
func runIn(root string) func(Command) (int, error) {
	return func(c Command) (int, error) {
		cmd := &exec.Cmd{Path: c.Argv[0], Args: c.Argv, Env: append([]string{"PATH=/usr/sbin:/usr/bin:/bin"}, c.Env...), Dir: "/", SysProcAttr: &syscall.SysProcAttr{Chroot: root}}
		if !strings.Contains(cmd.Path, "/") {
			cmd.Path = "/bin/" + cmd.Path
		}
		cmd.Stdout = writerFunc(c.Output)
		cmd.Stderr = cmd.Stdout
		var exit *exec.ExitError
		if err := cmd.Run(); errors.As(err, &exit) {
			return exit.ExitCode(), nil
		} else if err != nil {
			return 0, err
		}
		return 0, nil
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(p []byte) (int, error) {
	if f != nil {
		f(p)
	}
	return len(p), nil
}

func TestCommands(t *testing.T) {
	root := busyboxRoot(t, nil)
	p := &agentv1.Provision{First: true, Files: []*agentv1.File{{Node: &agentv1.Node{Path: "/file"}}}, Commands: []*agentv1.Command{
		{Name: "early", Early: true, Argv: []string{"sh", "-c", "ls /file 2>/dev/null || echo early"}},
		{Name: "argv", Argv: []string{"echo", "a b", "$HOME", "-x"}},
		{Name: "script", Script: []byte("echo $0 $1; stat -c %a /run/atoll /run/atoll/script"), Argv: []string{"one"}, Env: []string{"A=b"}, EachBoot: true},
		{Name: "hash-bang", Script: []byte("#!/bin/sh\necho \"$A\""), Env: []string{"A=`b`"}},
		{Name: "ignored", Argv: []string{"sh", "-c", "exit 3"}, IgnoreFailure: true},
	}}
	var said bytes.Buffer
	var steps []string
	o := Options{Root: root, Run: runIn(root), Output: func(p []byte) { said.Write(p) }, Step: func(s string) { steps = append(steps, s) }}
	if err := Apply(p, o); err != nil {
		t.Fatal(err, said.String())
	}
	if got, want := said.String(), "early\na b $HOME -x\n/run/atoll/script one\n700\n700\n"; !strings.HasPrefix(got, want) || !strings.Contains(got, "700\n`b`\n") || !strings.HasSuffix(got, "ignored: exit code 3\n") {
		t.Errorf("got %q", got)
	}
	if got := strings.Join(steps, "|"); got != "command early|files|command argv|command script|command hash-bang|command ignored" {
		t.Errorf("steps %s", got)
	}
	wantLooks(t, root, map[string]string{"run/atoll": "none", "run": "dir 0755 0:0"})

	p.First = false
	said.Reset()
	if err := Apply(p, o); err != nil || said.String() != "/run/atoll/script one\n700\n700\n" {
		t.Errorf("at a later boot: %v, %q", err, said.String())
	}

	p = &agentv1.Provision{First: true, Commands: []*agentv1.Command{{Name: "runcmd 1", Script: []byte("#!/bin/sh\nexit 7")}, {Name: "never", Argv: []string{"echo", "never"}}}}
	said.Reset()
	err := Apply(p, o)
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 7 || err.Error() != "runcmd 1: exit code 7" || said.Len() > 0 {
		t.Errorf("got %v, %q", err, said.String())
	}
	wantLooks(t, root, map[string]string{"run/atoll": "none"})
}

func TestSecrets(t *testing.T) {
	root := busyboxRoot(t, map[string]string{"etc/passwd": "app:x:1000:1000::/:/bin/sh\n", "run/image": "x"})
	p := &agentv1.Provision{Secrets: []*agentv1.Secret{ // each boot, so not only at the first
		{Name: "db", Data: []byte("a$b`\n")}, {Name: "app.key", Data: []byte("k"), User: &agentv1.Owner{Name: "app"}, Mode: proto.Uint32(0o440)},
	}, Commands: []*agentv1.Command{{Name: "c", Argv: []string{"cat", "/run/secrets/db"}, EachBoot: true}}}
	var said bytes.Buffer
	if err := Apply(p, Options{Root: root, Run: runIn(root), Output: func(p []byte) { said.Write(p) }}); err != nil {
		t.Fatal(err)
	}
	if said.String() != "a$b`\n" {
		t.Errorf("a command saw %q", said.String())
	}
	wantLooks(t, root, map[string]string{"run/secrets": "dir 0755 0:0", "run/secrets/db": "0400 0:0 a$b`\n", "run/secrets/app.key": "0440 1000:0 k", "run/image": "0644 0:0 x"})
	mounts, _ := os.ReadFile("/proc/self/mounts")
	if i := strings.Index(string(mounts), root+"/run/secrets tmpfs rw,nosuid,nodev,noexec"); i < 0 {
		t.Errorf("mounts:\n%s", mounts)
	}
	unmountAll(t, root)
	wantLooks(t, root, map[string]string{"run/secrets/db": "none"})

	// Where an init follows there is a /run, which it then leaves alone.
	if err := Apply(p, Options{Root: root, Run: runIn(root), Init: true}); err != nil {
		t.Fatal(err)
	}
	mounts, _ = os.ReadFile("/proc/self/mounts")
	if !strings.Contains(string(mounts), root+"/run tmpfs") {
		t.Errorf("mounts:\n%s", mounts)
	}
	wantLooks(t, root, map[string]string{"run/secrets/db": "0400 0:0 a$b`\n", "run/image": "none"})
}

func TestMounts(t *testing.T) {
	root := busyboxRoot(t, map[string]string{"src/file": "x", "src/dir/y": "y"})
	p := &agentv1.Provision{Mounts: []*agentv1.FileSystemMount{
		{Source: "tmpfs", Path: "/new/dir", Type: "tmpfs", Options: "defaults,size=1m,mode=0700,noexec,x-systemd.automount"},
		{Source: "/src", Path: "/bound", Options: "bind,ro"},
		{Source: "/src/file", Path: "/bound-file", Type: "none", Options: "bind"},
		{Source: "/no/such", Path: "/no", Type: "ext4", Options: "nofail"},
		{Source: "/no/such", Path: "/auto", Type: "ext4", Options: "noauto"},
	}}
	var said bytes.Buffer
	if err := Apply(p, Options{Root: root, Output: func(p []byte) { said.Write(p) }}); err != nil {
		t.Fatal(err)
	}
	wantLooks(t, root, map[string]string{"new/dir": "dir 0700 0:0", "bound/dir/y": "0644 0:0 y", "bound-file": "0644 0:0 x", "auto": "none"})
	if err := os.WriteFile(filepath.Join(root, "bound/new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to a read-only mount: %v", err)
	}
	if !strings.Contains(said.String(), `mount "/no"`) {
		t.Errorf("said %q", said.String())
	}
}

func TestAVersionIsWrittenAsThePackageManagerHasIt(t *testing.T) {
	root := busyboxRoot(t, map[string]string{"usr/bin/dnf": "#!/bin/sh\necho $*\n", "usr/sbin/": "", "dev/null": ""})
	os.Chmod(root+"/usr/bin/dnf", 0o755)
	var said bytes.Buffer
	p := &agentv1.Provision{First: true, Packages: &agentv1.Packages{Names: []string{"curl=8.6.0-3.fc40", "ssh"}}}
	if err := Apply(p, Options{Root: root, Run: runIn(root), Output: func(p []byte) { said.Write(p) }}); err != nil {
		t.Fatal(err, said.String())
	}
	if got := said.String(); got != "-y install -- curl-8.6.0-3.fc40 ssh\n" {
		t.Errorf("got %q", got)
	}
}

func TestPackages(t *testing.T) {
	log := "#!/bin/sh\nread x && echo stdin; echo \"$0 $* $DEBIAN_FRONTEND\"; /usr/sbin/policy-rc.d; echo $?\n"
	root := busyboxRoot(t, map[string]string{
		"usr/bin/apt-get": log + "for p; do last=$p; done; case $last in ssh) echo key >/made; bin=/etc/ssh; busybox mkdir -p $bin;; nope) exit 100;; esac\n", "usr/sbin/": "", "dev/null": "",
	})
	os.Chmod(root+"/usr/bin/apt-get", 0o755)
	var said bytes.Buffer
	o := Options{Root: root, Run: runIn(root), Output: func(p []byte) { said.Write(p) }}
	p := &agentv1.Provision{First: true, Packages: &agentv1.Packages{Names: []string{"curl=1.2", "ssh"}, Upgrade: true},
		SshHostKeys: []*agentv1.SSHHostKey{{Type: "rsa", Private: []byte("x")}},
		Files:       []*agentv1.File{{Node: &agentv1.Node{Path: "/made"}, Append: inline("more"), Defer: true}}}
	if err := Apply(p, o); err != nil {
		t.Fatal(err, said.String())
	}
	const options = "-q -y -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold"
	const apt = "/usr/bin/apt-get "
	if got, want := said.String(), apt+"-q update noninteractive\n101\n"+apt+options+" dist-upgrade noninteractive\n101\n"+apt+options+" install -- curl=1.2 ssh noninteractive\n101\n"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	wantLooks(t, root, map[string]string{"usr/sbin/policy-rc.d": "none", "etc/ssh/ssh_host_rsa_key": "0600 0:0 x", "made": "0644 0:0 key\nmore"})

	err := Apply(&agentv1.Provision{First: true, Packages: &agentv1.Packages{Names: []string{"nope"}}}, o)
	if err == nil || err.Error() != "packages: apt-get install: exit code 100" {
		t.Errorf("got %v", err)
	}
	wantLooks(t, root, map[string]string{"usr/sbin/policy-rc.d": "none"})
}
