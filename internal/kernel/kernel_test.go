package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/pierrec/lz4/v4"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/state"
)

func open(t *testing.T) *Store {
	t.Helper()
	dir := t.TempDir()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	s, err := Open(Options{Dir: filepath.Join(dir, "kernels"), Cache: cacheDir(t), DB: db, Events: event.New(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cacheDir keeps packages from one test run to the next.
func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("ATOLL_TEST_CACHE"); dir != "" {
		return filepath.Join(dir, "debian")
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return t.TempDir()
	}
	return filepath.Join(dir, "atoll-test", "debian")
}

// tinyELF is as little of an ELF as is still a kernel to us: one note segment and a version string.
func tinyELF(note string) []byte {
	le := binary.LittleEndian
	b := make([]byte, 64+56)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)    // ET_EXEC
	le.PutUint16(b[18:], 0x3e) // EM_X86_64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[32:], 64) // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint16(b[58:], 64)
	notes := le.AppendUint32(nil, 4)
	notes = le.AppendUint32(notes, 8)
	notes = le.AppendUint32(notes, 18)
	notes = append(notes, note+"\x00abcdefgh"...)
	le.PutUint32(b[64:], 4) // PT_NOTE
	le.PutUint64(b[64+8:], uint64(len(b)))
	le.PutUint64(b[64+32:], uint64(len(notes)))
	b = append(b, notes...)
	return append(b, "Linux version %s\x00Linux version 6.1.2-tiny (me) #1\x00"...)
}

func bzImage(payload []byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	b[0x1f1] = 1
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x20f)
	le.PutUint32(b[0x24c:], uint32(len(payload)))
	return append(b, payload...)
}

func lz4Legacy(t *testing.T, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := lz4.NewWriter(&out)
	if err := w.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(data)))
}

func TestImport(t *testing.T) {
	good := tinyELF("Xen")
	packed := lz4Legacy(t, good)
	for name, tc := range map[string]struct {
		data []byte
		says string // of the error; empty: none
	}{
		"an ELF":                   {good, ""},
		"a bzImage":                {bzImage(packed), ""},
		"an arm64 Image":           {append(append(make([]byte, 56), "ARM\x64"...), "\x00\x00\x00\x00Linux version 6.1.2-tiny (me)"...), ""},
		"an ELF without PVH":       {tinyELF("GNU"), "no PVH entry"},
		"a cut ELF":                {good[:70], "damaged ELF"},
		"a bzImage, cut":           {bzImage(packed)[:500], "no kernel"},
		"a bzImage, payload cut":   {bzImage(packed)[:1024+len(packed)/2], "before the file does"},
		"a bzImage, bad payload":   {bzImage(append(bytes.Clone(packed[:8]), make([]byte, 40)...)), "unpacking the bzImage"},
		"a text":                   {[]byte("hello"), "neither an ELF nor a bzImage"},
		"nothing":                  {nil, "neither an ELF nor a bzImage"},
		"an ELF of something else": {bytes.Replace(good, []byte("Linux"), []byte("Minix"), 2), "no version string"},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			path := filepath.Join(t.TempDir(), "file")
			os.WriteFile(path, tc.data, 0o644)
			k, err := s.Import(t.Context(), path, "mine")
			if tc.says == "" {
				if err != nil || k.Version != "6.1.2-tiny" || k.Default != (k.Arch == runtime.GOARCH) || !k.NeedsACPI {
					t.Fatalf("%+v, %v", k, err)
				}
				if data, err := os.ReadFile(k.Path); err != nil || !bytes.Contains(data, []byte("6.1.2-tiny")) {
					t.Errorf("the stored file: %v", err)
				}
				return
			}
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v", err)
			}
			if left, _ := os.ReadDir(s.opts.Dir); len(left) > 0 {
				t.Error("left behind:", left)
			}
		})
	}
}

func TestImportRefuses(t *testing.T) {
	s := open(t)
	path := filepath.Join(t.TempDir(), "file")
	os.WriteFile(path, tinyELF("Xen"), 0o644)
	for _, name := range []string{"", "../x", ".tmp-1", "a/b", strings.Repeat("a", 300)} {
		if _, err := s.Import(t.Context(), path, name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if _, err := s.Import(t.Context(), path+"x", "a"); !errdefs.IsNotFound(err) {
		t.Errorf("no such file: %v", err)
	}
	if _, err := s.Import(t.Context(), filepath.Dir(path), "a"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a directory: %v", err)
	}
	if _, err := s.Import(t.Context(), path, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Import(t.Context(), path, "a"); !errdefs.IsAlreadyExists(err) || hint.Of(err) == "" {
		t.Errorf("a name in use: %v", err)
	}
}

func TestDefaultAndRemove(t *testing.T) {
	s := open(t)
	if _, err := s.Get(""); !errdefs.IsNotFound(err) || !strings.Contains(hint.Of(err), "kernel pull") {
		t.Errorf("an empty store: %v", err)
	}
	path := filepath.Join(t.TempDir(), "file")
	os.WriteFile(path, tinyELF("Xen"), 0o644)
	for _, name := range []string{"one", "two"} {
		if _, err := s.Import(t.Context(), path, name); err != nil {
			t.Fatal(err)
		}
	}
	if k, err := s.Get(""); err != nil || k.Name != "one" {
		t.Errorf("the first is not the default: %+v %v", k, err)
	}
	if err := s.Remove(t.Context(), "one"); !errdefs.IsFailedPrecondition(err) || hint.Of(err) == "" {
		t.Errorf("removing the default: %v", err)
	}
	if err := s.SetDefault(t.Context(), "three"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := s.SetDefault(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(t.TempDir(), "arm")
	os.WriteFile(foreign, append(append(make([]byte, 56), "ARM\x64"...), "\x00\x00\x00\x00Linux version 6.1.2-tiny (me)"...), 0o644)
	if _, err := s.Import(t.Context(), foreign, "arm"); err != nil {
		t.Fatal(err)
	}
	if err := s.SetDefault(t.Context(), "arm"); runtime.GOARCH != "arm64" && !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a kernel of another architecture as the default: %v", err)
	}
	s.SetInUse(func(name string) []string { return map[string][]string{"arm": {"web", "db"}}[name] })
	if err := s.Remove(t.Context(), "arm"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "web, db") || hint.Of(err) == "" {
		t.Errorf("removing what machines use: %v", err)
	}
	s.SetInUse(func(string) []string { return nil })
	if err := s.Remove(t.Context(), "arm"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "../kernels"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	list, err := s.List()
	if err != nil || len(list) != 1 || list[0].Name != "two" || !list[0].Default {
		t.Errorf("%+v %v", list, err)
	}
	if err := s.Remove(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(s.opts.Dir); len(left) > 0 {
		t.Error("left behind:", left)
	}
}

func TestOpenRemovesLeftovers(t *testing.T) {
	s := open(t)
	left := filepath.Join(s.opts.Dir, tempPrefix+"1", "sub")
	os.MkdirAll(left, 0o755)
	if _, err := Open(s.opts); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Dir(left)); !os.IsNotExist(err) {
		t.Error("still there")
	}
}

// pull gets the real kernel, once per test binary as far as the package is concerned.
func pull(t *testing.T, s *Store) Kernel {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	k, err := s.Pull(ctx, PullOptions{Arch: "amd64"})
	if errdefs.IsUnavailable(err) {
		t.Skipf("no Debian mirror: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestPulledKernelBootsAndLoadsItsModules(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal("no QEMU: apt install qemu-system-x86:", err)
	}
	init := filepath.Join(t.TempDir(), "init")
	build := exec.Command("go", "build", "-o", init, "./testdata/guestinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the guest's init: %v\n%s", err, out)
	}
	binary, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}

	s := open(t)
	began := time.Now()
	k := pull(t, s)
	t.Logf("pulled in %s: %s", time.Since(began).Round(time.Millisecond), k.Name)
	if !strings.HasPrefix(k.Name, "debian-6.1.") || !k.Default || !k.NeedsACPI || k.Arch != "amd64" || k.ConfigDigest == "" || "debian-"+k.Version != k.Name {
		t.Errorf("%+v", k)
	}
	if again := pull(t, s); cmp.Diff(k, again) != "" {
		t.Error("the second pull brought something else:", cmp.Diff(k, again))
	}

	agent := Agent{ID: "test", Binary: binary}
	initramfs, err := s.Initramfs(t.Context(), k, agent)
	if err != nil {
		t.Fatal(err)
	}
	// The binary is not needed any more, nor read.
	cached := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			if again, err := s.Initramfs(t.Context(), k, Agent{ID: "test"}); err != nil || again != initramfs {
				b.Fatal(again, err)
			}
		}
	})
	if d := time.Duration(cached.NsPerOp()); d > time.Millisecond {
		t.Errorf("a cached initramfs takes %s", d)
	}
	if other, err := s.Initramfs(t.Context(), k, Agent{ID: "other", Binary: binary}); err != nil || other == initramfs {
		t.Error("another agent got the same initramfs", err)
	}

	disk := filepath.Join(t.TempDir(), "disk")
	os.WriteFile(disk, make([]byte, 1<<20), 0o644)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// No tick of the PIT reaches a kernel that uses ACPI here: without tsc_early_khz it hangs whenever a busy host makes it fail to
	// calibrate the TSC, and with nolapic_timer no timer ever fires. What the frequency is does not matter to this test.
	cmd := exec.CommandContext(ctx, qemu, "-M", "microvm", "-accel", "tcg", "-cpu", "max,-erms,-fsrm", "-m", "256", "-smp", "1",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio", "-kernel", k.Path, "-initrd", initramfs,
		"-append", k.Args+" console=ttyS0 reboot=t panic=-1 no_timer_check noreplace-smp tsc_early_khz=2500000",
		"-drive", "if=none,id=d0,format=raw,file="+disk, "-device", "virtio-blk-device,drive=d0",
		"-device", "virtio-serial-device", "-device", "virtio-rng-device",
		"-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-device,netdev=n0")
	console, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, console)
	}
	t.Logf("%s", console)
	text := string(console)
	if !strings.Contains(text, "DONE") || strings.Contains(text, "FAILED") {
		t.Fatal("the guest did not load all modules")
	}
	_, text, _ = strings.Cut(text, "MODULES")
	for _, m := range k.Modules {
		if !strings.Contains(text, "\n"+m+" ") {
			t.Errorf("module %s is not loaded", m)
		}
	}
	if strings.Contains(text, "\ndm_verity ") || !strings.Contains(text, "verity/") || !slices.Contains(k.Features[Verity], "dm_verity") {
		t.Errorf("modules on demand: loaded, or not there: %q", k.Features)
	}
	for _, fs := range []string{"erofs", "overlay", "ext4"} {
		if !strings.Contains(text, "\t"+fs) {
			t.Errorf("file system %s is missing", fs)
		}
	}
	for _, driver := range []string{"virtio_blk", "virtio_console", "virtio_net", "virtio_rng"} {
		if !strings.Contains(text, "/drivers/"+driver+"/virtio") {
			t.Errorf("driver %s has no device", driver)
		}
	}
}

func TestPullRefuses(t *testing.T) {
	s := open(t)
	if _, err := s.Pull(t.Context(), PullOptions{Name: "plan9"}); !errdefs.IsNotFound(err) || hint.Of(err) == "" {
		t.Error(err)
	}
	if _, err := s.Pull(t.Context(), PullOptions{Arch: "vax"}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := s.Pull(t.Context(), PullOptions{Mirror: "http://127.0.0.1:1/debian"}); !errdefs.IsUnavailable(err) || hint.Of(err) == "" {
		t.Error(err)
	}
}

func TestConfigDecides(t *testing.T) {
	built, err := parseConfig(strings.NewReader("CONFIG_VIRTIO_MMIO=y\nCONFIG_VIRTIO_CONSOLE=y\nCONFIG_VIRTIO_BLK=y\nCONFIG_VIRTIO_NET=y\n" +
		"CONFIG_EROFS_FS=y\nCONFIG_OVERLAY_FS=y\nCONFIG_EXT4_FS=y\n# CONFIG_VIRTIO_VSOCKETS is not set\n"))
	if err != nil {
		t.Fatal(err)
	}
	if order, err := loadOrder(built, nil, wanted); err != nil || len(order) > 0 {
		t.Errorf("everything built in: %v %v", order, err)
	}
	delete(built, "EROFS_FS")
	if _, err := loadOrder(built, nil, wanted); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "CONFIG_EROFS_FS") {
		t.Errorf("without erofs: %v", err)
	}
	built["EROFS_FS"] = "m"
	if _, err := loadOrder(built, map[string]string{}, wanted); !errdefs.IsNotFound(err) {
		t.Errorf("with a module that is not there: %v", err)
	}
}

func TestFeatures(t *testing.T) {
	c := config{"BLK_DEV_DM": "y", "DM_VERITY": "y", "FUSE_FS": "m", "VIRTIO_FS": "m", "NET_9P": "m"}
	if _, err := features(c, map[string]string{}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("with a module that is not there: %v", err)
	}
	if found, err := features(c, nil, nil); err != nil || found[VirtioFS] != nil {
		t.Errorf("of a kernel without modules: %v %v", found, err)
	}
	delete(c, "VIRTIO_FS")
	got, err := features(c, nil, nil)
	if diff := cmp.Diff(map[string][]string{Verity: nil, Init: nil}, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
	k := Kernel{Name: "k", Features: got, ConfigDigest: "sha256:x"}
	if err := k.Require(Verity); err != nil {
		t.Error(err)
	}
	if err := k.Require(NineP); !errdefs.IsFailedPrecondition(err) || hint.Of(err) == "" {
		t.Errorf("a feature it lacks: %v", err)
	}
	k.ConfigDigest, k.Features = "", nil
	if err := k.Require(NineP); err != nil {
		t.Errorf("a kernel of unknown configuration: %v", err)
	}
}
