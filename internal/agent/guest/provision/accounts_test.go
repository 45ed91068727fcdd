package provision

import (
	"regexp"
	"strings"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"google.golang.org/protobuf/proto"
)

// accountsRoot has what a distribution's image has.
func accountsRoot(t *testing.T, more map[string]string) string {
	files := map[string]string{
		"etc/passwd":        "root:x:0:0:root:/root:/bin/bash\n# a comment\ndaemon:x:1:1::/:/sbin/nologin\nold:x:1003:1003:Old:/home/old:/bin/sh\n+nis::::::\n",
		"etc/group":         "root:x:0:\nwheel:x:10:root,old\nusers:x:100:\ndocker:x:998:\nold:x:1003:\n",
		"etc/shadow":        "root:*:19000:0:99999:7:::\ndaemon:*:19000::::::\nold:$6$old:19000:0:99999:7:::\n",
		"etc/gshadow":       "root:*::\nwheel:*::root,old\ndocker:!::\nold:!::\n",
		"etc/subuid":        "old:100000:65536\n",
		"etc/subgid":        "",
		"etc/login.defs":    "# comment\nUID_MIN 1000\nPASS_MIN_DAYS\t0\nPASS_MAX_DAYS 99999\nPASS_WARN_AGE 7\nHOME_MODE 0700\n",
		"etc/skel/.profile": "PATH\n", "etc/skel/bin/x": "x", "etc/skel/link": "→.profile", "bin/bash": "",
	}
	for name, data := range more {
		files[name] = data
		if data == "none" {
			delete(files, name)
		}
	}
	return newRoot(t, files)
}

var days = regexp.MustCompile(`:2\d{4}:`) // since 1970, now

func read(t *testing.T, root, name string) string {
	t.Helper()
	_, text, _ := strings.Cut(look(t, root, name), " ")
	_, text, _ = strings.Cut(text, " ")
	return days.ReplaceAllString(text, ":DAYS:")
}

func TestUsers(t *testing.T) {
	root := accountsRoot(t, nil)
	mustApply(t, root, &agentv1.Provision{
		Groups: []*agentv1.Group{{Name: "team", Gid: proto.Uint32(2000)}, {Name: "sys", System: true}, {Name: "free", PasswordHash: proto.String("$1$x")}},
		Users: []*agentv1.User{
			{Name: "root", SshAuthorizedKeys: []string{"ssh-ed25519 AAAA root"}},
			{Name: "ann", Gecos: "Ann Ü", Groups: []string{"wheel", "team"}, PasswordHash: proto.String("$6$a$b/."), Sudo: []string{"ALL=(ALL) NOPASSWD:ALL", "ALL=(x) ALL"}},
			{Name: "b.o", Uid: proto.Uint32(1020), LockPassword: true, SshAuthorizedKeys: []string{"k1 \n", "k2", "k1"}, Sudo: []string{"ALL=ALL"}},
			{Name: "svc", System: true, NoCreateHome: true, Shell: "/sbin/nologin", Home: "/var/svc", PrimaryGroup: "team"},
			{Name: "locked", PasswordHash: proto.String("$6$x"), LockPassword: true, NoUserGroup: true},
			{Name: "old", Uid: proto.Uint32(1500), Groups: []string{"docker"}, Gecos: "New", LockPassword: true},
			{Name: "nobody-there", Absent: true},
		},
	})
	for name, want := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/bash\n# a comment\ndaemon:x:1:1::/:/sbin/nologin\nold:x:1500:1003:New:/home/old:/bin/sh\n+nis::::::\n" +
			"ann:x:1004:1004:Ann Ü:/home/ann:/bin/bash\nb.o:x:1020:1020::/home/b.o:/bin/bash\nsvc:x:999:2000::/var/svc:/sbin/nologin\nlocked:x:1021:100::/home/locked:/bin/bash\n",
		"etc/group":   "root:x:0:\nwheel:x:10:root,ann\nusers:x:100:\ndocker:x:998:old\nold:x:1003:\nteam:x:2000:ann\nsys:x:997:\nfree:x:2001:\nann:x:1004:\nb.o:x:1020:\n",
		"etc/gshadow": "root:*::\nwheel:*::root,ann\ndocker:!::old\nold:!::\nteam:!::ann\nsys:!::\nfree:$1$x::\nann:!::\nb.o:!::\n",
		"etc/shadow": "root:*:19000:0:99999:7:::\ndaemon:*:19000::::::\nold:!$6$old:19000:0:99999:7:::\nann:$6$a$b/.:DAYS:0:99999:7:::\n" +
			"b.o:*:DAYS:0:99999:7:::\nsvc:*:DAYS::::::\nlocked:!$6$x:DAYS:0:99999:7:::\n",
		"etc/subuid": "old:100000:65536\nann:165536:65536\nb.o:231072:65536\nlocked:296608:65536\n",
		"etc/subgid": "ann:100000:65536\nb.o:165536:65536\nlocked:231072:65536\n",
	} {
		if got := read(t, root, name); got != want {
			t.Errorf("%s:\ngot\n%swant\n%s", name, got, want)
		}
	}
	wantLooks(t, root, map[string]string{
		"home/ann": "dir 0700 1004:1004", "home/ann/.profile": "0644 1004:1004 PATH\n", "home/ann/bin/x": "0644 1004:1004 x", "home/ann/link": "→.profile 1004:1004",
		"home/b.o/.ssh": "dir 0700 1020:1020", "home/b.o/.ssh/authorized_keys": "0600 1020:1020 k1\nk2\n", "var/svc": "none",
		"root/.ssh": "dir 0700 0:0", "root/.ssh/authorized_keys": "0600 0:0 ssh-ed25519 AAAA root\n",
		"etc/sudoers.d/90-atoll-ann": "0440 0:0 ann ALL=(ALL) NOPASSWD:ALL\nann ALL=(x) ALL\n", "etc/sudoers.d/90-atoll-b=2eo": "0440 0:0 b.o ALL=ALL\n",
	})
}
