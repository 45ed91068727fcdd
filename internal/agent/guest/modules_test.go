package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel's modprobe is a path of its own, which no process's end gives to another.
func TestProgramIsShownOnce(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	path := filepath.Join(t.TempDir(), "dir", "agent")
	t.Cleanup(func() { unix.Unmount(filepath.Dir(path), unix.MNT_DETACH) })
	for range 2 { // the second life finds it
		if err := showProgram(path); err != nil {
			t.Fatal(err)
		}
	}
	mine, _ := os.Stat("/proc/self/exe")
	there, err := os.Lstat(path)
	if err != nil || mine.Size() != there.Size() || there.Mode() != 0o500 {
		t.Errorf("%v, %v", there, err)
	}
	if dir, err := os.Stat(filepath.Dir(path)); err != nil || dir.Mode().Perm() != 0o700 {
		t.Errorf("its directory: %v, %v", dir, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if n := strings.Count(string(mounts), " "+filepath.Dir(path)+" "); n != 1 {
		t.Errorf("%d mounts, %v", n, err)
	}
}
