//go:build linux

package child

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

// executorDir is where runc's bundles are while steps run, one directory per container.
func executorDir(dir string) string { return filepath.Join(dir, "executor") }

// clean removes what a killed builder left: its containers, which outlive it, with their cgroups, and its temporary files. Its mounts
// have gone with its mount namespace.
func clean(ctx context.Context, dir, tmp, runc string) error {
	bundles, err := filepath.Glob(filepath.Join(executorDir(dir), "*", "config.json"))
	if err != nil {
		return err
	}
	if runc == "" {
		bundles = nil // none without it
	}
	for _, config := range bundles {
		bundle := filepath.Dir(config)
		if out, err := exec.CommandContext(ctx, runc, "delete", "--force", filepath.Base(bundle)).CombinedOutput(); err != nil {
			return fmt.Errorf("deleting container %s: %w: %s", filepath.Base(bundle), err, out)
		}
		if err := os.RemoveAll(bundle); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// Its virtual machines have ended with it.
	for _, left := range []string{tmp, vmDir(dir)} {
		if err := os.RemoveAll(left); err != nil {
			return err
		}
	}
	return os.MkdirAll(tmp, 0o700)
}
