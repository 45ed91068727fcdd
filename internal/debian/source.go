package debian

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// ubuntuKeyring is /usr/share/keyrings/ubuntu-archive-keyring.gpg of Debian 13's package ubuntu-keyring (2023.11.28.1-0.2).
// TestKeyringsComeFromDebian compares the two.
//
//go:embed ubuntu-archive-keyring.gpg
var ubuntuKeyring []byte

// Distribution is one that publishes its packages in an archive of Debian's form.
type Distribution struct {
	Name       string
	Keyring    []byte // OpenPGP keys, binary
	Mirror     string
	Components []string
	security   func(mirror string) string // where a mirror keeps the security updates
	// Of the archive's past: the service, the archives' names there, the first day.
	snapshots                 string
	snapshotMain, snapshotSec string
	firstSnapshot             time.Time
}

// Debian returns Debian.
func Debian() Distribution {
	return Distribution{
		Name: "Debian", Keyring: KeyringData, Mirror: DefaultMirror, Components: []string{"main"}, security: SecurityMirror,
		snapshots: "http://snapshot.debian.org", snapshotMain: "/archive/debian/", snapshotSec: "/archive/debian-security/",
		firstSnapshot: time.Date(2005, 3, 12, 0, 0, 0, 0, time.UTC),
	}
}

// Ubuntu returns Ubuntu as it serves an architecture.
func Ubuntu(arch string) Distribution {
	d := Distribution{
		Name: "Ubuntu", Keyring: ubuntuKeyring, Mirror: "http://archive.ubuntu.com/ubuntu", Components: []string{"main", "universe"},
		security:  func(mirror string) string { return mirror },
		snapshots: "http://snapshot.ubuntu.com", snapshotMain: "/ubuntu/", snapshotSec: "/ubuntu/",
		firstSnapshot: time.Date(2023, 3, 1, 0, 0, 0, 0, time.UTC),
	}
	if arch != "amd64" {
		d.Mirror = "http://ports.ubuntu.com/ubuntu-ports"
	}
	return d
}

// Source says where packages come from and who vouches for them. The zero value is the distribution's own.
type Source struct {
	Mirror   string    // with Snapshot: another snapshot service
	Keyring  []byte    // OpenPGP keys, binary or armoured
	Snapshot time.Time // the archive as it was then; zero: as it is
}

// Suites returns the suites of a release: itself, its updates and its security updates.
func (d Distribution) Suites(codename string, s Source, cache string, log *slog.Logger) (Archives, error) {
	ring, err := d.KeyringOf(s)
	if err != nil {
		return nil, err
	}
	keys, err := openpgp.ReadKeyRing(bytes.NewReader(ring))
	if err != nil || len(keys) == 0 {
		return nil, badKeyring(err)
	}
	mirror := strings.TrimSuffix(cmp.Or(s.Mirror, d.Mirror), "/")
	security := d.security(mirror)
	if !s.Snapshot.IsZero() {
		if err := d.checkSnapshot(s.Snapshot); err != nil {
			return nil, err
		}
		service, at := strings.TrimSuffix(cmp.Or(s.Mirror, d.snapshots), "/"), s.Snapshot.UTC().Format(snapshotForm)
		mirror, security = service+d.snapshotMain+at, service+d.snapshotSec+at
	}
	client := Client()
	suite := func(mirror, name string) *Archive {
		return &Archive{Mirror: mirror, Suite: name, Components: d.Components, Keyring: keys, Cache: cache, HTTP: client, Log: log, AsOf: s.Snapshot}
	}
	return Archives{suite(mirror, codename), suite(mirror, codename+"-updates"), suite(security, codename+"-security")}, nil
}

// KeyringOf returns the keys that a source is verified with, binary.
func (d Distribution) KeyringOf(s Source) ([]byte, error) {
	if len(s.Keyring) == 0 {
		return d.Keyring, nil
	}
	if !bytes.Contains(s.Keyring, []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----")) {
		return s.Keyring, nil
	}
	block, err := armor.Decode(bytes.NewReader(s.Keyring))
	if err != nil {
		return nil, badKeyring(err)
	}
	return io.ReadAll(block.Body)
}

func badKeyring(err error) error {
	return hint.With(fmt.Errorf("reading the keyring: it holds no OpenPGP key (%v): %w", err, errdefs.ErrInvalidArgument),
		"give a file of public keys, as gpg --export writes it")
}

const snapshotForm = "20060102T150405Z"

// ParseSnapshot reads a date as people and the snapshot services write it, in UTC: 2026-01-15, 20260115 or 20260115T120000Z.
func ParseSnapshot(text string) (time.Time, error) {
	for _, form := range []string{time.DateOnly, "20060102", snapshotForm, time.RFC3339} {
		if t, err := time.Parse(form, text); err == nil {
			if t.After(time.Now()) {
				return t, hint.With(fmt.Errorf("snapshot of %s: it has not come yet: %w", text, errdefs.ErrInvalidArgument), "give a date of the past")
			}
			return t.UTC(), nil
		}
	}
	return time.Time{}, hint.With(fmt.Errorf("snapshot %q is no date: %w", text, errdefs.ErrInvalidArgument), "write it as 2026-01-15 or 20260115T120000Z")
}

func (d Distribution) checkSnapshot(t time.Time) error {
	if t.Before(d.firstSnapshot) {
		return hint.With(fmt.Errorf("snapshot of %s: %s has none before %s: %w", t.Format(time.DateOnly), d.snapshots, d.firstSnapshot.Format(time.DateOnly), errdefs.ErrInvalidArgument),
			"give a later date")
	}
	return nil
}
