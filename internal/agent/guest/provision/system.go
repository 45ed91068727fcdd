package provision

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const sshDir = "/etc/ssh"

// sshHostKeys writes the machine's keys and removes those that came with the image: every machine of it would have them.
func (r *Provisioner) sshHostKeys() error {
	if !r.root.isDir(sshDir) {
		if !r.late && r.wantsPackages() {
			r.again = append(r.again, part{"ssh host keys", true, r.sshHostKeys})
		}
		return nil
	}
	var mine []string
	for _, k := range r.GetSshHostKeys() {
		name := "ssh_host_" + k.GetType() + "_key"
		if !slices.Contains([]string{"ed25519", "ecdsa", "rsa"}, k.GetType()) {
			return element("SSH host key", k.GetType(), errors.New("not a type: ed25519, ecdsa or rsa"))
		}
		if err := r.root.put(path.Join(sshDir, name), k.GetPrivate(), 0o600); err != nil {
			return element("SSH host key", k.GetType(), err)
		}
		mine = append(mine, name)
		if len(k.GetPublic()) == 0 {
			continue
		}
		if err := r.root.put(path.Join(sshDir, name+".pub"), append(bytes.TrimSpace(k.GetPublic()), '\n'), 0o644); err != nil {
			return element("SSH host key", k.GetType(), err)
		}
		mine = append(mine, name+".pub")
	}
	names, err := r.root.list(sshDir)
	if err != nil {
		return fmt.Errorf("listing %s: %w", sshDir, err)
	}
	for _, name := range names {
		if strings.HasPrefix(name, "ssh_host_") && strings.Contains(name, "_key") && !slices.Contains(mine, name) {
			if err := r.root.remove(path.Join(sshDir, name)); err != nil {
				return fmt.Errorf("removing the image's SSH host key %s: %w", name, err)
			}
		}
	}
	return nil
}

// timezone says which zone local time is of: by a link to the image's own data, else by the host's.
func (r *Provisioner) timezone() error {
	zone := r.GetTimezone()
	if !only(zone, "_+-/") || path.Clean("/"+zone) != "/"+zone {
		return element("timezone", zone, errors.New("not a name of a zone"))
	}
	file := "/usr/share/zoneinfo/" + zone
	var err error
	switch {
	case r.root.exists(file):
		err = r.root.link("/etc/localtime", file)
	case bytes.HasPrefix(r.GetZone(), []byte("TZif")):
		err = r.root.put("/etc/localtime", r.GetZone(), 0o644)
	case zone == "UTC" || zone == "Etc/UTC": // what it is without a file
		err = r.root.remove("/etc/localtime")
	default:
		err = errors.New("the image does not have it, and no data came with the configuration")
	}
	if err == nil {
		err = r.root.put("/etc/timezone", []byte(zone+"\n"), 0o644)
	}
	return element("timezone", zone, err)
}

// locale sets the language of what starts later, and makes its data where the image can and has not.
func (r *Provisioner) locale() error {
	name := r.GetLocale()
	if language, charset, modifier := splitLocale(name); language == "" || !only(language, "_") || !only(charset, "-") || !only(modifier, "") {
		return element("locale", name, errors.New("not a name of a locale, as de_DE.UTF-8"))
	}
	have, err := r.haveLocale(name)
	if err == nil && !have {
		if r.binary("localedef") == "" && !r.late && r.wantsPackages() { // as Debian's package locales
			r.again = append(r.again, part{"locale", true, r.locale})
			return nil
		}
		err = r.makeLocale(name)
	}
	if err != nil {
		return element("locale", name, err)
	}
	for _, file := range []string{"/etc/locale.conf", "/etc/default/locale"} {
		if err := r.root.put(file, []byte("LANG="+name+"\n"), 0o644); err != nil {
			return element("locale", name, err)
		}
	}
	return nil
}

// splitLocale takes de_DE.UTF-8@euro apart.
func splitLocale(name string) (language, charset, modifier string) {
	name, modifier, _ = strings.Cut(name, "@")
	language, charset, _ = strings.Cut(name, ".")
	return language, charset, modifier
}

// haveLocale says whether programs of the image can use a locale.
func (r *Provisioner) haveLocale(name string) (bool, error) {
	language, charset, modifier := splitLocale(name)
	// As glibc names them in files: de_DE.utf8.
	normal := language
	if charset != "" {
		normal += "." + strings.ToLower(strings.ReplaceAll(charset, "-", ""))
	}
	if modifier != "" {
		normal += "@" + modifier
	}
	if slices.Contains([]string{"C", "POSIX", "C.utf8"}, normal) {
		return true, nil
	}
	libs, err := r.root.list("/lib")
	if err != nil {
		return false, err
	}
	if slices.ContainsFunc(libs, func(lib string) bool { return strings.HasPrefix(lib, "ld-musl-") }) && r.binary("localedef") == "" {
		return true, nil // musl knows UTF-8 only, by whatever name
	}
	for _, n := range []string{name, normal} {
		if r.root.isDir("/usr/lib/locale/" + n) {
			return true, nil
		}
	}
	return r.inArchive("/usr/lib/locale/locale-archive", normal)
}

// inArchive looks for a name in glibc's archive, which may have hundreds of MB.
func (r *Provisioner) inArchive(file, name string) (bool, error) {
	f, err := r.root.openFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	want := []byte("\x00" + name + "\x00")
	buf := make([]byte, 0, 64<<10)
	for {
		n, err := f.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if bytes.Contains(buf, want) {
			return true, nil
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return false, err
		}
		keep := min(len(want)-1, len(buf))
		buf = buf[:copy(buf, buf[len(buf)-keep:])]
	}
}

func (r *Provisioner) makeLocale(name string) error {
	localedef := r.binary("localedef")
	if localedef == "" {
		return errors.New("the image does not have it, and no localedef to make it; C.UTF-8 is always there")
	}
	language, charset, modifier := splitLocale(name)
	if modifier != "" {
		language += "@" + modifier
	}
	if charset == "" {
		charset = "ISO-8859-1" // what a name without one means
	}
	if !r.root.exists("/usr/share/i18n/locales/" + language) {
		return fmt.Errorf("the image does not have it, nor the definition %s to make it from; C.UTF-8 is always there", language)
	}
	if err := r.root.makeDir("/usr/lib/locale"); err != nil {
		return err
	}
	if err := r.exec("localedef", []string{localedef, "-c", "-i", language, "-f", charset, name}, nil, r.o.Output); err != nil {
		// It also says 1 when it has only warned.
		if have, herr := r.haveLocale(name); herr != nil || !have {
			return err
		}
	}
	return nil
}

func (t *tree) makeDir(name string) error {
	fd, err := t.makeDirs(name, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// authorityBundles are the files that programs read; internal/build knows the same ones.
var authorityBundles = []string{
	"/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	"/etc/pki/tls/certs/ca-bundle.crt",
	"/etc/ssl/ca-bundle.pem",
	"/etc/ssl/cert.pem",
}

// authorityAnchors are where the distributions' tools take a machine's own authorities from, and what tells that it is theirs.
var authorityAnchors = []struct{ dir, sign, tool string }{
	{"/etc/pki/ca-trust/source/anchors", "/etc/pki/ca-trust/source", "update-ca-trust"},
	{"/etc/pki/trust/anchors", "/etc/pki/trust", "update-ca-certificates"},
	{"/etc/ca-certificates/trust-source/anchors", "/etc/ca-certificates/trust-source", "update-ca-trust"},
	{"/usr/local/share/ca-certificates", "", "update-ca-certificates"}, // Debian, Alpine, and wherever the package may still come
}

const maxBundle = 16 << 20

// authorities makes the image trust more certificate authorities: as anchors, so that they last, and in the bundles that are there.
func (r *Provisioner) authorities() error {
	var certs [][]byte
	for i, data := range r.GetCaCertificates() {
		one, err := normalPEM(data)
		if err != nil {
			return fmt.Errorf("certificate authority %d: %w", i+1, err)
		}
		certs = append(certs, one)
	}
	at := slices.IndexFunc(authorityAnchors, func(a struct{ dir, sign, tool string }) bool { return a.sign == "" || r.root.isDir(a.sign) })
	anchors := authorityAnchors[at]
	for i, cert := range certs {
		if err := r.root.put(path.Join(anchors.dir, fmt.Sprintf("atoll-%d.crt", i+1)), cert, 0o644); err != nil {
			return fmt.Errorf("certificate authority %d: %w", i+1, err)
		}
	}
	if tool := r.binary(anchors.tool); tool != "" && r.o.Run != nil {
		// It also makes the links by hashes that OpenSSL looks for. Where it fails, as without openssl, there are the bundles.
		if err := r.exec(anchors.tool, []string{tool}, nil, r.o.Output); err != nil {
			r.say("certificate authorities: %v", err)
		}
	}
	found := false
	for _, file := range authorityBundles {
		there, err := r.addAuthorities(file, certs)
		if err != nil {
			return fmt.Errorf("certificate authorities: %s: %w", file, err)
		}
		found = found || there
	}
	if found {
		return nil
	}
	return r.root.put(authorityBundles[0], bytes.Join(certs, nil), 0o644)
}

// normalPEM takes what is no certificate away.
func normalPEM(data []byte) ([]byte, error) {
	var out []byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
		}
	}
	if out == nil {
		return nil, errors.New("there is no certificate in PEM")
	}
	return out, nil
}

// addAuthorities adds to a bundle what it does not have.
func (r *Provisioner) addAuthorities(file string, certs [][]byte) (there bool, err error) {
	data, st, err := r.root.read(file, maxBundle)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	old := len(data)
	for _, cert := range certs {
		if bytes.Contains(data, bytes.TrimSpace(cert)) {
			continue
		}
		if len(data) > 0 && data[len(data)-1] != '\n' {
			data = append(data, '\n')
		}
		data = append(data, cert...)
	}
	if len(data) == old {
		return true, nil
	}
	return true, r.rewrite(file, data, st.Uid, st.Gid, st.Mode)
}
