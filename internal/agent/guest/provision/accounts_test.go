package provision

import (
	"os"
	"path/filepath"
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

func TestUsersChangeAndGo(t *testing.T) {
	root := accountsRoot(t, map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/bash\nold:x:1003:1003:Old:/home/old:/bin/sh\ngone:x:1004:1004::/home/gone:/bin/sh\nlib:x:1005:1005::/usr/lib:/bin/sh\nplain:hash:1006:100::/home/plain:/bin/sh\n",
		"etc/group":  "root:x:0:\nusers:x:100:gone\ngone:x:1004:\nold:x:1003:old,gone\nlib:x:1005:x\nunused:x:7:\n", "etc/gshadow": "none",
		"usr/lib/x": "x", "home/old/x": "x", "home/old/.ssh/authorized_keys": "have", "home/gone/x": "x", "var/mail/gone": "mail", "etc/sudoers.d/90-atoll-gone": "gone ALL=ALL\n",
	})
	for _, p := range []string{"home/old", "home/old/x", "home/gone"} {
		if err := os.Chown(filepath.Join(root, p), map[bool]int{true: 1004, false: 1003}[p == "home/gone"], 1003); err != nil {
			t.Fatal(err)
		}
	}
	mustApply(t, root, &agentv1.Provision{
		Groups: []*agentv1.Group{{Name: "unused", Absent: true}, {Name: "nope", Absent: true}, {Name: "old", Gid: proto.Uint32(3000)}, {Name: "users"}},
		Users: []*agentv1.User{
			{Name: "old", Uid: proto.Uint32(2000), Home: "/srv/homes/old", SshAuthorizedKeys: []string{"have", "new"}, PasswordHash: proto.String("")},
			{Name: "gone", Absent: true},
			{Name: "lib", Absent: true},
			{Name: "plain", LockPassword: true},
		},
	})
	for name, want := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/bash\nold:x:2000:3000:Old:/srv/homes/old:/bin/sh\nplain:x:1006:100::/home/plain:/bin/sh\n",
		"etc/group":  "root:x:0:\nusers:x:100:\nold:x:3000:old\nlib:x:1005:x\n",
		"etc/shadow": "root:*:19000:0:99999:7:::\ndaemon:*:19000::::::\nold:*:19000:0:99999:7:::\nplain:!hash:DAYS:0:99999:7:::\n",
	} {
		if got := read(t, root, name); got != want {
			t.Errorf("%s:\ngot\n%swant\n%s", name, got, want)
		}
	}
	wantLooks(t, root, map[string]string{
		"home/old": "none", "srv/homes/old": "dir 0755 2000:1003", "srv/homes/old/x": "0644 2000:1003 x", "srv/homes/old/.ssh/authorized_keys": "0600 2000:3000 have\nnew\n",
		"home/gone": "none", "var/mail/gone": "none", "etc/sudoers.d/90-atoll-gone": "none", "usr/lib/x": "0644 0:0 x", "etc/gshadow": "none",
	})
}

// TestNoAccounts has an image without any of the files.
func TestNoAccounts(t *testing.T) {
	root := newRoot(t, nil)
	mustApply(t, root, &agentv1.Provision{Users: []*agentv1.User{{Name: "app", PasswordHash: proto.String("$6$x")}}})
	for name, want := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n", "etc/group": "root:x:0:\napp:x:1000:\n", "etc/shadow": "app:$6$x:DAYS::::::\n",
	} {
		if got := read(t, root, name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	if got := look(t, root, "etc/shadow"); !strings.HasPrefix(got, "0600 0:0 ") {
		t.Errorf("shadow is %q", got)
	}
	wantLooks(t, root, map[string]string{"home/app": "dir 0755 1000:1000", "etc/gshadow": "none"})
}
