package container

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMakeTarget(t *testing.T) {
	dir := t.TempDir()
	for link, to := range map[string]string{
		"absolute": dir + "/not/there", "relative": "a/../b", "loop": dir + "/loop/x", "up": "../../../../../../../../" + dir + "/over",
	} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		"plain/dir": "plain/dir", "absolute/x": "not/there/x", "relative/x": "b/x", "up": "over", "plain//./dir/../other": "plain/other",
	} {
		got, err := makeTarget(dir+"/"+path, true)
		if err != nil || got != filepath.Join(dir, want) {
			t.Errorf("%s: %q, %v", path, got, err)
			continue
		}
		if info, err := os.Lstat(got); err != nil || !info.IsDir() {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	if got, err := makeTarget(dir+"/absolute/file", false); err != nil || got != dir+"/not/there/file" {
		t.Errorf("a file: %q, %v", got, err)
	}
	if _, err := makeTarget(dir+"/loop", true); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a loop: %v", err)
	}
}
