package diskimage

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kdomanski/iso9660"

	"github.com/atollvm/atoll/internal/hint"
)

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bootSector is the smallest raw disk that could boot.
func bootSector() []byte {
	b := make([]byte, 1<<20)
	b[510], b[511] = 0x55, 0xaa
	return b
}

// header is that of a qcow2 image of 1 GiB.
func header(change func(h []byte)) []byte {
	h := make([]byte, 1<<16)
	copy(h, qcow2Magic)
	binary.BigEndian.PutUint32(h[4:], 3)
	binary.BigEndian.PutUint32(h[20:], clusterBits)
	binary.BigEndian.PutUint64(h[24:], 1<<30)
	if change != nil {
		change(h)
	}
	return h
}

func TestOpen(t *testing.T) {
	raw, err := Open(write(t, "a.img", append(bootSector(), 1)))
	if err != nil || raw.Format != Raw || raw.Size != 1<<20+sector || !raw.Bootable {
		t.Errorf("raw: %+v, %v", raw, err)
	}
	if img, err := Open(write(t, "a.img", make([]byte, 4096))); err != nil || img.Bootable {
		t.Errorf("a raw image without a boot sector: %+v, %v", img, err)
	}
	if img, err := Open(write(t, "raw.img", header(nil))); err != nil || img.Format != QCOW2 || img.Size != 1<<30 {
		t.Errorf("qcow2: %+v, %v", img, err)
	}
}

// What would have QEMU read other files, or is a container that a guest would see as a disk's bytes.
func TestRefused(t *testing.T) {
	at := func(offset int, magic string) []byte {
		b := bootSector()
		copy(b[offset:], magic)
		return b
	}
	be := binary.BigEndian
	for name, c := range map[string]struct {
		data       []byte
		text, hint string
	}{
		"backing file": {header(func(h []byte) { be.PutUint64(h[8:], 4096); be.PutUint32(h[16:], 11); copy(h[4096:], "/etc/shadow") }), "backing file", "qemu-img convert"},
		"data file":    {header(func(h []byte) { be.PutUint64(h[72:], externalFeature) }), "external data file", "qemu-img convert"},
		"corrupt":      {header(func(h []byte) { be.PutUint64(h[72:], corruptFeature) }), "corrupt", "qemu-img check"},
		"encrypted":    {header(func(h []byte) { be.PutUint32(h[32:], 2) }), "encrypted", ""},
		"version 1":    {header(func(h []byte) { be.PutUint32(h[4:], 1) }), "version 1", "qemu-img convert"},
		"huge":         {header(func(h []byte) { be.PutUint64(h[24:], 1<<63+1) }), "9223372036854775809 bytes", ""},
		"no disk":      {header(func(h []byte) { be.PutUint64(h[24:], 0) }), "0 bytes", ""},
		"cut short":    {header(nil)[:50], "cut short", ""},
		"empty":        {nil, "0 bytes", ""},
		"VMDK":         {at(0, "KDMV"), "VMDK", "qemu-img convert -f vmdk"},
		"VHDX":         {at(0, "vhdxfile"), "VHDX", "qemu-img convert -f vhdx"},
		"VHD":          {append(make([]byte, 512), append([]byte("conectix"), make([]byte, 504)...)...), "VHD", "qemu-img convert -f vpc"},
		"VDI":          {at(64, "\x7f\x10\xda\xbe"), "VDI", "qemu-img convert -f vdi"},
		"ISO":          {at(32769, "CD001"), "ISO 9660", "cloud image"},
		"xz":           {at(0, "\xfd7zXZ\x00"), "xz", "unxz"},
		"tar":          {at(257, "ustar"), "tar", "tar -xf"},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "disk.img", c.data)
			_, err := Open(path)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v", err)
			}
			if !strings.Contains(hint.Of(err), c.hint) {
				t.Errorf("hint %q", hint.Of(err))
			}
		})
	}
	if _, err := Open(t.TempDir()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a directory: %v", err)
	}
	if _, err := Open("disk.img"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a relative path: %v", err)
	}
	if _, err := Open("/nowhere/disk.img"); !errdefs.IsNotFound(err) {
		t.Errorf("no file: %v", err)
	}
}

func TestCheck(t *testing.T) {
	path := write(t, "a.img", bootSector())
	img, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := json.Marshal(img)
	if err != nil {
		t.Fatal(err)
	}
	img = Image{}
	if err := json.Unmarshal(stored, &img); err != nil {
		t.Fatal(err)
	}
	if err := img.Check(); err != nil {
		t.Errorf("the same file: %v", err)
	}
	if err := os.Chtimes(path, time.Now(), time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := img.Check(); !errdefs.IsFailedPrecondition(err) || hint.Of(err) == "" {
		t.Errorf("a file that was written to: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := img.Check(); !errdefs.IsNotFound(err) || hint.Of(err) == "" {
		t.Errorf("a file that is gone: %v", err)
	}
}

// QEMU's own tool finds an overlay right, and reads the image's content and zeros behind it.
func TestOverlay(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	data := bootSector()
	copy(data[5000:], "content")
	img, err := Open(write(t, "a.img", data))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1 << 20, 3<<30 + 5*sector, MaxSize} {
		path := filepath.Join(t.TempDir(), "overlay.qcow2")
		if err := img.Overlay(path, size); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("qemu-img", "check", path).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("No errors")) {
			t.Fatalf("qemu-img check: %v\n%s", err, out)
		}
		out, err = exec.Command("qemu-img", "info", "--output=json", path).Output()
		var info struct {
			Size   int64  `json:"virtual-size"`
			File   string `json:"backing-filename"`
			Format string `json:"backing-filename-format"`
		}
		if err != nil || json.Unmarshal(out, &info) != nil || info.Size != size || info.File != img.Path || info.Format != "raw" {
			t.Fatalf("qemu-img info: %v\n%s", err, out)
		}
		if size > 4<<30 {
			continue
		}
		out, err = exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, img.Path).CombinedOutput() // a longer one is the same if the rest is zeros
		if err != nil {
			t.Fatalf("qemu-img compare: %v\n%s", err, out)
		}
	}
	if err := img.Overlay(filepath.Join(t.TempDir(), "x"), 1<<19); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an overlay smaller than its image: %v", err)
	}
}

func TestSeed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seed.iso")
	want := map[string]string{"meta-data": "instance-id: x\n", "user-data": strings.Repeat("#cloud-config\n", 10_000), "vendor-data": ""}
	files := map[string][]byte{}
	for name, data := range want {
		files[name] = []byte(data)
	}
	for range 2 { // the second replaces the first
		if err := WriteSeed(path, "CIDATA", files); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the seed may hold secrets: %v, %v", info.Mode(), err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	iso, err := iso9660.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	if label, err := iso.Label(); err != nil || strings.TrimSpace(label) != "CIDATA" {
		t.Errorf("label %q, %v", label, err)
	}
	root, err := iso.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	children, err := root.GetChildren()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range children {
		data := new(bytes.Buffer)
		if _, err := data.ReadFrom(c.Reader()); err != nil || want[c.Name()] != data.String() {
			t.Errorf("file %q: %d bytes, %v", c.Name(), data.Len(), err)
		}
		delete(want, c.Name())
	}
	if len(want) > 0 {
		t.Errorf("not there: %v", want)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(header(nil))
	f.Add(bootSector())
	f.Fuzz(func(t *testing.T, data []byte) {
		path := write(t, "x", data)
		img, err := Open(path)
		if err != nil {
			return
		}
		if img.Size <= 0 || img.Size > MaxSize || img.Size%sector != 0 {
			t.Errorf("size %d", img.Size)
		}
		if err := img.Overlay(path+".overlay", img.Size); err != nil {
			t.Error(err)
		}
	})
}

// A process that is killed on the way leaves no secrets behind: they are staged nowhere else.
func TestSeedIsNotStagedElsewhere(t *testing.T) {
	staging := t.TempDir()
	t.Setenv("TMPDIR", staging)
	path := filepath.Join(t.TempDir(), "seed.iso")
	if err := syscall.Mkfifo(path+".new", 0o600); err != nil { // holds the writer up
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		done <- WriteSeed(path, "CIDATA", map[string][]byte{"user-data": bytes.Repeat([]byte("secret"), 1<<20)})
	}()
	f, err := os.Open(path + ".new")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(f, make([]byte, 64<<10)); err != nil {
		t.Fatal(err)
	}
	filepath.WalkDir(staging, func(name string, _ fs.DirEntry, _ error) error {
		if data, _ := os.ReadFile(name); bytes.Contains(data, []byte("secret")) {
			t.Errorf("%s holds the secret", name)
		}
		return nil
	})
	f.Close()
	<-done
}
