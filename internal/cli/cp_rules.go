package cli

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// copyEnd is one end of a copy.
type copyEnd struct {
	machine string // empty: this host
	path    string
}

// parseCopyEnd tells MACHINE:PATH from a path here, by Docker's rules: a path that begins with / or . is one of here.
func parseCopyEnd(arg string) copyEnd {
	machine, path, ok := strings.Cut(arg, ":")
	if !ok || filepath.IsAbs(arg) || strings.HasPrefix(machine, ".") || machine == "" {
		return copyEnd{path: arg}
	}
	return copyEnd{machine, path}
}

func (c copyEnd) String() string {
	if c.machine == "" {
		return c.path
	}
	return c.machine + ":" + c.path
}

// copySource is what is copied.
type copySource struct {
	isDir bool
	base  string // the last part of its path; "." for the contents of a directory
}

// copyTarget is where it goes, links followed.
type copyTarget struct {
	path   string
	exists bool
	isDir  bool
}

var (
	errDirOntoFile  = errors.New("a directory cannot be copied onto a file")
	errNoSuchTarget = errors.New("no such directory")
)

// place decides, as docker cp does, which directory the copy is unpacked in and under which name.
func place(src copySource, dst copyTarget) (dir, name string, err error) {
	switch {
	case dst.exists && dst.isDir:
		return dst.path, src.base, nil
	case dst.exists && src.isDir:
		return "", "", fmt.Errorf("%q: %w", dst.path, errDirOntoFile) // quoted: the path may be what a link of the guest's says
	case !dst.exists && !src.isDir && strings.HasSuffix(dst.path, "/"), !dst.exists && !src.isDir && strings.HasSuffix(dst.path, "/."):
		return "", "", fmt.Errorf("%q: %w", dst.path, errNoSuchTarget)
	}
	clean := filepath.Clean(dst.path)
	return filepath.Dir(clean), filepath.Base(clean), nil
}
