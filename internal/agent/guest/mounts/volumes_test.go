package mounts

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountOptions(t *testing.T) {
	for _, c := range []struct {
		options string
		flags   uintptr
		data    string
	}{
		{"", 0, ""},
		{"noexec,nosuid,nodev", unix.MS_NOEXEC | unix.MS_NOSUID | unix.MS_NODEV, ""},
		{"nosuid,size=1m,exec,mode=700", unix.MS_NOSUID, "size=1m,mode=700"},
		{"ro,noexec,rw,exec", 0, ""}, // the last counts
		{"ro,noatime,uid=5,defaults", unix.MS_RDONLY | unix.MS_NOATIME, "uid=5"},
	} {
		flags, data := mountOptions(c.options)
		if flags != c.flags || strings.Join(data, ",") != c.data {
			t.Errorf("%q: %#x %q, want %#x %q", c.options, flags, data, c.flags, c.data)
		}
	}
}
