package cli

import (
	"archive/tar"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// output is a file, or a directory, that a build writes on this side.
type output struct {
	dest string // - is standard output
	to   io.Writer

	file *os.File // takes the name dest once it is whole

	pipe     *io.PipeWriter // to unpack
	unpacked chan error
}

func (c *buildCall) readOutputs() error {
	for _, given := range c.buildFlags.outputs {
		attrs, err := attributes("--output", given, "path")
		if err != nil {
			return err
		}
		kind, dest := attrs["type"], attrs["dest"]
		if plain, ok := attrs["path"]; ok { // -o DIR, -o -
			kind, dest = "local", plain
			if plain == "-" {
				kind = "tar"
			}
		}
		switch kind {
		case "disk", "oci", "docker", "tar", "local":
		default:
			return usagef("--output %q: want type=disk, oci, docker, tar or local", given)
		}
		if dest == "" {
			return usagef("--output %q: dest=PATH is missing", given)
		}
		if dest == "-" && kind == "local" {
			return usagef("--output %q: a directory cannot be standard output; use type=tar", given)
		}
		for _, key := range []string{"type", "dest", "path"} {
			delete(attrs, key)
		}
		o, err := c.openOutput(kind, dest)
		if err != nil {
			return fmt.Errorf("output %s: %w", dest, err)
		}
		c.outputs = append(c.outputs, o)
		if kind == "local" {
			kind = "tar"
		}
		c.start.Outputs = append(c.start.Outputs, &atollv1.BuildOutput{Type: kind, Attributes: attrs})
	}
	return nil
}

func (c *buildCall) openOutput(kind, dest string) (*output, error) {
	o := &output{dest: dest}
	switch {
	case kind == "local":
		if err := os.MkdirAll(dest, 0o755); err != nil {
			return nil, err
		}
		root, err := os.OpenRoot(dest)
		if err != nil {
			return nil, err
		}
		r, w := io.Pipe()
		o.to, o.pipe, o.unpacked = w, w, make(chan error, 1)
		go func() {
			err := unpack(r, root)
			r.CloseWithError(err)
			o.unpacked <- errors.Join(err, root.Close())
		}()
	case dest == "-":
		o.to = c.env.Stdout
	default:
		if info, err := os.Stat(dest); err == nil && !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is there and no file", dest)
		}
		var err error
		if o.file, err = os.CreateTemp(filepath.Dir(dest), ".atoll-"); err != nil {
			return nil, err
		}
		o.to = o.file
	}
	return o, nil
}

func (o *output) write(data []byte) error {
	if _, err := o.to.Write(data); err != nil {
		return fmt.Errorf("writing %s: %w", o.dest, err)
	}
	return nil
}

func (o *output) finish() error {
	var err error
	switch {
	case o.pipe != nil:
		err = errors.Join(o.pipe.Close(), <-o.unpacked)
		o.pipe = nil
	case o.file != nil:
		err = errors.Join(o.file.Chmod(0o644), o.file.Close())
		if err == nil {
			err = os.Rename(o.file.Name(), o.dest)
		}
		if err == nil {
			o.file = nil
		}
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", o.dest, err)
	}
	return nil
}

// discard removes a file that is not whole. What was unpacked of a directory stays.
func (o *output) discard() {
	if o.pipe != nil {
		o.pipe.CloseWithError(errors.New("the build failed"))
		<-o.unpacked
	}
	if o.file != nil {
		o.file.Close()
		os.Remove(o.file.Name())
	}
}

// unpack writes a root file system below a directory, which no name and no link in it can leave. Files are the caller's own; devices are
// left out.
func unpack(r io.Reader, root *os.Root) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if name == "" {
			continue
		}
		if err := unpackEntry(t, h, name, root); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func unpackEntry(t io.Reader, h *tar.Header, name string, root *os.Root) error {
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	mode := fs.FileMode(h.Mode).Perm()
	if h.Typeflag == tar.TypeDir {
		if err := root.Mkdir(name, mode|0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		return errors.Join(err, f.Close(), root.Chmod(name, mode), root.Chtimes(name, h.ModTime, h.ModTime))
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		return root.Link(strings.TrimPrefix(path.Clean("/"+h.Linkname), "/"), name)
	}
	return nil
}

// writeMetadata writes what the exporters said, with JSON as JSON.
func writeMetadata(file string, r *atollv1.BuildResult) error {
	all := map[string]any{}
	for k, v := range r.GetMetadata() {
		all[k] = v
		if data, err := base64.StdEncoding.DecodeString(v); err == nil && json.Valid(data) && strings.HasPrefix(string(data), "{") {
			all[k] = json.RawMessage(data)
		}
	}
	if r.GetDigest() != "" {
		all["containerimage.digest"] = r.GetDigest()
	}
	if names := r.GetReferences(); len(names) > 0 {
		all["image.name"] = strings.Join(names, ",")
	}
	data, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
