package kernel

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestOwnConfig(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		r, err := newRecipe(arch, nil)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		final := config{}
		for _, s := range r.settings {
			if seen[s.symbol] {
				t.Errorf("%s: CONFIG_%s is there twice", arch, s.symbol)
			}
			seen[s.symbol] = true
			if s.value == "m" {
				t.Errorf("%s: CONFIG_%s is a module", arch, s.symbol)
			}
			if s.value != "n" && !s.optional {
				final[s.symbol] = s.value
			}
		}
		if err := r.check(final, arch); err != nil {
			t.Errorf("%s: %v", arch, err)
		}
	}
}

func TestRecipe(t *testing.T) {
	own, err := newRecipe("amd64", nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := newRecipe("amd64", []byte("# mine\nCONFIG_XFS_FS=y\n# CONFIG_WIREGUARD is not set\nCONFIG_LOCALVERSION=\"-mine\" \nCONFIG_NR_CPUS=0x10\n"))
	if err != nil {
		t.Fatal(err)
	}
	if r.whole || len(r.settings) != len(own.settings)+1 {
		t.Errorf("whole %t, %d settings instead of %d", r.whole, len(r.settings), len(own.settings)+1)
	}
	text := r.text()
	for _, line := range []string{"CONFIG_XFS_FS=y", "# CONFIG_WIREGUARD is not set", `CONFIG_LOCALVERSION="-mine"`, "CONFIG_EROFS_FS=y", "CONFIG_NR_CPUS=0x10"} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	if strings.Contains(text, "CONFIG_WIREGUARD=y") || strings.Contains(text, "optional") {
		t.Error("an overridden line or a mark of ours is left")
	}
	whole := "#\n# Automatically generated file; DO NOT EDIT.\n# Linux/x86 6.1.0 Kernel Configuration\n#\nCONFIG_A=y\nCONFIG_B=m\n"
	for _, text := range []string{whole, "CONFIG_A=y\nCONFIG_CC_VERSION_TEXT=\"gcc\"\nCONFIG_B=m\n"} {
		if r, err = newRecipe("amd64", []byte(text)); err != nil || !r.whole || r.settings[0] != (setting{symbol: "A", value: "y"}) {
			t.Errorf("a whole configuration: %+v %v", r, err)
		}
	}
}

func TestCheckNamesEverySymbol(t *testing.T) {
	final := config{"PVH": "y"}
	for _, symbol := range []string{"VIRTIO_MMIO", "VIRTIO_CONSOLE", "VIRTIO_BLK", "VIRTIO_NET", "EROFS_FS", "OVERLAY_FS", "EXT4_FS", "BLK_DEV_INITRD", "DEVTMPFS", "PROC_FS", "SYSFS", "UNIX", "INET"} {
		final[symbol] = "y"
	}
	final["N"], final["TEXT"], final["OFF"] = "64", `"a"`, "y"
	r := recipe{settings: []setting{
		{"GONE", "y", false}, {"MAYBE", "y", true}, {"N", "64", false}, {"N2", "0", false}, {"TEXT", `"b"`, false}, {"OFF", "n", false}, {"ABSENT", "n", false},
	}}
	err := r.check(final, "amd64")
	if !errdefs.IsFailedPrecondition(err) {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(err.Error(), "asked for: ")
	list, _, _ = strings.Cut(list, ": failed")
	want := []string{"CONFIG_GONE is n instead of y", `CONFIG_TEXT is "a" instead of "b"`, "CONFIG_OFF is y instead of n"}
	if diff := cmp.Diff(want, strings.Split(list, ", ")); diff != "" {
		t.Error(diff)
	}
	r.settings = nil
	if err := r.check(final, "amd64"); err != nil {
		t.Error(err)
	}
	delete(final, "PVH")
	if err := r.check(final, "arm64"); err != nil {
		t.Error("PVH is not for arm64:", err)
	}
	final["EXT4_FS"] = "m"
	if err := r.check(final, "amd64"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "CONFIG_EXT4_FS, CONFIG_PVH") {
		t.Error(err)
	}
}

func FuzzSettings(f *testing.F) {
	f.Add(commonConfig)
	f.Add("# CONFIG_A is not set\nCONFIG_B=\"x y\"\nCONFIG_C=-1\n")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := parseSettings("fuzz", text)
		if err != nil {
			return
		}
		for i := range all {
			all[i].optional = false
		}
		// What is written is what was read.
		again, err := parseSettings("again", recipe{settings: all}.text())
		if err != nil || !slices.Equal(all, again) {
			t.Errorf("%+v\n%+v\n%v", all, again, err)
		}
	})
}

func FuzzImage(f *testing.F) {
	f.Add(tinyELF("Xen"))
	f.Add(bzImage([]byte("\x02\x21\x4c\x18\x04\x00\x00\x00\x30abc\x03\x00\x00\x00")))
	f.Add(bzImage(append([]byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"), make([]byte, 20)...)))
	f.Add(append(tinyELF("Xen"), "IKCFG_ST\x1f\x8b\x08\x00"...))
	f.Add(append(append(make([]byte, 56), "ARM\x64"...), "\x00\x00\x00\x00Linux version 6.1.2-tiny (me)"...))
	f.Fuzz(func(t *testing.T, data []byte) {
		img, err := parseImage(data)
		if err != nil {
			return
		}
		if img.version == "" || img.arch == "" || len(img.data) > imageMax {
			t.Errorf("%q %q", img.version, img.arch)
		}
		img.devices()
	})
}
