package provision

import (
	"fmt"

	"github.com/atollvm/atoll/internal/provision/hostkey"
)

// Request is what an operator asked for, as it came. It may hold secrets: Redacted is what may be shown.
type Request struct {
	Users             []User            `json:",omitempty"`
	SSHAuthorizedKeys []string          `json:",omitempty"` // of root, and of each of Users that has none of its own
	SSHHostKeys       [][]byte          `json:",omitempty"` // private keys, PEM
	Timezone          string            `json:",omitempty"`
	Locale            string            `json:",omitempty"`
	NTPServers        []string          `json:",omitempty"`
	Packages          []string          `json:",omitempty"`
	UserData          []byte            `json:",omitempty"` // a script, cloud-config, multi-part, Ignition or Butane
	Ignition          []byte            `json:",omitempty"` // Ignition (JSON) or Butane (YAML)
	Files             []File            `json:",omitempty"`
	Mounts            []FileSystemMount `json:",omitempty"`
	Secrets           []Secret          `json:",omitempty"`

	Withheld []string `json:",omitempty"` // of a redacted request: what it does not show
}

// User is a user of the guest, made or changed at the first boot.
type User struct {
	Name              string
	UID               *uint32  `json:",omitempty"`
	Home              string   `json:",omitempty"`
	Shell             string   `json:",omitempty"`
	Groups            []string `json:",omitempty"`
	Sudo              bool     `json:",omitempty"` // without a password
	PasswordHash      string   `json:",omitempty"` // crypt(3)
	SSHAuthorizedKeys []string `json:",omitempty"`
}

// File is a file of the guest, written whole at the first boot.
type File struct {
	Path  string
	Data  []byte `json:",omitempty"`
	Mode  uint32 `json:",omitempty"` // 0: 0644
	Owner string `json:",omitempty"` // NAME|UID[:GROUP|GID]; empty: root
}

// FileSystemMount is mounted at each boot.
type FileSystemMount struct {
	Source  string `json:",omitempty"` // as in fstab
	Path    string
	Type    string
	Options string `json:",omitempty"`
}

// Secret becomes a file in /run/secrets, in memory, at each boot.
type Secret struct {
	Name  string
	Data  []byte `json:",omitempty"`
	Owner string `json:",omitempty"` // NAME|UID[:GROUP|GID]; empty: root
	Mode  uint32 `json:",omitempty"` // 0: 0400
}

// Empty says that nothing is asked for.
func (r *Request) Empty() bool {
	return len(r.Users)+len(r.SSHAuthorizedKeys)+len(r.SSHHostKeys)+len(r.NTPServers)+len(r.Packages)+len(r.Files)+len(r.Mounts)+len(r.Secrets) == 0 &&
		r.Timezone == "" && r.Locale == "" && r.UserData == nil && r.Ignition == nil
}

// Redacted is the request without what may be secret, and with the names of what it leaves out.
func (r *Request) Redacted() Request {
	out := Request{Timezone: r.Timezone, Locale: r.Locale, NTPServers: r.NTPServers, Packages: r.Packages, Mounts: r.Mounts}
	withhold := func(is bool, format string, args ...any) {
		if is {
			out.Withheld = append(out.Withheld, fmt.Sprintf(format, args...))
		}
	}
	withhold(len(r.UserData) > 0, "userData")
	withhold(len(r.Ignition) > 0, "ignition")
	withhold(len(r.SSHAuthorizedKeys) > 0, "sshAuthorizedKeys")
	withhold(len(r.SSHHostKeys) > 0, "sshHostKeys")
	for _, u := range r.Users {
		withhold(u.PasswordHash != "", "users.%s.passwordHash", u.Name)
		withhold(len(u.SSHAuthorizedKeys) > 0, "users.%s.sshAuthorizedKeys", u.Name)
		u.PasswordHash, u.SSHAuthorizedKeys = "", nil
		out.Users = append(out.Users, u)
	}
	for _, f := range r.Files {
		withhold(true, "files.%s", f.Path)
		f.Data = nil
		out.Files = append(out.Files, f)
	}
	for _, s := range r.Secrets {
		withhold(true, "secrets.%s", s.Name)
		s.Data = nil
		out.Secrets = append(out.Secrets, s)
	}
	return out
}

// HostKeys returns the SSH host keys that were given, or, where there are none, those that were generated for the machine.
func (r *Request) HostKeys(generated []hostkey.Key) ([]hostkey.Key, error) {
	if len(r.SSHHostKeys) == 0 {
		return generated, nil
	}
	var keys []hostkey.Key
	for i, pem := range r.SSHHostKeys {
		k, err := hostkey.Parse(pem)
		if err != nil {
			return nil, fmt.Errorf("SSH host key %d: %w", i+1, err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}
