package provision

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"google.golang.org/protobuf/proto"
)

// TestHostileLinks has an image whose links lead out of it, by every way that a Provision writes.
func TestHostileLinks(t *testing.T) {
	outside := t.TempDir()
	for name, data := range map[string]string{"passwd": "outside\n", "keys": "outside\n", "bundle": "outside\n"} {
		if err := os.WriteFile(filepath.Join(outside, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	up := strings.Repeat("../", 20)
	root := accountsRoot(t, map[string]string{
		"etc/passwd": "→" + outside + "/passwd", "etc/skel/.profile": "none", "etc/skel/bin/x": "none", "etc/skel/link": "none", "etc/skel": "→" + outside,
		"srv": "→" + outside, "abs": "→" + outside + "/new", "rel": "→" + up + outside[1:], "loop": "→loop", "chain": "→chain2", "chain2": "→" + up + "chain3/x",
		"etc/ssl/certs/ca-certificates.crt": "→" + outside + "/bundle", "etc/ssh": "→" + up + outside[1:], "etc/sudoers.d": "→" + outside,
		"home": "→" + outside, "etc/localtime": "→" + outside + "/zone", "usr/share/zoneinfo/UTC": "TZif",
		"etc/systemd": "→" + outside, "usr/lib/systemd/systemd": "", "usr/local/share/ca-certificates": "→" + outside,
	})
	files := func(paths ...string) (all []*agentv1.File) {
		for _, p := range paths {
			all = append(all, &agentv1.File{Node: &agentv1.Node{Path: p, Overwrite: proto.Bool(true)}, Contents: inline("x")})
		}
		return all
	}
	for name, p := range map[string]*agentv1.Provision{
		"files":       {Files: files("/srv/a", "/abs/b", "/rel/c", "/chain/d", "/../../../e", "/srv/../srv/f")},
		"loop":        {Files: files("/loop/x")},
		"append":      {Files: []*agentv1.File{{Node: &agentv1.Node{Path: "/etc/passwd"}, Append: inline("x")}}},
		"directory":   {Directories: []*agentv1.Directory{{Node: &agentv1.Node{Path: "/srv/dir"}}, {Node: &agentv1.Node{Path: "/abs", Overwrite: proto.Bool(true)}}}},
		"links":       {Links: []*agentv1.Link{{Node: &agentv1.Node{Path: "/srv/link"}, Target: "x"}, {Node: &agentv1.Node{Path: "/hard"}, Target: "/etc/passwd", Hard: true}}},
		"users":       {Users: []*agentv1.User{{Name: "eve", SshAuthorizedKeys: []string{"key"}, Sudo: []string{"ALL=ALL"}}}},
		"user gone":   {Users: []*agentv1.User{{Name: "eve", Absent: true}}},
		"groups":      {Groups: []*agentv1.Group{{Name: "eve2"}}},
		"keys":        {SshHostKeys: []*agentv1.SSHHostKey{{Type: "rsa", Private: []byte("x"), Public: []byte("y")}}},
		"zone":        {Timezone: "UTC"},
		"locale":      {Locale: "C.UTF-8"},
		"authorities": {CaCertificates: [][]byte{[]byte(testCertificate)}},
		"units":       {Units: []*agentv1.Unit{{Name: "x.service", Contents: []byte("[Install]\nWantedBy=a.target\n"), Enabled: proto.Bool(true)}}},
	} {
		err := apply(t, root, p)
		if (err != nil) != (name == "loop" || name == "append") {
			t.Errorf("%s: %v", name, err)
		}
		entries, _ := os.ReadDir(outside)
		for _, e := range entries {
			if data, _ := os.ReadFile(filepath.Join(outside, e.Name())); string(data) != "outside\n" {
				t.Fatalf("%s: %s outside the root is now %q", name, e.Name(), data)
			}
		}
	}
	noLeftovers(t, root)
	// Inside the root, what a link leads to is what the path stands for.
	if got := look(t, root, filepath.Join(outside, "a")); got != "0644 0:0 x" {
		t.Errorf("where the link leads inside the root: %q", got)
	}
}

// TestUsersOwnLinks has a user who gets more keys, and had links made before: what only root may read does not become theirs, and nothing is
// written where they lead.
func TestUsersOwnLinks(t *testing.T) {
	for name, tc := range map[string]struct {
		lay  func(root string) error
		want string
	}{
		"file":      {func(root string) error { return os.Symlink("/etc/secret", root+"/home/ada/.ssh/authorized_keys") }, `"/home/ada/.ssh/authorized_keys": it is a symbolic link`},
		"hard link": {func(root string) error { return os.Link(root+"/etc/secret", root+"/home/ada/.ssh/authorized_keys") }, `"/home/ada/.ssh/authorized_keys": it is a hard link`},
		"directory": {func(root string) error {
			return errors.Join(os.Remove(root+"/home/ada/.ssh"), os.Symlink("/root/.ssh", root+"/home/ada/.ssh"))
		}, `"/home/ada/.ssh": it is a symbolic link`},
	} {
		t.Run(name, func(t *testing.T) {
			root := accountsRoot(t, map[string]string{
				"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n", "etc/group": "root:x:0:\nada:x:1000:\n",
				"etc/secret": "s3cr3t", "root/.ssh/authorized_keys": "roots", "home/ada/.ssh/config": "x",
			})
			if err := errors.Join(os.Chmod(root+"/etc/secret", 0o600), os.Remove(root+"/home/ada/.ssh/config"), tc.lay(root)); err != nil {
				t.Fatal(err)
			}
			err := apply(t, root, &agentv1.Provision{Users: []*agentv1.User{{Name: "ada", SshAuthorizedKeys: []string{"key"}}}})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v", err)
			}
			wantLooks(t, root, map[string]string{"etc/secret": "0600 0:0 s3cr3t", "root/.ssh/authorized_keys": "0644 0:0 roots"})
			if data, _ := os.ReadFile(root + "/home/ada/.ssh/authorized_keys"); name == "file" && len(data) > 0 {
				t.Errorf("it holds %q", data)
			}
		})
	}
}

// TestUnitsNamesInInstall has a unit whose [Install] names a way out.
func TestUnitNamesInInstall(t *testing.T) {
	for _, install := range []string{"WantedBy=../../x.target", "Alias=/etc/x.service", "Also=../y.service", "WantedBy=%u.target", "WantedBy=x.conf", "Alias=x.service\x00"} {
		root := newRoot(t, map[string]string{"usr/lib/systemd/systemd": ""})
		err := apply(t, root, &agentv1.Provision{Units: []*agentv1.Unit{{Name: "a.service", Contents: []byte("[Install]\n" + install), Enabled: proto.Bool(true)}}})
		if err == nil || !strings.Contains(err.Error(), `systemd unit "a.service": `) {
			t.Errorf("%s: %v", install, err)
		}
	}
}

// TestRefused has every element with values that cannot be what anybody wants. The error names the element, and no secret.
func TestRefused(t *testing.T) {
	node := func(path string) *agentv1.Node { return &agentv1.Node{Path: path} }
	const secret = "s3cr3t"
	user := func(change func(*agentv1.User)) *agentv1.Provision {
		u := &agentv1.User{Name: "ann"}
		change(u)
		return &agentv1.Provision{Users: []*agentv1.User{u}}
	}
	for name, tc := range map[string]struct {
		p    *agentv1.Provision
		want string
	}{
		"user name":            {user(func(u *agentv1.User) { u.Name = "a:b" }), `user "a:b": not a name`},
		"user name of dots":    {user(func(u *agentv1.User) { u.Name = "../x" }), `not a name`},
		"user name of digits":  {user(func(u *agentv1.User) { u.Name = "0ann" }), `not a name`},
		"user name with line":  {user(func(u *agentv1.User) { u.Name = "a\nroot2" }), `not a name`},
		"user name empty":      {user(func(u *agentv1.User) { u.Name = "" }), `user "": not a name`},
		"gecos":                {user(func(u *agentv1.User) { u.Gecos = "x:0:0" }), `its gecos has a colon`},
		"hash":                 {user(func(u *agentv1.User) { u.PasswordHash = proto.String(secret + "\nroot2:") }), `its password hash has`},
		"home":                 {user(func(u *agentv1.User) { u.Home = "home" }), `its home "home" is no absolute path`},
		"shell":                {user(func(u *agentv1.User) { u.Shell = "/bin/sh\n" }), `its shell has`},
		"key":                  {user(func(u *agentv1.User) { u.SshAuthorizedKeys = []string{"ok", secret + "\n" + secret} }), `its SSH key 2 is not one line`},
		"sudo":                 {user(func(u *agentv1.User) { u.Sudo = []string{"ALL=ALL\nbob ALL=ALL"} }), `its sudo rule 1`},
		"sudo going on":        {user(func(u *agentv1.User) { u.Sudo = []string{`ALL=ALL \`} }), `its sudo rule 1`},
		"group not there":      {user(func(u *agentv1.User) { u.Groups = []string{"nope"} }), `its group "nope" is not in /etc/group`},
		"primary group":        {user(func(u *agentv1.User) { u.PrimaryGroup = "nope" }), `"nope" is not in /etc/group`},
		"uid taken":            {user(func(u *agentv1.User) { u.Uid = proto.Uint32(0) }), `its number 0 is that of the user "root"`},
		"uid nobody":           {user(func(u *agentv1.User) { u.Uid = proto.Uint32(1<<32 - 1) }), `means nobody`},
		"group of that name":   {user(func(u *agentv1.User) { u.Name = "docker" }), `there is a group of that name already`},
		"root gone":            {user(func(u *agentv1.User) { u.Name, u.Absent = "root", true }), `root cannot be removed`},
		"group name":           {&agentv1.Provision{Groups: []*agentv1.Group{{Name: "a b"}}}, `group "a b": not a name`},
		"gid taken":            {&agentv1.Provision{Groups: []*agentv1.Group{{Name: "a", Gid: proto.Uint32(998)}}}, `that of the group "docker"`},
		"group in use":         {&agentv1.Provision{Groups: []*agentv1.Group{{Name: "old", Absent: true}}}, `primary group of the user "old"`},
		"relative path":        {&agentv1.Provision{Files: []*agentv1.File{{Node: node("etc/x")}}}, `file "etc/x": "etc/x" is no absolute path`},
		"no path":              {&agentv1.Provision{Directories: []*agentv1.Directory{{}}}, `directory ""`},
		"path with zero":       {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/a\x00b")}}}, `no absolute path`},
		"below a file":         {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/etc/passwd/x")}}}, `file "/etc/passwd/x": its directory "/etc/passwd/": not a directory`},
		"the root as a file":   {&agentv1.Provision{Files: []*agentv1.File{{Node: &agentv1.Node{Path: "/", Overwrite: proto.Bool(true)}}}}, `file "/": the root directory itself`},
		"the root anew":        {&agentv1.Provision{Directories: []*agentv1.Directory{{Node: &agentv1.Node{Path: "/", Overwrite: proto.Bool(true)}}}}, `the root directory itself`},
		"a file there":         {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/etc/passwd"), Contents: inline(secret)}}}, `file "/etc/passwd": there is a file already`},
		"a file is empty":      {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/etc/passwd"), HasContents: true}}}, `there is a file already`},
		"a file on a link":     {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/link")}}}, `no regular file`},
		"a directory there":    {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/etc")}}}, `no regular file`},
		"a file, no directory": {&agentv1.Provision{Directories: []*agentv1.Directory{{Node: node("/etc/passwd")}}}, `directory "/etc/passwd": there is something else`},
		"one place twice":      {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/lib/x")}, {Node: node("/usr/lib/x")}}}, `"/lib/x" leads to the same place`},
		"file owner":           {&agentv1.Provision{Files: []*agentv1.File{{Node: &agentv1.Node{Path: "/x", User: &agentv1.Owner{Name: "nope"}}}}}, `file "/x": its user: "nope" is not in /etc/passwd`},
		"nothing streamed":     {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/x"), Contents: []*agentv1.Piece{streamed(5)}}}}, `file "/x": receiving its contents, 5 bytes before their end`},
		"a strange piece":      {&agentv1.Provision{Files: []*agentv1.File{{Node: node("/x"), Contents: []*agentv1.Piece{{}}}}}, `neither inline nor streamed`},
		"link there":           {&agentv1.Provision{Links: []*agentv1.Link{{Node: node("/lib"), Target: "other"}}}, `a link to something else`},
		"link on a file":       {&agentv1.Provision{Links: []*agentv1.Link{{Node: node("/etc/passwd"), Target: "other"}}}, `something that is no link`},
		"link to nothing":      {&agentv1.Provision{Links: []*agentv1.Link{{Node: node("/x")}}}, `it has no target`},
		"hard link to nothing": {&agentv1.Provision{Links: []*agentv1.Link{{Node: node("/x"), Target: "/no/such", Hard: true}}}, `its target "/no/such"`},
		"hard link elsewhere":  {&agentv1.Provision{Links: []*agentv1.Link{{Node: node("/etc/passwd"), Target: "/etc/group", Hard: true}}}, `something else than its target`},
		"no systemd":           {&agentv1.Provision{Units: []*agentv1.Unit{{Name: "x.service"}}}, `systemd unit "x.service": the image has no systemd (systemd.units`},
		"host key":             {&agentv1.Provision{SshHostKeys: []*agentv1.SSHHostKey{{Type: "../x", Private: []byte(secret)}}}, `SSH host key "../x": not a type`},
		"zone":                 {&agentv1.Provision{Timezone: "../../etc/passwd"}, `timezone "../../etc/passwd": not a name`},
		"zone not there":       {&agentv1.Provision{Timezone: "Europe/Berlin"}, `timezone "Europe/Berlin": the image does not have it`},
		"locale":               {&agentv1.Provision{Locale: "de_DE; rm"}, `locale "de_DE; rm": not a name`},
		"locale not there":     {&agentv1.Provision{Locale: "de_DE.UTF-8"}, `no localedef to make it; C.UTF-8 is always there`},
		"authority":            {&agentv1.Provision{CaCertificates: [][]byte{[]byte(testCertificate), []byte(secret)}}, `certificate authority 2: there is no certificate in PEM`},
		"secret's name":        {&agentv1.Provision{Secrets: []*agentv1.Secret{{Name: "../x", Data: []byte(secret)}}}, `secret "../x": not a name`},
		"secret's owner":       {&agentv1.Provision{Secrets: []*agentv1.Secret{{Name: "x", Data: []byte(secret), User: &agentv1.Owner{Name: "nope"}}}}, `secret "x": its user`},
		"mount point":          {&agentv1.Provision{Mounts: []*agentv1.FileSystemMount{{Source: "tmpfs", Path: "x", Type: "tmpfs"}}}, `mount "x": "x" is no absolute path`},
		"mount of nothing":     {&agentv1.Provision{Mounts: []*agentv1.FileSystemMount{{Source: "/no/such", Path: "/mnt", Type: "ext4"}}}, `mount "/mnt": mounting /no/such: `},
		"unknown file system":  {&agentv1.Provision{Mounts: []*agentv1.FileSystemMount{{Source: "x", Path: "/mnt", Type: "nosuchfs"}}}, `no file system "nosuchfs"`},
		"mount by label":       {&agentv1.Provision{Mounts: []*agentv1.FileSystemMount{{Source: "LABEL=no-such", Path: "/mnt"}}}, `LABEL=no-such`},
		"bind of nothing":      {&agentv1.Provision{Mounts: []*agentv1.FileSystemMount{{Source: "/no/such", Path: "/mnt", Options: "bind"}}}, `its source "/no/such"`},
		"package":              {&agentv1.Provision{Packages: &agentv1.Packages{Names: []string{"--option"}}}, `package "--option": not a name`},
		"package manager":      {&agentv1.Provision{Packages: &agentv1.Packages{Names: []string{"x"}}}, `no package manager`},
		"command":              {&agentv1.Provision{Commands: []*agentv1.Command{{Name: "c", Argv: []string{"x"}}}}, `c: nothing can be run`},
	} {
		t.Run(name, func(t *testing.T) {
			root := accountsRoot(t, map[string]string{"usr/lib/": "", "lib": "→usr/lib", "link": "→nowhere", "mnt/": "", "etc/ssh/": ""})
			before := look(t, root, "etc/passwd") + look(t, root, "etc/shadow") + look(t, root, "etc/group")
			err := apply(t, root, tc.p)
			unmountAll(t, root)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %s", err, tc.want)
			}
			if strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), root) {
				t.Errorf("says too much: %v", err)
			}
			if after := look(t, root, "etc/passwd") + look(t, root, "etc/shadow") + look(t, root, "etc/group"); after != before {
				t.Errorf("half an account: %q", after)
			}
			noLeftovers(t, root)
		})
	}
}

func TestContentsHaveTheirSizes(t *testing.T) {
	for _, sent := range [][]string{{"123"}, {"12345"}, {"1234567"}, nil} {
		root := newRoot(t, nil)
		err := apply(t, root, &agentv1.Provision{Files: []*agentv1.File{{Node: &agentv1.Node{Path: "/x"}, Contents: []*agentv1.Piece{streamed(4)}}}}, sent...)
		if err == nil || !strings.HasPrefix(err.Error(), `file "/x": `) || look(t, root, "x") != "none" {
			t.Errorf("%q: got %v, file %s", sent, err, look(t, root, "x"))
		}
		noLeftovers(t, root)
	}
}
