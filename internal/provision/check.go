package provision

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/form"
	"github.com/atollvm/atoll/internal/provision/hostkey"
	"github.com/atollvm/atoll/internal/provision/zone"
	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
)

// Bounds of a request. What the agent gets in its one message has to fit into a frame of 1 MiB: secrets and scripts travel there.
const (
	MaxDocument = 16 << 20 // user-data, Ignition
	MaxFiles    = 64 << 20 // of all files
	MaxSecrets  = 512 << 10
	MaxScript   = 256 << 10
)

var (
	secretForm = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}$`)
	typeForm   = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,31}$`)
)

// faults gathers what is wrong with a request, each with its place.
type faults []error

func (f *faults) add(place, help, format string, args ...any) {
	err := fmt.Errorf("%s: "+format+": %w", append(append([]any{place}, args...), errdefs.ErrInvalidArgument)...)
	if help != "" {
		err = hint.With(err, "%s", help)
	}
	*f = append(*f, err)
}

// wrap takes over what another room found, with its class and hint.
func (f *faults) wrap(place string, err error) {
	if err == nil {
		return
	}
	if !errdefs.IsInvalidArgument(err) {
		err = fmt.Errorf("%w (%w)", err, errdefs.ErrInvalidArgument)
	}
	*f = append(*f, fmt.Errorf("%s: %w", place, err))
}

// Check gathers every fault of a request that can be found without a network or a guest.
func (r *Request) Check() (warnings []string, err error) {
	var f faults
	r.checkUsers(&f)
	checkKeys(&f, "SSH key", r.SSHAuthorizedKeys)
	r.checkHostKeys(&f)
	if r.Timezone != "" {
		if _, err := zone.Find(r.Timezone); err != nil {
			f = append(f, hint.With(fmt.Errorf("%w: %w", unclassed(err), errdefs.ErrInvalidArgument), "%s", hint.Of(err)))
		}
	}
	if r.Locale != "" && !form.Locale(r.Locale) {
		f.add(fmt.Sprintf("locale %q", short(r.Locale)), "locales are written as de_DE.UTF-8 or C.UTF-8", "not a locale")
	}
	for _, s := range r.NTPServers {
		if _, err := netip.ParseAddr(s); err != nil && !form.Host(s) {
			f.add(fmt.Sprintf("NTP server %q", short(s)), "give a host name or an address; the port is always 123", "not a host")
		}
	}
	for _, p := range r.Packages {
		if !form.Package(p) {
			f.add(fmt.Sprintf("package %q", short(p)), "give the name of one package of the image's distribution", "not the name of a package")
		}
	}
	r.checkFiles(&f)
	r.checkMounts(&f)
	r.checkSecrets(&f)
	warnings = r.checkDocuments(&f)
	return warnings, errors.Join(f...)
}

func (r *Request) checkUsers(f *faults) {
	names, uids := map[string]bool{}, map[uint32]string{}
	for _, u := range r.Users {
		place := fmt.Sprintf("user %q", short(u.Name))
		if !form.User(u.Name) {
			f.add(place, "a user name begins with a letter or _, goes on with letters, digits, '_', '-', '.', and has at most 32 characters", "not a user name")
			continue
		}
		if names[u.Name] {
			f.add(place, "say all about a user in one place", "it is given twice")
		}
		names[u.Name] = true
		if u.UID != nil {
			if other, ok := uids[*u.UID]; ok {
				f.add(place, "", "uid %d is that of user %q", *u.UID, other)
			}
			uids[*u.UID] = u.Name
			if *u.UID == 1<<32-1 {
				f.add(place, "", "uid %d stands for no user", *u.UID)
			}
		}
		for _, p := range []string{u.Home, u.Shell} {
			if p != "" && (!cleanPath(p) || strings.ContainsRune(p, ':')) {
				f.add(place, "give an absolute path without a colon", "path %q", short(p))
			}
		}
		for _, g := range u.Groups {
			if !form.User(g) {
				f.add(place, "", "group %q is not the name of a group", short(g))
			}
		}
		if u.PasswordHash != "" && !form.PasswordHash(u.PasswordHash) {
			f.add(place, "give a hash, as of: openssl passwd -6", "the password hash is none of crypt(5)") // without the value: it may be a password
		}
		checkKeys(f, place+": SSH key", u.SSHAuthorizedKeys)
	}
}

func checkKeys(f *faults, place string, keys []string) {
	for i, k := range keys {
		at := fmt.Sprintf("%s %d", place, i+1)
		if hostkey.IsPrivate([]byte(k)) {
			f.add(at, "give the public key, which is in the file that ends in .pub", "it is a private key")
			continue
		}
		if strings.ContainsAny(strings.TrimRight(k, "\n"), "\n\x00") {
			f.add(at, "", "it has more than one line")
			continue
		}
		if _, _, _, _, err := ssh.ParseAuthorizedKey([]byte(k)); err != nil {
			f.add(at, "a public key looks like: ssh-ed25519 AAAAC3… name", "it is not a public key")
		}
	}
}

func (r *Request) checkHostKeys(f *faults) {
	types := map[string]int{}
	for i, data := range r.SSHHostKeys {
		place := fmt.Sprintf("SSH host key %d", i+1)
		k, err := hostkey.Parse(data)
		if err != nil {
			f.wrap(place, err)
			continue
		}
		if other, ok := types[k.Type]; ok {
			f.add(place, "give one of each type", "it is of type %s, as key %d is", k.Type, other)
		}
		types[k.Type] = i + 1
	}
}

func (r *Request) checkFiles(f *faults) {
	seen, total := map[string]bool{}, 0
	for _, file := range r.Files {
		place := fmt.Sprintf("file %q", short(file.Path))
		switch {
		case !cleanPath(file.Path) || file.Path == "/":
			f.add(place, "give an absolute path without . and ..", "not the path of a file")
		case seen[file.Path]:
			f.add(place, "", "it is given twice")
		}
		seen[file.Path] = true
		if file.Mode > 0o7777 {
			f.add(place, "write a mode as 0644", "mode %#o", file.Mode)
		}
		if _, _, err := owners(file.Owner); err != nil {
			f.wrap(place, err)
		}
		total += len(file.Data)
	}
	if total > MaxFiles {
		f.add("files", "bake large files into an image, or fetch them in a user-data script", "they have %d bytes, more than %d", total, MaxFiles)
	}
}

func (r *Request) checkMounts(f *faults) {
	seen := map[string]bool{}
	for _, m := range r.Mounts {
		place := fmt.Sprintf("mount at %q", short(m.Path))
		switch {
		case !cleanPath(m.Path) || m.Path == "/":
			f.add(place, "give an absolute path", "not a place to mount at")
		case OfKernel(m.Path):
			f.add(place, "choose another place", "it is the kernel's, and the guest cannot do without")
		case seen[m.Path]:
			f.add(place, "", "it is given twice")
		}
		seen[m.Path] = true
		switch {
		case m.Type == "bind" || m.Type == "volume":
			f.add(place, "files come by --file, or in the image", "type %s: a machine cannot have directories of the host or volumes yet", m.Type)
		case !typeForm.MatchString(m.Type):
			f.add(place, "give the type of a file system, such as tmpfs or ext4", "type %q", short(m.Type))
		case m.Source == "" && !virtual(m.Type):
			f.add(place, "say what to mount, as source=/dev/vdc", "a mount of type %s needs a source", m.Type)
		}
		if strings.ContainsAny(m.Source+m.Options, "\n\x00") || strings.ContainsAny(m.Options, " \t") {
			f.add(place, "", "source %q and options %q", short(m.Source), short(m.Options))
		}
	}
}

// OfKernel says that what lies at a path is the kernel's: something else there breaks the guest.
func OfKernel(p string) bool {
	switch path.Clean(p) {
	case "/proc", "/sys", "/sys/fs/cgroup", "/dev":
		return true
	}
	return false
}

// virtual says that file systems of a type are mounted from nothing.
func virtual(fstype string) bool {
	switch fstype {
	case "tmpfs", "ramfs", "proc", "sysfs", "debugfs", "tracefs", "configfs", "securityfs", "hugetlbfs", "mqueue", "devpts", "bpf", "cgroup2", "binfmt_misc":
		return true
	}
	return false
}

func (r *Request) checkSecrets(f *faults) {
	seen, total := map[string]bool{}, 0
	for _, s := range r.Secrets {
		place := fmt.Sprintf("secret %q", short(s.Name))
		switch {
		case !secretForm.MatchString(s.Name):
			f.add(place, "a secret becomes a file in /run/secrets: give it the name of a file, with letters, digits, '_', '-', '.'", "not the name of a secret")
		case seen[s.Name]:
			f.add(place, "", "it is given twice")
		}
		seen[s.Name] = true
		if s.Mode > 0o777 {
			f.add(place, "write a mode as 0440", "mode %#o", s.Mode)
		}
		if _, _, err := owners(s.Owner); err != nil {
			f.wrap(place, err)
		}
		total += len(s.Data)
	}
	if total > MaxSecrets {
		f.add("secrets", "", "they have %d bytes, more than %d", total, MaxSecrets)
	}
}

// cleanPath says that p is absolute, has no . and .. and fits into a guest.
func cleanPath(p string) bool {
	return strings.HasPrefix(p, "/") && path.Clean(p) == p && len(p) < 4096 && !strings.ContainsAny(p, "\x00\n")
}

// owners reads NAME|UID[:GROUP|GID]. A user given alone stands for its group too: by number for that number, by name for its own.
func owners(s string) (user, group string, err error) {
	if s == "" {
		return "", "", nil
	}
	user, group, both := strings.Cut(s, ":")
	if !both {
		group = user
	}
	for _, n := range []string{user, group} {
		if _, err := strconv.ParseUint(n, 10, 32); err != nil && !form.User(n) {
			return "", "", hint.With(fmt.Errorf("owner %q: %w", short(s), errdefs.ErrInvalidArgument), "write an owner as NAME, NAME:GROUP or by numbers, as 1000:1000")
		}
	}
	return user, group, nil
}

func short(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// unclassed takes the class that another room has given off the words.
func unclassed(err error) error {
	return errors.New(strings.TrimSuffix(err.Error(), ": "+errdefs.ErrNotFound.Error()))
}
