package debian

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
)

// mirror is a tiny archive on loopback with one package, signed with a key of its own.
type mirror struct {
	*Archive
	files    map[string][]byte // by path; a test may spoil them
	requests []string
	cut      int // the next response for a .deb ends after so many bytes
}

// quick makes keys fast, RSA's take a second; and four days old, with all they sign.
var quick = &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return time.Now().Add(-96 * time.Hour) }}

const debPath = "pool/main/h/hello/hello_2.0-1_amd64.deb"

func newMirror(t *testing.T, change func(release string) string) *mirror {
	t.Helper()
	key, err := openpgp.NewEntity("test archive", "", "test@example.org", quick)
	if err != nil {
		t.Fatal(err)
	}
	m := &mirror{files: map[string][]byte{debPath: makeDeb(t)}}
	deb := m.files[debPath]
	index := gz(fmt.Appendf(nil, `Package: hello-old
Version: 1.0
Filename: x
Size: 1
SHA256: %x

Package: hello
Version: 2.0-1
Depends: libc6 (>= 2.36), foo | bar, baz:any
Filename: %s
Size: %d
SHA256: %x
Description: says
 hello
`, sha256.Sum256(nil), debPath, len(deb), sha256.Sum256(deb)))
	release := fmt.Sprintf("Origin: Debian\nSuite: oldstable\nVersion: 12.9\nCodename: bookworm\nDate: %s\nValid-Until: %s\nAcquire-By-Hash: yes\nMD5Sum:\n abc 1 x\nSHA256:\n %x %d main/binary-amd64/Packages.gz\n",
		time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 MST"), time.Now().UTC().Add(time.Hour).Format("Mon, 02 Jan 2006 15:04:05 MST"),
		sha256.Sum256(index), len(index))
	if change != nil {
		release = change(release)
	}
	m.files["dists/bookworm/InRelease"] = sign(t, key, release)
	m.files[fmt.Sprintf("dists/bookworm/main/binary-amd64/by-hash/SHA256/%x", sha256.Sum256(index))] = index

	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/debian/")
		m.requests = append(m.requests, path+" "+r.Header.Get("Range"))
		data, ok := m.files[path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		if strings.HasSuffix(path, ".deb") && m.cut > 0 {
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.Write(data[:m.cut])
			m.cut = 0
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		http.ServeContent(w, r, path, time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(srv.Close)
	m.Archive = &Archive{
		Mirror: srv.URL + "/debian", Suite: "bookworm", Components: []string{"main"}, Keyring: openpgp.EntityList{key},
		Cache: t.TempDir(), HTTP: Client(), Log: slog.New(slog.DiscardHandler),
	}
	return m
}

func sign(t *testing.T, key *openpgp.Entity, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := clearsign.Encode(&b, key.PrivateKey, quick)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, text)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func makeDeb(t *testing.T) []byte {
	t.Helper()
	var data bytes.Buffer
	tw := tar.NewWriter(&data)
	tw.WriteHeader(&tar.Header{Name: "./usr/bin/hello", Mode: 0o755, Size: 5})
	io.WriteString(tw, "hello")
	tw.Close()
	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	for _, m := range []struct {
		name string
		data []byte
	}{{"debian-binary", []byte("2.0")}, {"control.tar.gz", gz(nil)}, {"data.tar.gz", gz(data.Bytes())}} {
		fmt.Fprintf(&b, "%-16s%-12d%-6d%-6d%-8o%-10d`\n%s", m.name, 0, 0, 0, 0o644, len(m.data), m.data)
		if len(m.data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

func (m *mirror) hello(t *testing.T) Package {
	t.Helper()
	p, err := Archives{m.Archive}.Get(t.Context(), "amd64", "hello")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFetchVerifiesAndUnpacks(t *testing.T) {
	m := newMirror(t, nil)
	p := m.hello(t)
	if diff := cmp.Diff([]string{"libc6", "foo", "baz"}, p.DependsOn()); diff != "" {
		t.Error(diff)
	}
	var last int64
	path, err := p.Fetch(t.Context(), func(done, total int64) {
		if total != p.Size || done < last {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last = done
	})
	if err != nil || last != p.Size {
		t.Fatal(err, last)
	}
	files := map[string]string{}
	err = Walk(path, func(h *tar.Header, r io.Reader) error {
		data, err := io.ReadAll(r)
		files[h.Name] = string(data)
		return err
	})
	if diff := cmp.Diff(map[string]string{"usr/bin/hello": "hello"}, files); err != nil || diff != "" {
		t.Error(err, diff)
	}
	asked := len(m.requests)
	if _, err := p.Fetch(t.Context(), nil); err != nil || len(m.requests) != asked {
		t.Errorf("a cached package was fetched again: %v %v", err, m.requests[asked:])
	}
	left, _ := filepath.Glob(filepath.Join(m.Cache, "*.part"))
	if len(left) > 0 {
		t.Error("left behind:", left)
	}
}

func TestFetchResumes(t *testing.T) {
	m := newMirror(t, nil)
	p := m.hello(t)
	m.cut = 100
	if _, err := p.Fetch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if got, want := m.requests[len(m.requests)-1], debPath+" bytes=100-"; got != want {
		t.Errorf("last request %q, want %q", got, want)
	}
}

func TestDamagedCacheIsFetchedAgain(t *testing.T) {
	m := newMirror(t, nil)
	p := m.hello(t)
	path, err := p.Fetch(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(path, []byte("spoilt"), 0o644)
	if _, err := p.Fetch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(path); !bytes.Equal(data, m.files[debPath]) {
		t.Error("the damaged file is still there")
	}
}

func TestTwoDownloadsAtOnce(t *testing.T) {
	p := newMirror(t, nil).hello(t)
	errs := make(chan error)
	for range 4 {
		go func() {
			_, err := p.Fetch(context.Background(), nil)
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestFaults(t *testing.T) {
	inRelease := "dists/bookworm/InRelease"
	edit := func(old, new string) func(*mirror) {
		return func(m *mirror) { m.files[inRelease] = bytes.Replace(m.files[inRelease], []byte(old), []byte(new), 1) }
	}
	for name, tc := range map[string]struct {
		release func(string) string
		spoil   func(*mirror)
		class   func(error) bool
		says    string
	}{
		"mirror unreachable": {
			spoil: func(m *mirror) { m.Mirror = "http://127.0.0.1:1/debian" },
			class: errdefs.IsUnavailable, says: "connection refused",
		},
		"no such suite": {
			spoil: func(m *mirror) { m.Suite = "woody" },
			class: errdefs.IsNotFound, says: "dists/woody/Release",
		},
		"changed after signing": {spoil: edit("Version: 12.9", "Version: 12.8"), class: errdefs.IsDataLoss, says: "signature"},
		"not signed": {
			spoil: func(m *mirror) { m.files[inRelease] = []byte("Suite: bookworm\n") },
			class: errdefs.IsDataLoss, says: "not a signed message",
		},
		"signed by a stranger": {
			spoil: func(m *mirror) { m.Keyring, _ = Keyring() },
			class: errdefs.IsDataLoss, says: "no known key",
		},
		"expired": {
			release: func(r string) string {
				i := strings.Index(r, "Valid-Until")
				return r[:i] + "Valid-Until: Sat, 1 Jan 2022 00:00:00 UTC" + r[i+strings.IndexByte(r[i:], '\n'):]
			},
			class: errdefs.IsFailedPrecondition, says: "expired on Sat, 01 Jan 2022",
		},
		"another suite's release": {
			release: func(r string) string { return strings.Replace(r, "Codename: bookworm", "Codename: trixie", 1) },
			class:   errdefs.IsDataLoss, says: `serves suite "oldstable" (trixie) as bookworm`,
		},
		"index changed": {
			spoil: func(m *mirror) {
				for path, data := range m.files {
					if strings.Contains(path, "by-hash") {
						data[len(data)-1] ^= 1
					}
				}
			},
			class: errdefs.IsDataLoss, says: "the index says",
		},
		"package changed": {
			spoil: func(m *mirror) { m.files[debPath][70] ^= 1 },
			class: errdefs.IsDataLoss, says: "the index says",
		},
		"package longer": {
			spoil: func(m *mirror) { m.files[debPath] = append(m.files[debPath], 0) },
			class: errdefs.IsDataLoss, says: "longer",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMirror(t, tc.release)
			if tc.spoil != nil {
				tc.spoil(m)
			}
			p, err := Archives{m.Archive}.Get(t.Context(), "amd64", "hello")
			if err == nil {
				_, err = p.Fetch(t.Context(), nil)
			}
			if err == nil || !tc.class(err) || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("got %v", err)
			}
			if name != "package longer" && hint.Of(err) == "" {
				t.Errorf("no hint: %v", err)
			}
			debs, _ := filepath.Glob(filepath.Join(m.Cache, "*.deb"))
			if len(debs) > 0 {
				t.Errorf("a bad package is in the cache: %v", debs)
			}
		})
	}
}

func TestDecompress(t *testing.T) {
	packed := map[string]string{
		"plain": "Package: hello\n",
		"gzip":  string(gz([]byte("Package: hello\n"))),
		"xz": "\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F\x02\x00!\x01\x1c\x00\x00\x00\x10\xcfX\xcc\x01\x00\x0ePackage: hello\n\x00\x00\xf8\xc3x\x0b" +
			"\x19\xee\xb3S\x00\x01'\x0f\xdf\x1a\xfcj\x1f\xb6\xf3}\x01\x00\x00\x00\x00\x04YZ",
	}
	for name, data := range packed {
		r, err := Decompress(strings.NewReader(data))
		if err != nil {
			t.Fatal(name, err)
		}
		if got, err := io.ReadAll(r); err != nil || string(got) != "Package: hello\n" {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
}

func TestReleaseWithDetachedSignature(t *testing.T) {
	m := newMirror(t, nil)
	inline := m.files["dists/bookworm/InRelease"]
	block, _ := clearsign.Decode(inline)
	var sig bytes.Buffer
	if err := openpgp.ArmoredDetachSign(&sig, m.Keyring[0], bytes.NewReader(block.Plaintext), nil); err != nil {
		t.Fatal(err)
	}
	delete(m.files, "dists/bookworm/InRelease")
	m.files["dists/bookworm/Release"], m.files["dists/bookworm/Release.gpg"] = block.Plaintext, sig.Bytes()
	if _, err := m.Release(t.Context()); err != nil {
		t.Error(err)
	}
	m.files["dists/bookworm/Release"] = bytes.Replace(block.Plaintext, []byte("12.9"), []byte("12.8"), 1)
	if _, err := m.Release(t.Context()); !errdefs.IsDataLoss(err) {
		t.Errorf("a changed Release passed: %v", err)
	}
}

// A signature by a key that has expired must not hide the good one after it.
func TestOneGoodSignatureIsEnough(t *testing.T) {
	m := newMirror(t, nil)
	text := []byte("text")
	var sigs bytes.Buffer
	stranger, err := openpgp.NewEntity("stranger", "", "s@example.org", quick)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []*openpgp.Entity{stranger, m.Keyring[0]} {
		if err := openpgp.DetachSign(&sigs, key, bytes.NewReader(text), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := verify(m.Keyring, time.Time{}, text, bytes.NewReader(sigs.Bytes())); err != nil {
		t.Error(err)
	}
	if err := verify(m.Keyring, time.Time{}, []byte("other"), bytes.NewReader(sigs.Bytes())); err == nil {
		t.Error("a changed text passed")
	}
}

func TestEmbeddedKeyring(t *testing.T) {
	keys, err := Keyring()
	if err != nil {
		t.Fatal(err)
	}
	good := 0
	for _, k := range keys {
		for _, id := range k.Identities {
			if strings.Contains(id.Name, "(12/bookworm)") && !k.PrimaryKey.KeyExpired(id.SelfSignature, time.Now().AddDate(0, 6, 0)) {
				good++
			}
		}
	}
	if good < 3 {
		t.Errorf("%d keys of bookworm are good for six more months, want 3: renew debian-archive-keyring.gpg", good)
	}
}

// TestKeyringsComeFromDebian compares the keys that are not Debian's with those that its signed archive has.
func TestKeyringsComeFromDebian(t *testing.T) {
	if testing.Short() {
		t.Skip("short: it fetches an index")
	}
	suites, err := Suites("", "trixie", t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]map[string]string{
		"ubuntu-keyring": {"usr/share/keyrings/ubuntu-archive-keyring.gpg": "ubuntu-archive-keyring.gpg"},
		"distribution-gpg-keys": {
			"usr/share/distribution-gpg-keys/alpine-linux/alpine-devel@lists.alpinelinux.org-4a6a0840.rsa.pub": "",
			"usr/share/distribution-gpg-keys/alpine-linux/alpine-devel@lists.alpinelinux.org-5243ef4b.rsa.pub": "",
			"usr/share/distribution-gpg-keys/alpine-linux/alpine-devel@lists.alpinelinux.org-5261cecb.rsa.pub": "",
			"usr/share/distribution-gpg-keys/alpine-linux/alpine-devel@lists.alpinelinux.org-6165ee59.rsa.pub": "",
			"usr/share/distribution-gpg-keys/alpine-linux/alpine-devel@lists.alpinelinux.org-58199dcc.rsa.pub": "",
			"usr/share/distribution-gpg-keys/alpine-linux/alpine-devel@lists.alpinelinux.org-616ae350.rsa.pub": "",
		},
	} {
		pkg, err := suites[:1].Get(t.Context(), "amd64", name)
		if errdefs.IsUnavailable(err) {
			t.Skipf("no Debian mirror: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		deb, err := pkg.Fetch(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		err = Walk(deb, func(h *tar.Header, r io.Reader) error {
			ours, ok := want[h.Name]
			if !ok {
				return nil
			}
			delete(want, h.Name)
			if ours == "" {
				ours = "../base/alpine-keys/" + filepath.Base(h.Name)
			}
			theirs, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			have, err := os.ReadFile(ours)
			if err != nil || !bytes.Equal(have, theirs) {
				t.Errorf("%s is not %s of Debian's %s: %v", ours, h.Name, name, err)
			}
			return nil
		})
		if err != nil || len(want) > 0 {
			t.Errorf("%s: %v, without %v", name, err, want)
		}
	}
}

func TestSources(t *testing.T) {
	urls := func(d Distribution, s Source) (out []string) {
		t.Helper()
		suites, err := d.Suites("x", s, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range suites {
			out = append(out, a.Mirror+" "+a.Suite)
		}
		return out
	}
	at := time.Date(2026, 1, 15, 12, 30, 0, 0, time.UTC)
	for _, c := range []struct{ got, want []string }{
		{urls(Debian(), Source{}), []string{"http://deb.debian.org/debian x", "http://deb.debian.org/debian x-updates", "http://deb.debian.org/debian-security x-security"}},
		{urls(Debian(), Source{Mirror: "http://m/debian/"}), []string{"http://m/debian x", "http://m/debian x-updates", "http://m/debian-security x-security"}},
		{urls(Debian(), Source{Snapshot: at}), []string{"http://snapshot.debian.org/archive/debian/20260115T123000Z x", "http://snapshot.debian.org/archive/debian/20260115T123000Z x-updates",
			"http://snapshot.debian.org/archive/debian-security/20260115T123000Z x-security"}},
		{urls(Ubuntu("amd64"), Source{})[:1], []string{"http://archive.ubuntu.com/ubuntu x"}},
		{urls(Ubuntu("arm64"), Source{})[2:], []string{"http://ports.ubuntu.com/ubuntu-ports x-security"}},
		{urls(Ubuntu("arm64"), Source{Mirror: "http://s/", Snapshot: at})[2:], []string{"http://s/ubuntu/20260115T123000Z x-security"}},
	} {
		if diff := cmp.Diff(c.want, c.got); diff != "" {
			t.Error(diff)
		}
	}
	for _, text := range []string{"2026-01-15", "20260115", "20260115T000000Z", "2026-01-15T00:00:00Z"} {
		if got, err := ParseSnapshot(text); err != nil || !got.Equal(at.Truncate(24*time.Hour)) {
			t.Errorf("%s: %s %v", text, got, err)
		}
	}
	for _, text := range []string{"", "yesterday", "2026-02-30", "20261", "2999-01-01"} {
		if _, err := ParseSnapshot(text); !errdefs.IsInvalidArgument(err) || hint.Of(err) == "" {
			t.Errorf("%q: %v", text, err)
		}
	}
	for name, s := range map[string]Source{"too early": {Snapshot: at.AddDate(-4, 0, 0)}, "no key": {Keyring: []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----\n")}, "rubbish": {Keyring: []byte("x")}} {
		if _, err := Ubuntu("amd64").Suites("x", s, "", nil); !errdefs.IsInvalidArgument(err) || hint.Of(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSnapshotOutlivesItsDates: what had not expired when a snapshot was taken is good.
func TestSnapshotOutlivesItsDates(t *testing.T) {
	m := newMirror(t, func(release string) string {
		before, after, _ := strings.Cut(release, "Valid-Until: ")
		_, after, _ = strings.Cut(after, "\n")
		return before + "Valid-Until: " + time.Now().UTC().Add(-48*time.Hour).Format("Mon, 02 Jan 2006 15:04:05 MST") + "\n" + after
	})
	if _, err := m.Release(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an expired release: %v", err)
	}
	m.AsOf = time.Now().Add(-72 * time.Hour)
	if _, err := m.Release(t.Context()); err != nil {
		t.Errorf("a snapshot of the day before: %v", err)
	}
	m.AsOf = time.Now().Add(-120 * time.Hour)
	if _, err := m.Release(t.Context()); !errdefs.IsDataLoss(err) {
		t.Errorf("a snapshot older than its signature: %v", err)
	}
}

func TestCompareVersions(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want int
	}{
		{"6.1.192-2", "6.1.176-1", 1},
		{"1:1.35.0-4", "2.0", 1},
		{"1.0~rc1", "1.0", -1},
		{"1.0", "1.0-0", 0},
		{"1.0-1+b1", "1.0-1", 1},
		{"1.09", "1.9", 0},
		{"1.0a", "1.0+", -1},
		{"6.1.10", "6.1.9", 1},
		{"1.35.0-4+deb12u1+b1", "1.35.0-4+deb12u2", -1},
	} {
		if got := CompareVersions(tc.a, tc.b); got != tc.want {
			t.Errorf("%s against %s: %d, want %d", tc.a, tc.b, got, tc.want)
		}
		if got := CompareVersions(tc.b, tc.a); got != -tc.want {
			t.Errorf("%s against %s: %d, want %d", tc.b, tc.a, got, -tc.want)
		}
	}
}
