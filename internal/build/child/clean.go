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

// NeedsCleaning tells whether a builder left steps in dir, or runs some now.
func NeedsCleaning(dir string) bool { return len(bundles(dir)) > 0 }

func bundles(dir string) []string {
	found, _ := filepath.Glob(filepath.Join(executorDir(dir), "*", "config.json")) // the pattern is good
	return found
}

// Clean ends the steps that a killed builder left: its containers, which outlive it, with their cgroups. Its mounts have gone with its
// mount namespace. While a builder lives in dir nothing is touched.
func Clean(ctx context.Context, dir, runc string) error {
	if !NeedsCleaning(dir) {
		return nil
	}
	unlock, err := lock(ctx, filepath.Join(dir, lockName))
	if err != nil {
		return err
	}
	defer unlock()
	return cleanLocked(ctx, dir, runc)
}

// cleanLocked needs the lock of dir.
func cleanLocked(ctx context.Context, dir, runc string) error {
	if runc == "" {
		return nil
	}
	for _, config := range bundles(dir) {
		bundle := filepath.Dir(config)
		if out, err := exec.CommandContext(ctx, runc, "delete", "--force", filepath.Base(bundle)).CombinedOutput(); err != nil {
			return fmt.Errorf("deleting container %s: %w: %s", filepath.Base(bundle), err, out)
		}
		if err := os.RemoveAll(bundle); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// emptyDir makes dir, without what is in it.
func emptyDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.MkdirAll(dir, 0o700)
}
