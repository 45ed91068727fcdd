// Package zone is the time zone database, inside the program: a named zone works on a host and in an image that have no tzdata.
// The database is IANA's, in the public domain, as the Go distribution has it. A leaf; safe for concurrent use.
package zone

import (
	"archive/zip"
	_ "embed"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

//go:generate sh -c "cp $(go env GOROOT)/lib/time/zoneinfo.zip zoneinfo.zip"
//go:embed zoneinfo.zip
var database string

func open() (*zip.Reader, error) {
	return zip.NewReader(strings.NewReader(database), int64(len(database)))
}

// Find returns a zone, such as Europe/Berlin, as a TZif file (RFC 9636).
func Find(name string) ([]byte, error) {
	z, err := open()
	if err != nil {
		return nil, fmt.Errorf("reading the time zone database: %w", err)
	}
	for _, f := range z.File {
		if f.Name != name || f.FileInfo().IsDir() {
			continue
		}
		data, err := fs.ReadFile(z, name)
		if err != nil {
			return nil, fmt.Errorf("reading time zone %q: %w", name, err)
		}
		return data, nil
	}
	err = fmt.Errorf("time zone %q: %w", name[:min(len(name), 80)], errdefs.ErrNotFound)
	if near := like(z, name); near != "" {
		return nil, hint.With(err, "did you mean %s?", near)
	}
	return nil, hint.With(err, "zones are written as Europe/Berlin or America/New_York; UTC is the default")
}

// Names returns all zones, sorted.
func Names() []string {
	z, err := open()
	if err != nil {
		return nil
	}
	var names []string
	for _, f := range z.File {
		if !f.FileInfo().IsDir() {
			names = append(names, f.Name)
		}
	}
	slices.Sort(names)
	return names
}

// like finds a zone that differs in case or blanks only, or whose city it is.
func like(z *zip.Reader, name string) string {
	name = strings.ReplaceAll(name, " ", "_")
	for _, f := range z.File {
		if strings.EqualFold(f.Name, name) {
			return f.Name
		}
	}
	for _, f := range z.File {
		if _, city, ok := strings.Cut(f.Name, "/"); ok && strings.EqualFold(city, name) {
			return f.Name
		}
	}
	return ""
}
