package cli

import (
	"errors"
	"testing"
)

// The cases of docker cp's manual.
func TestPlace(t *testing.T) {
	file, dir, contents := copySource{base: "f"}, copySource{isDir: true, base: "d"}, copySource{isDir: true, base: "."}
	for _, tc := range []struct {
		name     string
		src      copySource
		dst      copyTarget
		dir, out string
		err      error
	}{
		{"file to a new name", file, copyTarget{path: "/a/new"}, "/a", "new", nil},
		{"file to a directory that is not there", file, copyTarget{path: "/a/new/"}, "", "", errNoSuchTarget},
		{"file onto a file", file, copyTarget{path: "/a/old", exists: true}, "/a", "old", nil},
		{"file into a directory", file, copyTarget{path: "/a", exists: true, isDir: true}, "/a", "f", nil},
		{"directory to a new name", dir, copyTarget{path: "/a/new"}, "/a", "new", nil},
		{"directory to a new name with a slash", dir, copyTarget{path: "/a/new/"}, "/a", "new", nil},
		{"directory onto a file", dir, copyTarget{path: "/a/old", exists: true}, "", "", errDirOntoFile},
		{"directory into a directory", dir, copyTarget{path: "/a", exists: true, isDir: true}, "/a", "d", nil},
		{"contents into a directory", contents, copyTarget{path: "/a", exists: true, isDir: true}, "/a", ".", nil},
		{"contents to a new name", contents, copyTarget{path: "/a/new"}, "/a", "new", nil},
		{"into the root", file, copyTarget{path: "/", exists: true, isDir: true}, "/", "f", nil},
	} {
		d, name, err := place(tc.src, tc.dst)
		if d != tc.dir || name != tc.out || !errors.Is(err, tc.err) {
			t.Errorf("%s: %q %q %v, want %q %q %v", tc.name, d, name, err, tc.dir, tc.out, tc.err)
		}
	}
}

func TestParseCopyEnd(t *testing.T) {
	for arg, want := range map[string]copyEnd{
		"web:/etc": {"web", "/etc"}, "web:etc": {"web", "etc"}, "web:a:b": {"web", "a:b"}, "/web:x": {path: "/web:x"}, "./web:x": {path: "./web:x"},
		"../web:x": {path: "../web:x"}, "-": {path: "-"}, "file": {path: "file"}, ":x": {path: ":x"}, "web:": {machine: "web"},
	} {
		if got := parseCopyEnd(arg); got != want {
			t.Errorf("%q: %+v, want %+v", arg, got, want)
		}
	}
}
