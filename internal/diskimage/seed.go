package diskimage

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/kdomanski/iso9660"
)

// WriteSeed makes a read-only disk with a few files in its root directory, at once and readable by nobody else. ISO 9660, since every
// system mounts that; names are in lower case and may have dashes, as cloud-init's do.
func WriteSeed(path, label string, files map[string][]byte) error {
	if err := writeSeed(path, label, files); err != nil {
		return fmt.Errorf("making disk %s: %w", label, err)
	}
	return nil
}

func writeSeed(path, label string, files map[string][]byte) error {
	w, err := iso9660.NewWriter()
	if err != nil {
		return err
	}
	defer w.Cleanup() //nolint:errcheck // a temporary directory of its own
	for name, data := range files {
		if err := w.AddFile(bytes.NewReader(data), name); err != nil {
			return err
		}
	}
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(w.WriteTo(f, label), f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return os.Rename(temp, path)
}
