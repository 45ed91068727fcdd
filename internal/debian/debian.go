// Package debian is a client of package archives of Debian's form, Debian's and Ubuntu's, that believes nothing it has not verified: the
// Release file's OpenPGP signature against the archive keys embedded here or given by the user, the package index against the Release, the package against the index.
// It installs nothing. A leaf; imported by kernel and base. An Archive may be used from several goroutines and processes.
package debian

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// KeyringData is /usr/share/keyrings/debian-archive-keyring.gpg of Debian 12's package debian-archive-keyring
// (2023.3+deb12u2): the public keys of Debian 11 to 13. To renew it, copy that file from a newer version of the package;
// TestEmbeddedKeyring fails when it is time.
//
//go:embed debian-archive-keyring.gpg
var KeyringData []byte

// DefaultMirror serves every Debian architecture and suite.
const DefaultMirror = "http://deb.debian.org/debian"

// Archive is one suite on one mirror. All fields but AsOf must be set.
type Archive struct {
	Mirror     string // the directory that holds dists/ and pool/
	Suite      string // a codename, as bookworm-updates
	Components []string
	Keyring    openpgp.EntityList
	Cache      string // directory for verified indices and packages
	HTTP       *http.Client
	AsOf       time.Time // of a snapshot: what had not expired then is good; zero: now
	Log        *slog.Logger
}

// Archives is what an installed system draws its packages from.
type Archives []*Archive

// Keyring returns the embedded archive keys.
func Keyring() (openpgp.EntityList, error) {
	keys, err := openpgp.ReadKeyRing(bytes.NewReader(KeyringData))
	if err != nil {
		return nil, fmt.Errorf("reading the embedded archive keyring: %w", err)
	}
	return keys, nil
}

// Client returns an HTTP client for mirrors: bounded waits, no bound on the whole of a long download.
func Client() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = 30 * time.Second
	return &http.Client{Transport: t}
}

// SecurityMirror is where a mirror keeps the security updates: beside the archive, as deb.debian.org does.
func SecurityMirror(mirror string) string {
	return strings.TrimSuffix(strings.TrimSuffix(mirror, "/"), "/debian") + "/debian-security"
}

// Suites returns the suites of a Debian release: itself, its updates and its security updates, each verified with the
// embedded keys. An empty mirror means DefaultMirror.
func Suites(mirror, codename, cache string, log *slog.Logger) (Archives, error) {
	return Debian().Suites(codename, Source{Mirror: mirror}, cache, log)
}

// Find returns the newest version of every package whose name match accepts, by name.
func (as Archives) Find(ctx context.Context, arch string, match func(name string) bool) (map[string]Package, error) {
	found := make([][]Package, len(as))
	g, ctx := errgroup.WithContext(ctx)
	for i, a := range as {
		g.Go(func() (err error) {
			found[i], err = a.Find(ctx, arch, match)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	newest := map[string]Package{}
	for _, p := range slices.Concat(found...) {
		if have, ok := newest[p.Name]; !ok || CompareVersions(p.Version, have.Version) > 0 {
			newest[p.Name] = p
		}
	}
	return newest, nil
}

// Get returns the newest version of one package, or errdefs.ErrNotFound.
func (as Archives) Get(ctx context.Context, arch, name string) (Package, error) {
	found, err := as.Find(ctx, arch, func(n string) bool { return n == name })
	if err != nil {
		return Package{}, err
	}
	p, ok := found[name]
	if !ok {
		return Package{}, fmt.Errorf("package %s for %s: %w", name, arch, errdefs.ErrNotFound)
	}
	return p, nil
}
