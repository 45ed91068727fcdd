package kernel

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Agent is the guest's init.
type Agent struct {
	ID     string // names this very binary, such as its digest: an initramfs is made once per ID
	Binary []byte
}

// GuestModuleDir is where the initramfs has the modules, as NN-name.ko: the order of the names is the order to load them in. Those
// of a feature are in a directory of its name there.
const GuestModuleDir = "/lib/modules/atoll"

// Initramfs returns the path of the initramfs for a kernel of this store: the agent as /init and the kernel's modules.
// It is made at the first call and found from then on without reading either. It goes with its kernel.
func (s *Store) Initramfs(ctx context.Context, k Kernel, agent Agent) (string, error) {
	dir := filepath.Join(s.opts.Dir, k.Name)
	parts := []string{agent.ID, k.Digest.String()}
	for _, m := range k.moduleFiles() {
		parts = append(parts, m.path)
	}
	key := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	path := filepath.Join(dir, "initramfs-"+hex.EncodeToString(key[:16])+".cpio")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := s.makeInitramfs(ctx, path, dir, k, agent); err != nil {
		return "", fmt.Errorf("making the initramfs for kernel %q: %w", k.Name, err)
	}
	return path, nil
}

func (s *Store) makeInitramfs(ctx context.Context, path, dir string, k Kernel, agent Agent) error {
	f, err := os.CreateTemp(s.opts.Dir, tempPrefix) // Open removes it after a crash
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	buf := bufio.NewWriterSize(f, 1<<20)
	w := &cpioWriter{w: buf}
	for _, d := range []string{"dev", "proc", "sys", "lib", "lib/modules", strings.TrimPrefix(GuestModuleDir, "/")} {
		w.entry(d, modeDir|0o755, 0, nil)
	}
	w.entry("dev/console", modeChar|0o600, 5<<8|1, nil) // the kernel opens it for init before anything is mounted
	w.entry("init", modeFile|0o755, 0, agent.Binary)
	for _, feature := range slices.Sorted(maps.Keys(k.Features)) {
		w.entry(strings.TrimPrefix(GuestModuleDir, "/")+"/"+feature, modeDir|0o755, 0, nil)
	}
	for _, m := range k.moduleFiles() {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, moduleDir, m.path))
		if err != nil {
			return err
		}
		w.entry(strings.TrimPrefix(GuestModuleDir, "/")+"/"+m.path, modeFile|0o644, 0, data)
	}
	w.entry("TRAILER!!!", 0, 0, nil)
	if w.err == nil {
		w.err = buf.Flush()
	}
	if w.err == nil {
		w.err = f.Sync()
	}
	if w.err != nil {
		return noSpace(f.Name(), w.err)
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// cpioWriter writes the newc format (Documentation/driver-api/early-userspace/buffer-format.rst). The first error sticks.
type cpioWriter struct {
	w   io.Writer
	ino int
	n   int
	err error
}

const (
	modeFile = 0o100000
	modeDir  = 0o040000
	modeChar = 0o020000
)

func (c *cpioWriter) entry(name string, mode, rdev int, data []byte) {
	c.ino++
	// magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	c.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, rdev>>8, rdev&0xff, len(name)+1, 0, name))
	c.write(data)
}

// write pads what it wrote to a multiple of four.
func (c *cpioWriter) write(p []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(p)
	c.n, c.err = c.n+n, err
	if pad := -c.n & 3; pad > 0 && c.err == nil {
		_, c.err = c.w.Write(make([]byte, pad))
		c.n += pad
	}
}
