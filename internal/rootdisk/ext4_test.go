package rootdisk

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestCreateScratchIsClean(t *testing.T) {
	const mib = 1 << 20
	for _, size := range []int64{
		MinScratch, MinScratch + 4097, 100 * mib, 128*mib + 8192, 130 * mib, 511 * mib, 512 * mib, 1 << 30, 10 << 30, 64<<30 + 12345, 2 << 40,
	} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "scratch")
			start := time.Now()
			if err := CreateScratch(path, size); err != nil {
				t.Fatal(err)
			}
			took := time.Since(start)
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			allocated := st.Sys().(*syscall.Stat_t).Blocks * 512
			t.Logf("%d bytes: %v, %d KiB allocated", size, took, allocated>>10)
			if st.Size() != size || allocated > mib {
				t.Errorf("size %d, allocated %d", st.Size(), allocated)
			}
			if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
		})
	}
}

func TestCreateScratchRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "scratch")
	for _, size := range []int64{-1, 0, MinScratch - 1, MaxScratch + 1} {
		if err := CreateScratch(path, size); !errdefs.IsInvalidArgument(err) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	if err := CreateScratch(filepath.Join(path, "none"), MinScratch); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
	if err := CreateScratch(path, MinScratch); err != nil {
		t.Fatal(err)
	}
	if err := CreateScratch(path, MinScratch); !errdefs.IsAlreadyExists(err) {
		t.Errorf("twice: %v", err)
	}
}

// The kernel must agree with our group flags: it derives bitmaps of uninitialised groups when it first allocates in them.
func TestScratchFills(t *testing.T) {
	path := filepath.Join(t.TempDir(), "scratch")
	const size = 300 << 20
	if err := CreateScratch(path, size); err != nil {
		t.Fatal(err)
	}
	dir := mountLoop(t, path, "ext4", "rw")
	block := make([]byte, 1<<20)
	rand.Read(block)
	var files int
	for ; ; files++ {
		err := os.WriteFile(filepath.Join(dir, fmt.Sprint(files)), block, 0o600)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if files < 270 {
		t.Errorf("only %d MiB fit", files)
	}
	umount(t, dir)
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck after filling: %v\n%s", err, out)
	}
	dir = mountLoop(t, path, "ext4", "ro")
	for i := range files {
		got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i)))
		if err != nil || !bytes.Equal(got, block) {
			t.Fatalf("file %d: %v, equal %v", i, err, bytes.Equal(got, block))
		}
	}
}

// mountLoop mounts an image file for the length of the test.
func mountLoop(t *testing.T, path, fsType, mode string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil || !strings.Contains(string(known), fsType) {
		t.Skipf("no loop devices (%v) or the kernel does not know %s", err, fsType)
	}
	dir := t.TempDir()
	out, err := exec.Command("mount", "-t", fsType, "-o", "loop,"+mode, path, dir).CombinedOutput()
	if err != nil {
		log, _ := exec.Command("sh", "-c", "dmesg | tail -3").Output()
		t.Fatalf("mount: %v\n%s%s", err, out, log)
	}
	t.Cleanup(func() { exec.Command("umount", dir).Run() })
	return dir
}

func umount(t *testing.T, dir string) {
	t.Helper()
	if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v\n%s", err, out)
	}
}
