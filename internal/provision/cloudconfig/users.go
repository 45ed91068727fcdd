package cloudconfig

import (
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/provision/form"
	"github.com/atollvm/atoll/internal/provision/hostkey"
)

// user is one of users, and where it is.
type user struct {
	*agentv1.User
	at           item
	createGroups bool
}

// password is one that is set beside users: of whom, and where that is said. No name: the default user's.
type password struct {
	name, hash string
	at         item
}

// readUsers takes a list of names and users. default stands for the one of the key user.
func readUsers(s *settings, it item) {
	s.usersGiven, s.noDefault = true, true
	list := []item{it}
	switch {
	case it.isNull():
		list = nil
	case it.isList():
		list = it.items()
	}
	for _, e := range list {
		if e.isMapping() {
			if u := readUser(e); u != nil {
				s.users = append(s.users, u)
			}
			continue
		}
		for _, name := range commas(e) {
			if name == "default" {
				s.noDefault = false
				continue
			}
			if !form.User(name) {
				e.fault("not a name of a user")
				continue
			}
			s.users = append(s.users, newUser(e, name))
		}
	}
	seen := map[string]bool{}
	for _, u := range s.users {
		if seen[u.GetName()] {
			u.at.fault("the user %s is there twice", u.GetName())
		}
		seen[u.GetName()] = true
	}
}

// readDefaultUser says what default means among users.
func readDefaultUser(s *settings, it item) {
	switch {
	case it.isMapping():
		s.deflt = readUser(it)
	default:
		s.deflt = newUser(it, it.name())
	}
}

func newUser(at item, name string) *user {
	return &user{User: &agentv1.User{Name: name, LockPassword: true}, at: at, createGroups: true}
}

// commas reads a string of names with commas, or a list.
func commas(it item) []string {
	if it.isList() {
		return it.texts(item.name)
	}
	var names []string
	for name := range strings.SplitSeq(it.text(), ",") {
		if name = strings.TrimSpace(name); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// readUser is nil for one without a name.
func readUser(it item) *user {
	u := newUser(it, "")
	hash := func(it item) {
		if u.PasswordHash != nil {
			it.fault("there is another hash: give one of passwd and hashed_passwd")
		}
		u.PasswordHash = proto.String(it.hash())
	}
	it.fields(map[string]func(item){
		"name":                func(it item) { u.Name = it.name() },
		"gecos":               func(it item) { u.Gecos = it.field() },
		"homedir":             func(it item) { u.Home = it.absolute() },
		"shell":               func(it item) { u.Shell = it.absolute() },
		"uid":                 func(it item) { u.Uid = it.id() },
		"primary_group":       func(it item) { u.PrimaryGroup = it.name() },
		"groups":              func(it item) { u.Groups = groupNames(it) },
		"create_groups":       func(it item) { u.createGroups = it.bool() },
		"no_create_home":      func(it item) { u.NoCreateHome = it.bool() },
		"no_user_group":       func(it item) { u.NoUserGroup = it.bool() },
		"no_log_init":         func(it item) { it.bool() }, // nothing is written there anyway
		"system":              func(it item) { u.System = it.bool() },
		"lock_passwd":         func(it item) { u.LockPassword = it.bool() },
		"passwd":              hash,
		"hashed_passwd":       hash,
		"sudo":                func(it item) { u.Sudo = sudoRules(it) },
		"ssh_authorized_keys": func(it item) { u.SshAuthorizedKeys = it.texts(item.publicKey) },
	}, "doas", "expiredate", "inactive", "plain_text_passwd", "selinux_user", "snapuser", "ssh_import_id", "ssh_redirect_user")
	if u.System {
		u.NoCreateHome = true // as useradd has it
	}
	if u.Name == "" {
		it.fault("a user without a name")
		return nil
	}
	return u
}

// field is a field of passwd.
func (it item) field() string {
	s := it.line()
	if strings.Contains(s, ":") {
		it.fault("there is a colon in it")
	}
	return s
}

// groupNames are the groups of a user.
func groupNames(it item) []string {
	if it.isNull() {
		return nil
	}
	names := commas(it)
	for _, n := range names {
		if !form.User(n) {
			it.fault("not names of groups")
			break
		}
	}
	return names
}

func sudoRules(it item) []string {
	switch {
	case it.isNull():
		return nil
	case it.isBool():
		if it.bool() {
			it.fault("want a rule, as ALL=(ALL) NOPASSWD:ALL")
		}
		return nil
	case it.isList():
		return it.texts(item.line)
	}
	return []string{it.line()}
}

func (it item) publicKey() string {
	s := it.line()
	switch {
	case s == "":
	case hostkey.IsPrivate([]byte(s)):
		it.fault("it is a private key: give the public one")
	default:
		if _, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s)); err != nil {
			it.fault("not a public SSH key")
		}
	}
	return s
}

// readGroups takes names, and names with members.
func readGroups(s *settings, it item) {
	withMembers := func(it item) {
		it.each(func(name string, v item) {
			if !form.User(name) {
				v.fault("not a name of a group")
				return
			}
			s.groups = append(s.groups, name)
			switch {
			case v.isNull():
			case v.isList():
				s.members[name] = append(s.members[name], v.items()...)
			default:
				s.members[name] = append(s.members[name], v)
			}
		})
	}
	switch {
	case it.isMapping():
		withMembers(it)
	case it.isList():
		for _, e := range it.items() {
			if e.isMapping() {
				withMembers(e)
			} else {
				s.groups = append(s.groups, e.name())
			}
		}
	default:
		s.groups = groupNames(it)
	}
}

// readPasswords takes hashes only.
func readPasswords(s *settings, it item) {
	line := func(it item, text string) {
		name, hash, ok := strings.Cut(text, ":")
		if !ok || !form.User(name) || !form.PasswordHash(hash) {
			it.fault("want USER:HASH, with a hash of crypt(5): passwords in the clear, and random ones, are not taken")
		}
		s.passwords = append(s.passwords, password{name, hash, it})
	}
	it.fields(map[string]func(item){
		"expire": func(it item) { it.bool() }, // passwords that come as hashes never expire
		"users": func(it item) {
			for _, e := range it.items() {
				p, kind := password{at: e}, "hash"
				e.fields(map[string]func(item){
					"name":     func(it item) { p.name = it.name() },
					"password": func(it item) { p.hash = it.hash() },
					"type": func(it item) {
						if kind = it.text(); kind != "hash" {
							it.fault("only hash is implemented")
						}
					},
				})
				if p.name == "" || p.hash == "" {
					e.fault("want a name and a password")
				}
				s.passwords = append(s.passwords, p)
			}
		},
		"list": func(it item) {
			if it.isList() {
				for _, e := range it.items() {
					line(e, e.text())
				}
				return
			}
			for text := range strings.SplitSeq(it.text(), "\n") {
				if text != "" {
					line(it, text)
				}
			}
		},
	})
}

// readHostKeys takes private keys; a public one is made of each, and has to be the one that is given.
func readHostKeys(s *settings, it item) {
	private, public := map[string]item{}, map[string]item{}
	it.each(func(name string, v item) {
		kind, part, _ := strings.Cut(name, "_")
		switch {
		case !slices.Contains([]string{"rsa", "ecdsa", "ed25519"}, kind):
			v.fault("no such key")
		case part == "private":
			private[kind] = v
		case part == "public":
			public[kind] = v
		case part == "certificate":
			v.fault("not implemented")
		default:
			v.fault("no such key")
		}
	})
	for _, kind := range []string{"rsa", "ecdsa", "ed25519"} {
		v, given := private[kind]
		if !given {
			if p, ok := public[kind]; ok {
				p.fault("there is no %s_private with it", kind)
			}
			continue
		}
		k, err := hostkey.Parse([]byte(v.text()))
		if err != nil {
			v.fault("not a private key that is understood here")
			continue
		}
		if k.Type != kind {
			v.fault("it is a key of type %s", k.Type)
		}
		if p, ok := public[kind]; ok && !sameKey(p.publicKey(), k.Public) {
			p.fault("it is not the public part of %s_private", kind)
		}
		s.sshKeys = append(s.sshKeys, &agentv1.SSHHostKey{Type: k.Type, Private: k.Private, Public: k.Public})
	}
}

func sameKey(a string, b []byte) bool {
	ka, _, _, _, err := ssh.ParseAuthorizedKey([]byte(a))
	if err != nil {
		return true // said already
	}
	kb, _, _, _, err := ssh.ParseAuthorizedKey(b)
	return err == nil && string(ka.Marshal()) == string(kb.Marshal())
}
