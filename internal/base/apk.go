package base

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// Alpine's files, as apk-tools 2 writes them (https://wiki.alpinelinux.org/wiki/Apk_spec): gzip streams one after another, each a tar.
// An index is a signature and the index, whose bytes it signs. A package is a signature, the control data, whose SHA1 the index has, and
// the files, whose SHA256 the control data has: so a signed index vouches for every byte.

// indexMax bounds an index, unpacked: that of v3.22/community is 10 MB.
const indexMax = 256 << 20

// apkPackage is one package of an index.
type apkPackage struct {
	name, version string
	size          int64
	sum           string // base64 of the control data's SHA1
	depends       []string
	provides      []string
	installIf     []string
	priority      int // among those that provide the same
	built         time.Time
	stanza        string // as in the index, for the installed database
	url           string
}

// readKeys reads RSA public keys in PEM by name; a key of no name is tried for every signature.
func readKeys(data []byte) ([]*rsa.PublicKey, error) {
	var keys []*rsa.PublicKey
	for len(data) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading the keyring: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if k, ok := key.(*rsa.PublicKey); ok {
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		return nil, hint.With(fmt.Errorf("reading the keyring: it holds no RSA public key in PEM: %w", errdefs.ErrInvalidArgument), "give the *.rsa.pub files of the archive, one after another")
	}
	return keys, nil
}

// verifyIndex returns the part of an index file that one of the keys has signed.
func verifyIndex(file []byte, keys []*rsa.PublicKey) ([]byte, error) {
	r := bytes.NewReader(file)
	zr, err := gzip.NewReader(r)
	if err != nil {
		return nil, fmt.Errorf("it is no gzip: %w: %w", err, errdefs.ErrDataLoss)
	}
	zr.Multistream(false)
	head, err := io.ReadAll(io.LimitReader(zr, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("reading the signature: %w: %w", err, errdefs.ErrDataLoss)
	}
	signed := file[len(file)-r.Len():]
	tr := tar.NewReader(bytes.NewReader(head))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("it is signed with no known key: %w", errdefs.ErrDataLoss)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the signature: %w: %w", err, errdefs.ErrDataLoss)
		}
		signature, err := io.ReadAll(io.LimitReader(tr, 1<<16))
		if err != nil {
			return nil, fmt.Errorf("reading the signature: %w: %w", err, errdefs.ErrDataLoss)
		}
		for _, key := range keys {
			switch {
			case strings.HasPrefix(h.Name, ".SIGN.RSA."):
				sum := sha1.Sum(signed)
				err = rsa.VerifyPKCS1v15(key, crypto.SHA1, sum[:], signature)
			case strings.HasPrefix(h.Name, ".SIGN.RSA256."):
				sum := sha256.Sum256(signed)
				err = rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], signature)
			default:
				continue
			}
			if err == nil {
				return signed, nil
			}
		}
	}
}

// parseIndex reads a verified index.
func parseIndex(signed []byte, repository string) ([]apkPackage, error) {
	zr, err := gzip.NewReader(bytes.NewReader(signed))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	for tr := tar.NewReader(io.LimitReader(zr, indexMax)); ; {
		h, err := tr.Next()
		if err != nil {
			return nil, fmt.Errorf("looking for APKINDEX: %w: %w", err, errdefs.ErrDataLoss)
		}
		if h.Name != "APKINDEX" {
			continue
		}
		text, err := io.ReadAll(tr)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
		}
		var all []apkPackage
		for stanza := range strings.SplitSeq(string(text), "\n\n") {
			if strings.TrimSpace(stanza) == "" {
				continue
			}
			p, err := parseStanza(stanza, repository)
			if err != nil {
				return nil, err
			}
			all = append(all, p)
		}
		return all, nil
	}
}

func parseStanza(stanza, repository string) (apkPackage, error) {
	p := apkPackage{stanza: strings.Trim(stanza, "\n")}
	for line := range strings.SplitSeq(p.stanza, "\n") {
		field, value, _ := strings.Cut(line, ":")
		switch field {
		case "P":
			p.name = value
		case "V":
			p.version = value
		case "C":
			p.sum, _ = strings.CutPrefix(value, "Q1")
		case "S":
			p.size, _ = strconv.ParseInt(value, 10, 64) // 0 is refused below
		case "D":
			p.depends = strings.Fields(value)
		case "p":
			p.provides = strings.Fields(value)
		case "i":
			p.installIf = strings.Fields(value)
		case "k":
			p.priority, _ = strconv.Atoi(value)
		case "t":
			seconds, _ := strconv.ParseInt(value, 10, 64)
			p.built = time.Unix(seconds, 0).UTC()
		}
	}
	if sum, err := base64.StdEncoding.DecodeString(p.sum); err != nil || len(sum) != sha1.Size || p.size <= 0 || p.version == "" || !packageForm.MatchString(p.name) || strings.ContainsAny(p.version, "/\x00") {
		return p, fmt.Errorf("package %q has a bad name, version, size or checksum: %w", p.name, errdefs.ErrDataLoss)
	}
	p.url = repository + "/" + p.name + "-" + p.version + ".apk"
	return p, nil
}

// bare is a dependency without its version, and whether it is one to avoid.
func bare(dependency string) (name string, avoid bool) {
	name, avoid = strings.CutPrefix(dependency, "!")
	if i := strings.IndexAny(name, "<>=~"); i >= 0 {
		name = name[:i]
	}
	return name, avoid
}

// resolve returns the named packages with all they depend on, by name. Versions are not compared: one release of Alpine has one of each.
func resolve(index []apkPackage, names []string) ([]apkPackage, error) {
	byName, providers := map[string]*apkPackage{}, map[string][]*apkPackage{}
	for i := range index {
		p := &index[i]
		if byName[p.name] == nil {
			byName[p.name] = p
		}
		for _, v := range p.provides {
			name, _ := bare(v)
			providers[name] = append(providers[name], p)
		}
	}
	chosen := map[string]*apkPackage{}
	find := func(name string) *apkPackage {
		if p := byName[name]; p != nil {
			return p
		}
		best := (*apkPackage)(nil)
		for _, p := range providers[name] {
			if chosen[p.name] != nil {
				return p
			}
			if best == nil || p.priority > best.priority || p.priority == best.priority && p.name < best.name {
				best = p
			}
		}
		return best
	}
	var missing []string
	var add func(name, of string)
	add = func(name, of string) {
		p := find(name)
		switch {
		case p == nil && of == "":
			missing = append(missing, name)
		case p == nil:
			missing = append(missing, name+" (for "+of+")")
		case chosen[p.name] == nil:
			chosen[p.name] = p
			for _, d := range p.depends {
				if d, avoid := bare(d); !avoid {
					add(d, p.name)
				}
			}
		}
	}
	for _, n := range names {
		add(n, "")
	}
	for again := true; again; { // what comes along with others
		again = false
		for i := range index {
			p := &index[i]
			if len(p.installIf) > 0 && chosen[p.name] == nil && byName[p.name] == p && !slices.ContainsFunc(p.installIf, func(d string) bool {
				name, avoid := bare(d)
				return avoid || chosen[name] == nil
			}) {
				add(p.name, "")
				again = true
			}
		}
	}
	if len(missing) > 0 {
		return nil, noSuchPackages(strings.Join(missing, ", "), "Alpine")
	}
	var all []apkPackage
	for _, p := range chosen {
		all = append(all, *p)
	}
	slices.SortFunc(all, func(a, b apkPackage) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// hashed is a byte reader, so that gzip takes no more than its own stream, and hashes what is taken.
type hashed struct {
	r *bufio.Reader
	h hash.Hash
}

func (r *hashed) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.h.Write(p[:n])
	return n, err
}

func (r *hashed) ReadByte() (byte, error) {
	b, err := r.r.ReadByte()
	if err == nil {
		r.h.Write([]byte{b})
	}
	return b, err
}

// readPackage calls fn for each of a package's files and verifies it by the index's word; only after that are they good. scripts are the
// names of its install scripts.
func readPackage(p apkPackage, file io.Reader, fn func(h *tar.Header, content io.Reader) error) (scripts []string, err error) {
	raw := &hashed{r: bufio.NewReaderSize(file, 1<<16)}
	stream := func(h hash.Hash, do func(*tar.Reader) error) error {
		raw.h = h
		zr, err := gzip.NewReader(raw)
		if err != nil {
			return err
		}
		zr.Multistream(false)
		if err := do(tar.NewReader(zr)); err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, zr)
		return err
	}
	if err := stream(sha1.New(), func(*tar.Reader) error { return nil }); err != nil {
		return nil, corrupt(p, err)
	}
	control, want := sha1.New(), ""
	err = stream(control, func(tr *tar.Reader) error {
		return eachEntry(tr, func(h *tar.Header) error {
			switch name, isScript := strings.CutPrefix(h.Name, "."); {
			case h.Name == ".PKGINFO":
				for s := bufio.NewScanner(io.LimitReader(tr, 1<<20)); s.Scan(); {
					if k, v, _ := strings.Cut(s.Text(), " = "); k == "datahash" {
						want = v
					}
				}
			case isScript:
				scripts = append(scripts, name)
			}
			return nil
		})
	})
	if err == nil && base64.StdEncoding.EncodeToString(control.Sum(nil)) != p.sum {
		err = errors.New("its control data is not what the index says")
	}
	if err != nil {
		return nil, corrupt(p, err)
	}
	data := sha256.New()
	var stopped error
	err = stream(data, func(tr *tar.Reader) error {
		return eachEntry(tr, func(h *tar.Header) error {
			stopped = fn(h, tr)
			return stopped
		})
	})
	if stopped != nil {
		return nil, stopped
	}
	if err == nil && hex.EncodeToString(data.Sum(nil)) != want {
		err = errors.New("its files are not what its control data says")
	}
	if err != nil {
		return nil, corrupt(p, err)
	}
	return scripts, nil
}

func corrupt(p apkPackage, err error) error {
	return fmt.Errorf("reading package %s-%s: %w: %w", p.name, p.version, err, errdefs.ErrDataLoss)
}

// eachEntry takes a tar that may end without its two empty blocks, as all but a package's last do.
func eachEntry(tr *tar.Reader, fn func(h *tar.Header) error) error {
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if clean := path.Clean(h.Name); clean == ".." || strings.HasPrefix(clean, "../") || path.IsAbs(clean) {
			return fmt.Errorf("entry %q leads out of the tree", h.Name)
		}
		if err := fn(h); err != nil {
			return err
		}
	}
}
