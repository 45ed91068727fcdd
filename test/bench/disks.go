package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/opencontainers/go-digest"
)

// layersOf returns an image's layers as the daemon stores them.
func (b *bench) layersOf(ref string) (*atollv1.Image, []rootdisk.Layer, error) {
	got, err := b.client.Images.Get(context.Background(), connect.NewRequest(&atollv1.GetImageRequest{Reference: ref}))
	if err != nil {
		return nil, nil, err
	}
	img := got.Msg.GetImage()
	var layers []rootdisk.Layer
	for _, l := range img.GetLayers() {
		d := digest.Digest(l.GetDigest())
		layers = append(layers, rootdisk.Layer{Digest: d, MediaType: l.GetMediaType(), Size: l.GetSizeBytes(), Open: func() (io.ReadCloser, error) {
			return os.Open(filepath.Join(b.home, "images", "blobs", "sha256", d.Encoded()))
		}})
	}
	return img, layers, nil
}

// bigBase is an image of more than 300 MB: Debian, and most of it once more.
const bigBase = "FROM debian:bookworm\nRUN cp -a /usr /opt/usr\n"

// build builds a Dockerfile with one more file, app, in its context.
func (b *bench) build(tag, dockerfile, app string) (whole, disk time.Duration, err error) {
	dir, err := os.MkdirTemp("", "bench-build")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	for name, text := range map[string]string{"Dockerfile": dockerfile, "app": app} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return 0, 0, err
		}
	}
	began := time.Now()
	res, err := b.buildOnce(&atollv1.BuildStart{ContextDir: dir, Tags: []string{tag}})
	return time.Since(began), res.GetRootDisk().AsDuration(), err
}

// rootDisks: image layers to root disks.
func (b *bench) rootDisks(int) error {
	if _, _, err := b.build("bench-base", bigBase, ""); err != nil {
		return err
	}
	img, layers, err := b.layersOf("bench-base")
	if err != nil {
		return err
	}
	var whole, again []time.Duration
	var size int64
	for range 5 {
		err := b.inStore(func(store *rootdisk.Store) error {
			began := time.Now()
			root, err := store.Ensure(context.Background(), digest.Digest(img.GetDigest()), layers, nil)
			whole, size = append(whole, time.Since(began)), root.Size()
			if err != nil {
				return err
			}
			began = time.Now()
			_, err = store.Ensure(context.Background(), digest.FromString("another image of the same layers"), layers, nil)
			again = append(again, time.Since(began))
			return err
		})
		if err != nil {
			return err
		}
	}
	const app = "FROM bench-base\nCOPY app /app\nRUN true\n"
	if _, _, err := b.build("bench-app", app, "0"); err != nil {
		return err
	}
	var changes, disks []time.Duration
	for i := range 5 {
		change, disk, err := b.build("bench-app", app, fmt.Sprint("line ", i+1, "\n"))
		if err != nil {
			return err
		}
		changes, disks = append(changes, change), append(disks, disk)
	}
	b.row("## Root disks\n\nAn image of %.0f MB in %d zstd layers of %.0f MB: Debian as built here, and its /usr once more. Hash trees and fsync included. 5 rounds.\n",
		float64(size)/1e6, len(layers), float64(img.GetSizeBytes())/1e6)
	b.row("| | median | fastest |\n|---|---|---|")
	b.row("| **root disk of the image** (300 MB: ≤ 1.5 s) | **%s** | %s |", ms(quantile(whole, .5)), ms(slices.Min(whole)))
	b.row("| speed (≥ 200 MB/s) | %.0f MB/s | %.0f MB/s |", float64(size)/1e6/quantile(whole, .5).Seconds(), float64(size)/1e6/slices.Min(whole).Seconds())
	b.row("| root disk of another image with the same layers | %s | %s |", ms(quantile(again, .5)), ms(slices.Min(again)))
	b.row("| **one line of a file changed above it: build and root disk** (≤ 2 s) | **%s** | %s |", ms(quantile(changes, .5)), ms(slices.Min(changes)))
	b.row("| of that, the root disk | %s | %s |\n", ms(quantile(disks, .5)), ms(slices.Min(disks)))
	return nil
}

func (b *bench) inStore(do func(*rootdisk.Store) error) error {
	dir, err := os.MkdirTemp(b.home, "bench-disk")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	store, err := rootdisk.Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	return do(store)
}

// readings are what a guest does with its root, each with a word after it: one big file and all files, cold and then warm. Its own caches
// count; the host has the disk in memory.
const readings = `
all() { tar cf - /usr /lib /bin /etc 2>/dev/null | cat >/dev/null; }
big() { cat /opt/big >/dev/null; }
echo begin; big; echo done; big; echo done; all; echo done; all; echo done`

var readingNames = []string{"big file, cold", "big file, warm", "all of /usr, cold", "all of /usr, warm"}

// fileSystems compares root disks of one image in EROFS, EROFS with dm-verity and ext4. It is not part of the usual benchmark.
func (b *bench) fileSystems(rounds int) error {
	if _, _, err := b.build("bench-files", "FROM debian:bookworm\nRUN cp -a /usr/share /opt/share && cat /usr/bin/* /usr/lib/x86_64-linux-gnu/*.so* >/opt/big\n", ""); err != nil {
		return err
	}
	_, layers, err := b.layersOf("bench-files")
	if err != nil {
		return err
	}
	if _, err := b.cli("run", "-d", "--verity", "--memory", "1G", "--name", "bench-files", "bench-files", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-files")
	m, argv, err := b.running("bench-files")
	if err != nil {
		return err
	}
	if _, err := b.cli("kill", "bench-files"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.home, "bench-fs")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var made [2][]time.Duration
	paths := []string{filepath.Join(dir, "erofs"), filepath.Join(dir, "ext4")}
	for range 3 {
		for i, convert := range []func(string, []rootdisk.Layer) error{writeErofs, writeExt4} {
			os.Remove(paths[i])
			began := time.Now()
			if err := convert(paths[i], layers); err != nil {
				return err
			}
			made[i] = append(made[i], time.Since(began))
		}
	}
	kinds := []string{"erofs", "ext4"}
	took := make([][][]time.Duration, len(kinds))
	for i := range took {
		took[i] = make([][]time.Duration, len(readingNames))
	}
	for range rounds {
		for i, kind := range kinds {
			lines, err := b.inGuest(m, argv, paths[i], kind)
			if err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			for k := range readingNames {
				took[i][k] = append(took[i][k], lines[k])
			}
		}
	}
	b.row("## File systems of the root disk\n\n`scripts/bench -only filesystems`: one image of %d layers; %d rounds of the readings, turn by turn: QEMU's CPU time, least.\n", len(layers), rounds)
	b.row("| | EROFS | ext4 |\n|---|---|---|")
	var sizes []float64
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		sizes = append(sizes, float64(st.Size())/1e6)
	}
	b.row("| size | %.0f MB | %.0f MB |", sizes[0], sizes[1])
	b.row("| made in | %s | %s |", ms(slices.Min(made[0])), ms(slices.Min(made[1])))
	b.row("| of the EROFS' bytes | %.0f MB/s | %.0f MB/s |", sizes[0]/slices.Min(made[0]).Seconds(), sizes[0]/slices.Min(made[1]).Seconds())
	for k, name := range readingNames {
		b.row("| %s | %s | %s |", name, ms(slices.Min(took[0][k])), ms(slices.Min(took[1][k])))
	}
	return nil
}

func writeErofs(path string, layers []rootdisk.Layer) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return errors.Join(rootdisk.WriteFlat(context.Background(), f, layers, nil), f.Sync())
}

// writeExt4 unpacks the layers, which have no whiteouts here, and has mke2fs fill a file system with a tenth of free room.
func writeExt4(path string, layers []rootdisk.Layer) error {
	tree := path + ".tree"
	defer os.RemoveAll(tree)
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	for _, l := range layers {
		r, err := l.Open()
		if err != nil {
			return err
		}
		tar := exec.Command("tar", "-x", "--zstd", "-p", "--numeric-owner", "-C", tree)
		tar.Stdin = r
		out, err := tar.CombinedOutput()
		r.Close()
		if err != nil {
			return fmt.Errorf("tar: %w: %s", err, out)
		}
	}
	du, err := exec.Command("du", "-sm", tree).Output()
	if err != nil {
		return err
	}
	var mb int
	fmt.Sscan(string(du), &mb)
	out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree, path, fmt.Sprint(mb*11/10, "M")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	return exec.Command("sync", path).Run()
}

// inGuest boots a machine by hand from one root disk and returns what it measures.
func (b *bench) inGuest(m *atollv1.Machine, argv []string, path, kind string) ([]time.Duration, error) {
	argv = slices.Clone(argv)
	disks := 0
	for i, a := range argv {
		if strings.HasPrefix(a, "driver=raw,node-name=disk") && strings.Contains(a, "read-only=on") { // all root disks are this one
			before, rest, _ := strings.Cut(a, "file.filename=")
			_, after, _ := strings.Cut(rest, ",")
			argv[i] = before + "file.filename=" + path + "," + after
			disks++
		}
	}
	c := configOf(m)
	c.Root = &agentv1.Root{Disks: []*agentv1.RootDisk{{Device: "/dev/vda", Type: kind, HasRoot: true}}, Scratch: fmt.Sprintf("/dev/vd%c", 'a'+disks), ScratchType: "ext4"}
	c.Process.Argv, c.Process.Env = []string{"sh", "-c", readings}, []string{"PATH=/usr/bin:/bin"}
	// What counts is the CPU that QEMU takes, which hardly depends on what else this machine does.
	var took []time.Duration
	var last time.Duration
	err := b.byHand(argv, c, func(pid int, o *agentv1.Output) error {
		for range bytes.Count(o.GetData(), []byte("\n")) {
			now, err := cpuTime(pid)
			if err != nil {
				return err
			}
			if last > 0 {
				took = append(took, now-last)
			}
			last = now
		}
		if o.GetEof() {
			return io.EOF
		}
		return nil
	})
	if len(took) != len(readingNames) {
		return nil, fmt.Errorf("the guest did %d of %d readings: %w", len(took), len(readingNames), err)
	}
	return took, nil
}

// cpuTime is what a process has taken so far (proc(5): utime and stime, in hundredths of a second).
func cpuTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(data, []byte(") "))
	fields := strings.Fields(string(rest))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, data)
	}
	var user, system int64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		return 0, err
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}
