package debian

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// releaseMax bounds a Release file: Debian's are 150 KB.
const releaseMax = 16 << 20

// Release is the verified list of what a suite holds.
type Release struct {
	Suite         string
	Codename      string
	Version       string
	Date          time.Time
	ValidUntil    time.Time // zero: for ever
	AcquireByHash bool
	files         map[string]file // by path below the suite's directory
}

type file struct {
	sha256 string
	size   int64
}

// Release fetches and verifies the suite's Release file. errdefs.ErrUnavailable: the mirror cannot be reached;
// ErrNotFound: it has no such suite; ErrDataLoss: the signature is not one of the keyring's; ErrFailedPrecondition: expired.
func (a *Archive) Release(ctx context.Context) (*Release, error) {
	text, err := a.verifiedRelease(ctx)
	if err != nil {
		return nil, fmt.Errorf("getting the release file of %s from %s: %w", a.Suite, a.Mirror, err)
	}
	r, err := parseRelease(text)
	if err != nil {
		return nil, fmt.Errorf("reading the release file of %s from %s: %w", a.Suite, a.Mirror, err)
	}
	if a.Suite != r.Suite && a.Suite != r.Codename {
		return nil, hint.With(
			fmt.Errorf("the mirror %s serves suite %q (%s) as %s: %w", a.Mirror, r.Suite, r.Codename, a.Suite, errdefs.ErrDataLoss),
			"use another mirror, such as %s", DefaultMirror)
	}
	now := time.Now()
	if !a.AsOf.IsZero() {
		now = a.AsOf
	}
	if !r.ValidUntil.IsZero() && now.After(r.ValidUntil) {
		return nil, hint.With(
			fmt.Errorf("the release file of %s on %s expired on %s: %w", a.Suite, a.Mirror, r.ValidUntil.Format(time.RFC1123), errdefs.ErrFailedPrecondition),
			"the mirror is out of date, or this machine's clock is wrong: it says %s; check it with date, or use another mirror", time.Now().UTC().Format(time.RFC1123))
	}
	a.Log.Debug("release verified", "suite", a.Suite, "version", r.Version, "date", r.Date)
	return r, nil
}

// verifiedRelease returns the signed text: InRelease, or Release with Release.gpg on mirrors without it.
func (a *Archive) verifiedRelease(ctx context.Context) ([]byte, error) {
	dir := a.Mirror + "/dists/" + a.Suite + "/"
	inline, err := a.small(ctx, dir+"InRelease")
	if err == nil {
		// Only the text inside the signature counts: what stands around it was signed by nobody.
		block, _ := clearsign.Decode(inline)
		if block == nil {
			return nil, badSignature(errors.New("InRelease is not a signed message"))
		}
		if err := verify(a.Keyring, a.AsOf, block.Bytes, block.ArmoredSignature.Body); err != nil {
			return nil, badSignature(err)
		}
		return block.Plaintext, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	text, err := a.small(ctx, dir+"Release")
	if err != nil {
		return nil, hint.With(err, "check the name of the suite, or use another mirror, such as %s", DefaultMirror)
	}
	sig, err := a.small(ctx, dir+"Release.gpg")
	if err != nil {
		return nil, err
	}
	block, err := armor.Decode(bytes.NewReader(sig))
	if err != nil {
		return nil, badSignature(fmt.Errorf("reading Release.gpg: %w", err))
	}
	if err := verify(a.Keyring, a.AsOf, text, block.Body); err != nil {
		return nil, badSignature(err)
	}
	return text, nil
}

func badSignature(err error) error {
	return hint.With(fmt.Errorf("verifying the signature: %w: %w", err, errdefs.ErrDataLoss),
		"the mirror or something on the way to it changed the file, or it is signed with keys newer than this Atoll: try %s, or a newer Atoll", DefaultMirror)
}

// verify accepts text when one of its signatures is good. Debian signs with the keys of several releases, of which a keyring may
// have some only; openpgp looks at the first known one and would stop there if that key had expired. A key that has expired since a
// snapshot was taken, asOf, is good for that.
func verify(keys openpgp.EntityList, asOf time.Time, text []byte, signatures io.Reader) error {
	var faults []error
	config := &packet.Config{}
	if !asOf.IsZero() {
		config.Time = func() time.Time { return asOf }
	}
	for packets := packet.NewReader(signatures); ; {
		p, err := packets.Next()
		if errors.Is(err, io.EOF) {
			return errors.Join(append(faults, errors.New("signed with no known key"))...)
		}
		if err != nil {
			return errors.Join(append(faults, err)...)
		}
		sig, ok := p.(*packet.Signature)
		if !ok {
			continue
		}
		var one bytes.Buffer
		if err := sig.Serialize(&one); err != nil {
			faults = append(faults, err)
			continue
		}
		_, err = openpgp.CheckDetachedSignature(keys, bytes.NewReader(text), &one, config)
		if err == nil {
			return nil
		}
		if !errors.Is(err, pgperrors.ErrUnknownIssuer) {
			faults = append(faults, err)
		}
	}
}

func parseRelease(text []byte) (*Release, error) {
	r := &Release{files: map[string]file{}}
	field := ""
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		line := s.Text()
		if strings.HasPrefix(line, " ") {
			if field != "SHA256" {
				continue
			}
			words := strings.Fields(line)
			if len(words) != 3 {
				return nil, fmt.Errorf("line %q: %w", line, errdefs.ErrDataLoss)
			}
			size, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil || len(words[0]) != 64 {
				return nil, fmt.Errorf("line %q: %w", line, errdefs.ErrDataLoss)
			}
			r.files[words[2]] = file{words[0], size}
			continue
		}
		name, value, _ := strings.Cut(line, ":")
		field, value = name, strings.TrimSpace(value)
		var err error
		switch name {
		case "Suite":
			r.Suite = value
		case "Codename":
			r.Codename = value
		case "Version":
			r.Version = value
		case "Date":
			r.Date, err = parseDate(value)
		case "Valid-Until":
			r.ValidUntil, err = parseDate(value)
		case "Acquire-By-Hash":
			r.AcquireByHash = value == "yes"
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
		}
	}
	if r.Date.IsZero() || len(r.files) == 0 {
		return nil, fmt.Errorf("it has no date or no SHA256 list: %w", errdefs.ErrDataLoss)
	}
	return r, nil
}

func parseDate(s string) (time.Time, error) {
	// Debian writes UTC; the day may have one digit or two.
	t, err := time.Parse("Mon, _2 Jan 2006 15:04:05 MST", s)
	if err != nil {
		return t, err
	}
	if !slices.Contains([]string{"UTC", "GMT"}, t.Location().String()) {
		return t, fmt.Errorf("%q is not in UTC", s)
	}
	return t.UTC(), nil
}
