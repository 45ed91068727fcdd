package provision

import (
	"strings"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"google.golang.org/protobuf/proto"
)

// FuzzAccounts has images with files of accounts of any kind: what is no entry stays, and the new entries are where they are found.
func FuzzAccounts(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\n", "root:x:0:\n", "root:*:1:0:99999:7:::\n", "ann")
	f.Add("+::::::\n-x\n#c\n\n:x:0:0:::\na:b\nann:x:x:x:::\nann:::\n", "a\nann:x:9:ann,,ann\n", "ann:\n:::", "ann")
	f.Add("ann:x:4294967295:4294967295:::\x00\nb:x:60000:1:::\n", "g:x:4294967295:\r\n", "", "b")
	f.Fuzz(func(t *testing.T, passwd, group, shadow, name string) {
		for path, text := range map[string]string{passwdFile: passwd, groupFile: group, shadowFile: shadow} {
			table := parseTable(path, []byte(text))
			if got := string(table.bytes()); strings.TrimSuffix(got, "\n") != strings.TrimSuffix(text, "\n") {
				t.Fatalf("%s: %q became %q", path, text, got)
			}
		}
		a := &accounts{
			passwd: parseTable(passwdFile, []byte(passwd)), group: parseTable(groupFile, []byte(group)),
			shadow: parseTable(shadowFile, []byte(shadow)), gshadow: parseTable(gshadowFile, nil), defs: loginDefs{},
		}
		r := &Provisioner{Provision: &agentv1.Provision{}, root: &tree{-1}}
		before := strings.Count(passwd, "\n")
		u := &agentv1.User{Name: name, Gecos: "G", PasswordHash: proto.String("$6$h"), Shell: "/bin/sh", Home: "/h"}
		c, err := r.applyUser(a, u)
		if err != nil {
			return
		}
		e, s := a.passwd.find(name), a.shadow.find(name)
		if e == nil || s == nil || e[passwdShell] != "/bin/sh" || s[fieldPassword] != "$6$h" || e[fieldID] != number(c.uid) {
			t.Fatalf("got %q, %q", e, s)
		}
		if n := strings.Count(string(a.passwd.bytes()), "\n"); n > before+2 {
			t.Fatalf("%d lines became %d", before, n)
		}
		u.Absent = true
		if _, err := r.applyUser(a, u); err == nil && (a.passwd.find(name) != nil || a.shadow.find(name) != nil) {
			t.Fatal("still there")
		}
	})
}
