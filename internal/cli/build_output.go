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
	"slices"
	"strings"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// output is a file, or a directory, that a build writes on this side.
type output struct {
	dest string // - is standard output
	to   io.Writer

	file   *os.File // takes the name dest once it is whole
	device *os.File // is dest

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
		if dest == "-" && slices.ContainsFunc(c.outputs, func(o *output) bool { return o.dest == "-" }) {
			return usagef("--output %q: only one output can go to standard output", given)
		}
		if attrs["tar"] == "false" {
			return usagef("--output %q: an image goes into an archive; leave out tar=false", given)
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
		info, err := os.Stat(dest)
		if err == nil && info.IsDir() {
			return nil, fmt.Errorf("%s is a directory", dest)
		}
		if err == nil && !info.Mode().IsRegular() { // a device or a pipe is written as it is
			f, err := os.OpenFile(dest, os.O_WRONLY, 0)
			if err != nil {
				return nil, err
			}
			o.to, o.device = f, f
			return o, nil
		}
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
	case o.device != nil:
		err = o.device.Close()
		o.device = nil
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
	if o.device != nil {
		o.device.Close()
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
	var dirs []*tar.Header // their modes and times come last: what is put into them needs and changes both
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r)
			for _, d := range slices.Backward(dirs) {
				err = errors.Join(err, root.Chmod(local(d.Name), modeOf(d)), root.Chtimes(local(d.Name), d.ModTime, d.ModTime))
			}
			return err
		}
		if err != nil {
			return err
		}
		name := local(h.Name)
		if name == "" {
			continue
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
		if err := unpackEntry(t, h, name, root); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

// local is an archive's name as one below the directory.
func local(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func modeOf(h *tar.Header) fs.FileMode {
	return h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
}

func unpackEntry(t io.Reader, h *tar.Header, name string, root *os.Root) error {
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	mode := modeOf(h)
	if h.Typeflag == tar.TypeDir {
		if err := root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		return errors.Join(err, f.Close(), root.Chmod(name, mode), root.Chtimes(name, h.ModTime, h.ModTime))
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		return root.Link(local(h.Linkname), name)
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
