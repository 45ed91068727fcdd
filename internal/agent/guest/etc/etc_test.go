package etc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	os.WriteFile(outside, []byte("kept"), 0o644)
	os.Symlink(outside, filepath.Join(dir, "resolv.conf"))
	os.WriteFile(filepath.Join(dir, "hosts"), nil, 0o600)
	c := &agentv1.Config{
		Hostname: "box", DnsServers: []string{"10.0.0.1", "fd00::1"}, DnsSearch: []string{"a", "b"}, DnsOptions: []string{"ndots:2", "use-vc"},
		Hosts: []*agentv1.HostEntry{{Address: "10.0.0.2", Names: []string{"box", "box"}}, {Address: "10.0.0.3", Names: []string{"db", "data"}}},
	}
	for range 2 {
		if err := Write(dir, c); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if got := read("hostname"); got != "box\n" {
		t.Errorf("hostname %q", got)
	}
	if got, want := read("resolv.conf"), "nameserver 10.0.0.1\nnameserver fd00::1\nsearch a b\noptions ndots:2 use-vc\n"; got != want {
		t.Errorf("resolv.conf %q, want %q", got, want)
	}
	if got := read("hosts"); !strings.HasSuffix(got, "\n10.0.0.2\tbox\n10.0.0.3\tdb data\n") || !strings.HasPrefix(got, "127.0.0.1\tlocalhost\n") {
		t.Errorf("hosts %q", got)
	}
	if st, _ := os.Stat(filepath.Join(dir, "hosts")); st.Mode() != 0o600 {
		t.Errorf("the mode of hosts became %v", st.Mode())
	}
	if to, _ := os.Readlink(filepath.Join(dir, "mtab")); to != "/proc/mounts" {
		t.Errorf("mtab leads to %q", to)
	}
	if got, _ := os.ReadFile(outside); string(got) != "kept" {
		t.Errorf("wrote through a link: %q", got)
	}
	if left, _ := filepath.Glob(dir + "/.atoll-*"); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}
