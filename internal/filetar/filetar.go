// Package filetar turns a file or a tree into a tar stream and back, for copies between host and guest: hard links, holes, modes, owners,
// times. Either end may be hostile to the other: what Unpack writes stays below its directory whatever the stream says, and goes along no
// link that lies there unless it is told to. A leaf, imported by the CLI and by the guest's agent; its functions keep no state.
package filetar

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"syscall"
)

// Base is the name that a tree gets in a stream: the last part of its path, and "." where the path asks for the contents only, by
// ending in "/.".
func Base(p string) string {
	clean := path.Clean("/" + p)
	if clean == "/" || strings.HasSuffix(p, "/.") || p == "." {
		return "."
	}
	return path.Base(clean)
}

// nameError is a fault of one file. Its name is quoted: it may come from a stranger and reach a terminal.
func nameError(what, name string, err error) error {
	var pe *fs.PathError
	var le interface{ Unwrap() error } // *os.LinkError and *os.SyscallError
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		return fmt.Errorf("%s %q: %w", what, name, errno)
	case errors.As(err, &pe):
		return fmt.Errorf("%s %q: %w", what, name, pe.Err)
	case errors.As(err, &le) && le.Unwrap() != nil:
		return fmt.Errorf("%s %q: %w", what, name, le.Unwrap())
	}
	return fmt.Errorf("%s %q: %w", what, name, err)
}
