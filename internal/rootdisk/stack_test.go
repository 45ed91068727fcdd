package rootdisk

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// joined is the tree of disks as overlayfs joins them on this host. Links are not counted: they do not lead from disk to disk.
func joined(t *testing.T, disks []Disk) []string {
	t.Helper()
	var lower []string
	for _, d := range slices.Backward(disks) {
		if out, err := exec.Command("fsck.erofs", d.Path).CombinedOutput(); err != nil {
			t.Fatalf("fsck.erofs: %v\n%s", err, out)
		}
		lower = append(lower, mountLoop(t, d.Path, "erofs", "ro"))
	}
	root := lower[0]
	if len(lower) > 1 {
		root = t.TempDir()
		if err := unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
			t.Fatal("mounting the overlay:", err)
		}
		t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	}
	links := regexp.MustCompile(` links \d+( with \S+)?`)
	var lines []string
	for _, l := range list(t, root) {
		if !strings.HasPrefix(l, "/ ") { // what the root directory is like is its own test
			lines = append(lines, links.ReplaceAllString(l, ""))
		}
	}
	return lines
}

// splits returns every way to divide n layers into runs.
func splits(n int) (all [][]run) {
	for bits := range 1 << (n - 1) {
		runs, from := []run{}, 0
		for i := 1; i <= n; i++ {
			if i == n || bits&(1<<(i-1)) != 0 {
				runs = append(runs, run{from, i})
				from = i
			}
		}
		all = append(all, runs)
	}
	return all
}

func assembled(t *testing.T, s *Store, name string, layers []Layer, runs []run) []Disk {
	t.Helper()
	disks, err := s.assemble(t.Context(), digest.FromString(name), layers, runs, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	return disks
}

// However layers are divided into disks, the joined tree is the flat one.
func TestStacksAreLikeFlat(t *testing.T) {
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	capable := ent{tar.Header{Typeflag: tar.TypeReg, Name: "d/cap", Mode: 0o4755, Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.trusted.overlay.opaque": "y"}}, "x"}
	forged := ent{tar.Header{Typeflag: tar.TypeDir, Name: "d", Mode: 0o1777, Uid: 7, Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.u": "1"}}, ""}
	tests := append(layersTests(),
		layersTest{name: "a directory that only its children tell of is as it is below", layers: [][]ent{
			{forged, file("d/low", "1"), dir("d/e", 0o700), dir("o", 0o700), dir("w", 0o711), file("w/x", "")},
			{file("d/up", "2"), file("d/e/up", "2"), file("o/.wh..wh..opq", ""), file("o/n", "2"), file(".wh.w", "")},
			{file("d/e/top", "3"), file("o/top", "3"), file("w/y", "3")},
		}},
		layersTest{name: "a whiteout of nothing is not listed", layers: [][]ent{
			{file("a", "1")}, {dir("new", 0o755), file("new/x", "1"), file("new/.wh.gone", "")}, {file("new/.wh.x", ""), file("new/y", "")},
			{file(".wh.new", ""), file("b", "")}, {dir("new", 0o700), file("new/.wh.y", "")},
		}},
		layersTest{name: "hard links and capabilities", layers: [][]ent{
			{forged, capable, file("t", "deep"), symlink("d/s", "../t")},
			{link("l", "d/cap"), link("d/l2", "l"), link("sl", "d/s")},
			{file(".wh.t", ""), link("again", "d/l2"), file("d/cap", "other")},
		}},
		layersTest{name: "an opaque root", layers: [][]ent{
			{dir("./", 0o700), file("a", "1"), dir("d", 0o700), file("d/x", "")}, {file(".wh..wh..opq", ""), file("d/y", "2")}, {file("z", "3"), file(".wh.a", "")},
		}},
		layersTest{name: "overlayfs' own whiteouts", layers: [][]ent{
			{file("a", "1"), dir("d", 0o700), file("d/x", "")},
			{{tar.Header{Typeflag: tar.TypeChar, Name: "a"}, ""}, {tar.Header{Typeflag: tar.TypeChar, Name: "d/x"}, ""}},
		}},
		layersTest{name: "directory, file, directory, gone, directory", layers: [][]ent{
			{dir("p", 0o700), file("p/1", "")}, {file("p", "2")}, {dir("p", 0o711), file("p/3", "")}, {file(".wh.p", "")}, {dir("p", 0o755), file("p/5", "")},
		}},
	)
	for _, tt := range tests {
		if len(tt.layers) < 2 {
			continue
		}
		t.Run(strings.NewReplacer(",", "", ":", "").Replace(tt.name), func(t *testing.T) { // overlayfs' options have no others
			var layers []Layer
			for _, l := range tt.layers {
				layers = append(layers, layer(tarball(t, l...)))
			}
			want := joined(t, assembled(t, openStore(t), "flat", layers, []run{{0, len(layers)}}))
			for _, runs := range splits(len(layers))[1:] {
				disks := assembled(t, openStore(t), "split", layers, runs)
				if diff := cmp.Diff(want, joined(t, disks)); diff != "" {
					t.Errorf("divided as %v (-flat +joined):\n%s", runs, diff)
				}
			}
		})
	}
}

// Random layers over a few names: everything turns into everything.
func TestStacksAreLikeFlatRandomly(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomStack(t, seed) })
	}
}

func randomStack(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	var layers []Layer
	for range 4 {
		var entries []ent
		for range r.IntN(9) {
			parts := []string{}
			for range 1 + r.IntN(3) {
				parts = append(parts, string(rune('a'+r.IntN(3))))
			}
			name := strings.Join(parts, "/")
			switch r.IntN(6) {
			case 0:
				entries = append(entries, dir(name, 0o700+int64(r.IntN(8))))
			case 1:
				entries = append(entries, file(filepath.Join(filepath.Dir(name), whiteoutPrefix+filepath.Base(name)), ""))
			case 2:
				if name = filepath.Dir(name); name != "." {
					entries = append(entries, file(name+"/"+whiteoutOpaque, ""))
				}
			default:
				entries = append(entries, file(name, fmt.Sprint(r.IntN(1000))))
			}
		}
		layers = append(layers, layer(tarball(t, entries...)))
	}
	s := openStore(t)
	disks, err := s.assemble(t.Context(), testImage, layers, []run{{0, 4}}, func(int) {})
	if err != nil {
		t.Skip(err) // a name below a file
	}
	want := joined(t, disks)
	for _, runs := range [][]run{{{0, 1}, {1, 2}, {2, 3}, {3, 4}}, {{0, 2}, {2, 4}}, {{0, 1}, {1, 4}}} {
		disks, err := s.assemble(t.Context(), digest.FromString(fmt.Sprint(runs)), layers, runs, func(int) {})
		if err != nil {
			continue // as above, and a layer on top hid it
		}
		if diff := cmp.Diff(want, joined(t, disks)); diff != "" {
			t.Errorf("seed %d, divided as %v (-flat +joined):\n%s", seed, runs, diff)
		}
	}
}

func sized(mb int64, name string) Layer {
	return Layer{Digest: digest.FromString(name), Size: mb << 20}
}

func TestPlan(t *testing.T) {
	none := func(run) bool { return false }
	base, app, tiny := sized(100, "base"), sized(20, "app"), Layer{Digest: digest.FromString("tiny"), Size: 1000}
	for name, tt := range map[string]struct {
		layers []Layer
		have   func(run) bool
		want   []run
	}{
		"no layers":                        {nil, none, []run{{0, 0}}},
		"one":                              {[]Layer{base}, none, []run{{0, 1}}},
		"small ones share":                 {[]Layer{tiny, tiny, tiny}, none, []run{{0, 3}}},
		"what is put on a base is apart":   {[]Layer{base, tiny, tiny}, none, []run{{0, 1}, {1, 3}}},
		"a small one below a big one":      {[]Layer{tiny, base, tiny}, none, []run{{0, 2}, {2, 3}}},
		"three":                            {[]Layer{base, app, tiny}, none, []run{{0, 1}, {1, 2}, {2, 3}}},
		"what is there is used":            {[]Layer{base, base, tiny}, func(r run) bool { return r == run{0, 2} }, []run{{0, 2}, {2, 3}}},
		"what is there, in parts, is used": {[]Layer{base, base, base, tiny}, func(r run) bool { return r.to-r.from == 1 }, []run{{0, 1}, {1, 2}, {2, 3}, {3, 4}}},
	} {
		if diff := cmp.Diff(tt.want, plan(tt.layers, tt.have), cmp.AllowUnexported(run{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	var many []Layer
	for i := range 127 {
		many = append(many, sized(int64(1+i%9), fmt.Sprint(i)))
	}
	runs := plan(many, none)
	if len(runs) > maxDisks || runs[0].from != 0 || runs[len(runs)-1].to != len(many) {
		t.Errorf("many layers: %v", runs)
	}
}

// Two images on one base: its disk is made and stored once, and goes with the last of them.
func TestSharedBase(t *testing.T) {
	s := openStore(t)
	reads := map[string]int{}
	counted := func(name string, size int64, entries ...ent) Layer {
		l := layer(tarball(t, entries...))
		l.Size = size
		open := l.Open
		l.Open = func() (io.ReadCloser, error) {
			reads[name]++
			return open()
		}
		return l
	}
	base := counted("base", 100<<20, dir("d", 0o700), file("d/x", "base"))
	first, second := counted("one", 100, file("one", "")), counted("two", 100, file("d/two", ""))
	one, two, old := digest.FromString("1"), digest.FromString("2"), digest.FromString("old")
	ctx := context.Background()
	a, err := s.Ensure(ctx, one, []Layer{base, first}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Ensure(ctx, two, []Layer{base, second}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Disks) != 2 || len(b.Disks) != 2 || a.Disks[0].Path != b.Disks[0].Path || a.Disks[1].Path == b.Disks[1].Path || reads["base"] != 1 {
		t.Errorf("%+v\n%+v\n%v", a, b, reads)
	}
	if used, err := s.Users(); err != nil || used[a.Disks[0].Key] != 2 || used[a.Disks[1].Key] != 1 {
		t.Errorf("users: %v %v", used, err)
	}
	if err := s.Remove(one); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Get(two); err != nil || !cmp.Equal(again, b) {
		t.Errorf("after the other image went: %v %v", again, err)
	}
	if _, err := os.Stat(a.Disks[1].Path); err == nil {
		t.Error("a disk that no image uses is still there")
	}
	// A record without its image's disks, as older versions wrote it, is no root; it does no harm either.
	os.WriteFile(s.imageRecord(old), fmt.Appendf(nil, `{"size":1,"imageDigest":%q,"entries":1}`, old), 0o600)
	if _, err := s.Get(old); !errdefs.IsNotFound(err) {
		t.Errorf("an old record: %v", err)
	}
	// A crash between two steps of a removal: the image's record is gone, its disks are there.
	if err := os.Remove(s.imageRecord(two)); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(s.dir, s.log); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "*"+diskSuffix)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// An image may have the same layer twice, also as disks of its own.
func TestSameLayerTwice(t *testing.T) {
	base, l := layer(tarball(t, file("a", "1"))), layer(tarball(t, dir("d", 0o700), file("d/x", "2")))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	disks, err := openStore(t).assemble(ctx, testImage, []Layer{base, l, l, l}, []run{{0, 1}, {1, 2}, {2, 3}, {3, 4}}, func(int) {})
	if err != nil || len(disks) != 4 || disks[1].Key != disks[3].Key {
		t.Errorf("%+v, %v", disks, err)
	}
}

// A layer that says nothing of its parents is another disk above other layers, but one that does is the same.
func TestDiskThatLeans(t *testing.T) {
	s := openStore(t)
	below := []Layer{layer(tarball(t, dir("d", 0o700))), layer(tarball(t, dir("d", 0o711)))}
	leans, whole := layer(tarball(t, file("d/x", "1"))), layer(tarball(t, dir("d", 0o1777), file("d/x", "1")))
	var disks [2][2]Disk
	for i, l := range []Layer{leans, whole} {
		for k, b := range below {
			made := assembled(t, s, fmt.Sprint(i, k), []Layer{b, l}, []run{{0, 1}, {1, 2}})
			disks[i][k] = made[1]
			want := []string{[]string{"/d 40700 0:0", "/d 40711 0:0", "/d 41777 0:0"}[max(k, 2*i)], `/d/x 100644 0:0 "1"`}
			if diff := cmp.Diff(want, joined(t, made)); diff != "" {
				t.Error(diff)
			}
		}
	}
	if disks[0][0].Key == disks[0][1].Key || disks[1][0].Key != disks[1][1].Key {
		t.Errorf("%+v", disks)
	}
}
