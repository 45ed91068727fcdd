package provision

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"google.golang.org/protobuf/proto"
)

// newRoot makes a root of files, which are directories where their names end so, and links where their contents say so.
func newRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("owners are set: this needs root")
	}
	root := t.TempDir()
	for name, data := range files {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(data, "→"); ok {
			err = os.Symlink(target, file)
		} else if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(file, 0o755)
		} else {
			err = os.WriteFile(file, []byte(data), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func apply(t *testing.T, root string, p *agentv1.Provision, streamed ...string) error {
	t.Helper()
	p.First = true
	var b bytes.Buffer
	for _, s := range streamed {
		for len(s) > 3 {
			transport.WriteMsg(&b, &agentv1.Content{Data: []byte(s[:3])})
			s = s[3:]
		}
		transport.WriteMsg(&b, &agentv1.Content{Data: []byte(s), End: true})
	}
	return Apply(p, Options{Root: root, Contents: &b})
}

func mustApply(t *testing.T, root string, p *agentv1.Provision, streamed ...string) {
	t.Helper()
	if err := apply(t, root, p, streamed...); err != nil {
		t.Fatal(err)
	}
	noLeftovers(t, root)
}

func noLeftovers(t *testing.T, root string) {
	t.Helper()
	filepath.Walk(root, func(path string, _ os.FileInfo, _ error) error {
		if strings.HasPrefix(filepath.Base(path), ".atoll-") {
			t.Errorf("left behind: %s", path)
		}
		return nil
	})
}

// look describes a path: "mode uid:gid contents", or "→target".
func look(t *testing.T, root, name string) string {
	t.Helper()
	file := filepath.Join(root, name)
	st, err := os.Lstat(file)
	if err != nil {
		return "none"
	}
	sys := st.Sys().(*syscall.Stat_t)
	owner := " " + number(sys.Uid) + ":" + number(sys.Gid)
	switch {
	case st.Mode()&os.ModeSymlink != 0:
		target, _ := os.Readlink(file)
		return "→" + target + owner
	case st.IsDir():
		return "dir " + octal(sys.Mode) + owner
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return octal(sys.Mode) + owner + " " + string(data)
}

func octal(mode uint32) string {
	const digits = "01234567"
	mode &= 0o7777
	return string([]byte{digits[mode>>9], digits[mode>>6&7], digits[mode>>3&7], digits[mode&7]})
}

func wantLooks(t *testing.T, root string, want map[string]string) {
	t.Helper()
	for name, w := range want {
		if got := look(t, root, name); got != w {
			t.Errorf("%s: got %q, want %q", name, got, w)
		}
	}
}

func inline(s string) []*agentv1.Piece {
	return []*agentv1.Piece{{Kind: &agentv1.Piece_Inline{Inline: []byte(s)}}}
}

func streamed(n int) *agentv1.Piece {
	return &agentv1.Piece{Kind: &agentv1.Piece_Streamed{Streamed: uint64(n)}}
}

func TestNodes(t *testing.T) {
	root := newRoot(t, map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n", "etc/group": "root:x:0:\nstaff:x:50:\n",
		"etc/old": "old\n", "etc/motd": "hello\n", "data": "→/srv/data", "srv/there/x": "x", "usr/bin/tool": "tool", "dir/full/x": "x",
	})
	user, group := &agentv1.Owner{Name: "app"}, &agentv1.Owner{Name: "staff"}
	mustApply(t, root, &agentv1.Provision{
		Directories: []*agentv1.Directory{
			{Node: &agentv1.Node{Path: "/a/b/c", User: user, Group: group, Mode: proto.Uint32(0o2770)}},
			{Node: &agentv1.Node{Path: "/a", Mode: proto.Uint32(0o700)}},
			{Node: &agentv1.Node{Path: "/dir/full", Overwrite: proto.Bool(true)}},
			{Node: &agentv1.Node{Path: "/data/new"}},
		},
		Files: []*agentv1.File{
			{Node: &agentv1.Node{Path: "/etc/old", Overwrite: proto.Bool(true), Mode: proto.Uint32(0o4755), User: user}, Contents: inline("$new `q`\n\"")},
			{Node: &agentv1.Node{Path: "/etc/motd"}, Append: append(inline("and "), streamed(5))},
			{Node: &agentv1.Node{Path: "/new/dir/empty"}},
			{Node: &agentv1.Node{Path: "/new/late"}, Contents: []*agentv1.Piece{streamed(7), streamed(0)}, Defer: true},
			{Node: &agentv1.Node{Path: "/new/big"}, Contents: []*agentv1.Piece{streamed(10)}, Append: inline("!")},
			{Node: &agentv1.Node{Path: "/srv/there/x", Mode: proto.Uint32(0o600), Group: &agentv1.Owner{Id: proto.Uint32(7)}}},
		},
		Links: []*agentv1.Link{
			{Node: &agentv1.Node{Path: "/new/hard"}, Target: "/new/deep/er", Hard: true},
			{Node: &agentv1.Node{Path: "/new/deep/er", User: user}, Target: "nowhere"},
			{Node: &agentv1.Node{Path: "/usr/bin/tool", Overwrite: proto.Bool(true)}, Target: "../other"},
		},
	}, "again", "later..", "", "0123456789")
	wantLooks(t, root, map[string]string{
		"a": "dir 0700 0:0", "a/b": "dir 0755 0:0", "a/b/c": "dir 2770 1000:50", "dir/full": "dir 0755 0:0", "dir/full/x": "none", "srv/data/new": "dir 0755 0:0",
		"etc/old": "4755 1000:0 $new `q`\n\"", "etc/motd": "0644 0:0 hello\nand again", "new/dir/empty": "0644 0:0 ", "new/late": "0644 0:0 later..",
		"new/big": "0644 0:0 0123456789!", "srv/there/x": "0600 0:7 x", "new/deep/er": "→nowhere 1000:0", "new/hard": "→nowhere 1000:0", "usr/bin/tool": "→../other 0:0",
	})
}
