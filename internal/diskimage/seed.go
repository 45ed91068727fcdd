package diskimage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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
	// The library stages files in the system's temporary directory, where they would stay when this process is killed. They may hold
	// secrets: it gets zeros, and the contents are put in afterwards.
	for name, data := range files {
		if err := w.AddFile(bytes.NewReader(make([]byte, len(data))), name); err != nil {
			return err
		}
	}
	var image bytes.Buffer
	if err := w.WriteTo(&image, label); err != nil {
		return err
	}
	if err := fill(image.Bytes(), files); err != nil {
		return err
	}
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(writeTo(f, image.Bytes()), f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return os.Rename(temp, path)
}

func writeTo(w io.Writer, data []byte) error {
	_, err := w.Write(data)
	return err
}

// fill puts files' contents where an image has room for them.
func fill(image []byte, files map[string][]byte) error {
	iso, err := iso9660.OpenImage(bytes.NewReader(image))
	if err != nil {
		return err
	}
	root, err := iso.RootDir()
	if err != nil {
		return err
	}
	rooms, err := root.GetChildren()
	if err != nil {
		return err
	}
	filled := 0
	for _, room := range rooms {
		data, ok := files[room.Name()]
		if !ok {
			continue
		}
		section, ok := room.Reader().(*io.SectionReader)
		if !ok || section.Size() != int64(len(data)) {
			return fmt.Errorf("%q has no room", room.Name())
		}
		_, at, _ := section.Outer()
		copy(image[at:], data)
		filled++
	}
	if filled != len(files) {
		return fmt.Errorf("%d of %d files are in it", filled, len(files))
	}
	return nil
}
