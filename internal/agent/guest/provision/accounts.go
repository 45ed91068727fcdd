package provision

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// only says whether a text is nothing but ASCII letters, digits and some more. (regexp would be a twentieth of the agent.)
func only(text, more string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(more, r)
	})
}

// checkAccountName takes what shadow-utils takes with the relaxed rules of Debian and Red Hat, without what the files or a shell would
// stumble over.
func checkAccountName(name string) error {
	body := strings.TrimSuffix(name, "$")
	if len(name) > 32 || body == "" || !only(body, "_.-") || !only(body[:1], "_") || body[0] >= '0' && body[0] <= '9' {
		return errors.New("not a name: letters, digits, . _ - and at most 32 of them")
	}
	return nil
}

// checkField refuses what would end a field or a line of the files. The value may be secret and is not named.
func checkField(what, value string) error {
	if strings.ContainsFunc(value, func(r rune) bool { return r == ':' || r < ' ' || r == 0x7f }) {
		return fmt.Errorf("its %s has a colon, a newline or another character that the files of accounts cannot hold", what)
	}
	return nil
}

func checkID(id uint32) error {
	if id == math.MaxUint32 {
		return fmt.Errorf("the number %d means nobody", id)
	}
	return nil
}

// groups makes, changes and removes groups.
func (r *Provisioner) groups() error {
	a, err := r.readAccounts()
	if err != nil {
		return err
	}
	for _, g := range r.GetGroups() {
		if err := a.applyGroup(g); err != nil {
			return element("group", g.GetName(), err)
		}
	}
	return r.writeAccounts(a)
}

func (a *accounts) applyGroup(g *agentv1.Group) error {
	if err := errors.Join(checkAccountName(g.GetName()), checkField("password hash", g.GetPasswordHash()), checkID(g.GetGid())); err != nil {
		return err
	}
	e := a.group.find(g.GetName())
	if g.GetAbsent() {
		if e == nil {
			return nil
		}
		return a.removeGroup(g.GetName(), e)
	}
	if g.Gid != nil && (e == nil || e[fieldID] != number(g.GetGid())) {
		if holder := a.group.holder(g.GetGid()); holder != "" {
			return fmt.Errorf("its number %d is that of the group %q", g.GetGid(), holder)
		}
	}
	if e == nil {
		gid := g.GetGid()
		if g.Gid == nil {
			var err error
			if gid, err = a.freeGID(g.GetSystem()); err != nil {
				return err
			}
		}
		a.addGroup(g.GetName(), gid)
	} else if g.Gid != nil && e[fieldID] != number(g.GetGid()) {
		a.renumberGroup(e, g.GetGid())
	}
	if hash := g.GetPasswordHash(); hash != "" {
		a.setGroupPassword(g.GetName(), hash)
	}
	return nil
}

func number(id uint32) string { return strconv.FormatUint(uint64(id), 10) }

func (a *accounts) freeGID(system bool) (uint32, error) {
	low, high := a.defs.numbers("GID", system)
	return a.group.free(low, high, system, func(uint32) bool { return false })
}

func (a *accounts) addGroup(name string, gid uint32) {
	a.group.set([]string{name, "x", number(gid), ""})
	if a.gshadow.find(name) == nil {
		a.gshadow.set([]string{name, "!", "", ""})
	}
}

func (a *accounts) removeGroup(name string, e []string) error {
	user := ""
	a.passwd.all(func(_ int, u []string) bool {
		if u[passwdGID] == e[fieldID] {
			user = u[fieldName]
		}
		return user == ""
	})
	if user != "" {
		return fmt.Errorf("it cannot be removed: it is the primary group of the user %q", user)
	}
	a.group.drop(name)
	a.gshadow.drop(name)
	return nil
}

// renumberGroup takes those along whose primary group it is.
func (a *accounts) renumberGroup(e []string, gid uint32) {
	old := e[fieldID]
	e[fieldID] = number(gid)
	a.group.set(e)
	a.passwd.all(func(i int, u []string) bool {
		if u[passwdGID] == old {
			u[passwdGID] = number(gid)
			a.passwd.replace(i, u)
		}
		return true
	})
}

func (a *accounts) setGroupPassword(name, hash string) {
	if e := a.gshadow.find(name); e != nil && a.gshadow.there {
		e[fieldPassword] = hash
		a.gshadow.set(e)
		return
	}
	e := a.group.find(name)
	e[fieldPassword] = hash
	a.group.set(e)
}

// account is a user after the files have it, with what is to be done in the file system.
type account struct {
	*agentv1.User
	uid, gid uint32
	home     string
	isNew    bool
	oldUID   uint32 // of the files in home, when it differs
	oldHome  string // where home was, when it moves
}

// users makes, changes and removes users, with their homes, keys and rights.
func (r *Provisioner) users() error {
	a, err := r.readAccounts()
	if err != nil {
		return err
	}
	var gone, there []*account
	for _, u := range r.GetUsers() {
		c, err := r.applyUser(a, u)
		if err != nil {
			return element("user", u.GetName(), err)
		}
		switch {
		case c == nil:
		case u.GetAbsent():
			gone = append(gone, c)
		default:
			there = append(there, c)
		}
	}
	if err := r.writeAccounts(a); err != nil {
		return err
	}
	for _, c := range gone {
		if err := r.removeHome(c); err != nil {
			return element("user", c.GetName(), err)
		}
	}
	for _, c := range there {
		if err := r.settle(c, a.defs); err != nil {
			return element("user", c.GetName(), err)
		}
	}
	return nil
}

func checkUser(u *agentv1.User) error {
	err := errors.Join(checkAccountName(u.GetName()), checkID(u.GetUid()), checkField("password hash", u.GetPasswordHash()), checkField("gecos", u.GetGecos()))
	for what, path := range map[string]string{"home": u.GetHome(), "shell": u.GetShell()} {
		if path != "" && !strings.HasPrefix(path, "/") {
			err = errors.Join(err, fmt.Errorf("its %s %q is no absolute path", what, path))
		}
		err = errors.Join(err, checkField(what, path))
	}
	for i, key := range u.GetSshAuthorizedKeys() {
		if strings.TrimSpace(key) == "" || strings.ContainsAny(strings.TrimSpace(key), "\n\r\x00") {
			err = errors.Join(err, fmt.Errorf("its SSH key %d is not one line", i+1))
		}
	}
	for i, rule := range u.GetSudo() {
		if strings.TrimSpace(rule) == "" || strings.ContainsAny(rule, "\n\r\x00") || strings.HasSuffix(rule, `\`) {
			err = errors.Join(err, fmt.Errorf("its sudo rule %d is not one line", i+1))
		}
	}
	return err
}

// applyUser brings the tables to what a user is to be. Nil: there is nothing to do for it in the file system.
func (r *Provisioner) applyUser(a *accounts, u *agentv1.User) (*account, error) {
	if err := checkUser(u); err != nil {
		return nil, err
	}
	e := a.passwd.find(u.GetName())
	if u.GetAbsent() {
		if e == nil {
			return nil, nil
		}
		return a.removeUser(u, e)
	}
	c := &account{User: u, isNew: e == nil}
	var err error
	if c.isNew {
		e, err = r.newUser(a, u)
	} else {
		err = a.changeUser(c, e)
	}
	if err != nil {
		return nil, err
	}
	if c.gid, err = id(e[passwdGID]); err != nil {
		return nil, err
	}
	if c.uid, err = id(e[fieldID]); err != nil {
		return nil, err
	}
	c.home = e[passwdHome]
	if u.GetGecos() != "" {
		e[passwdGecos] = u.GetGecos()
	}
	if u.GetShell() != "" {
		e[passwdShell] = u.GetShell()
	}
	a.setPassword(e, u, c.isNew)
	a.passwd.set(e)
	return c, a.setGroups(u)
}

func id(field string) (uint32, error) {
	n, err := strconv.ParseUint(field, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("its number %q in %s is none", field, passwdFile)
	}
	return uint32(n), nil
}

// newUser makes the entry of a user that is not there yet.
func (r *Provisioner) newUser(a *accounts, u *agentv1.User) ([]string, error) {
	uid := u.GetUid()
	if u.Uid == nil {
		low, high := a.defs.numbers("UID", u.GetSystem())
		var err error
		if uid, err = a.passwd.free(low, high, u.GetSystem(), func(uint32) bool { return false }); err != nil {
			return nil, err
		}
	} else if holder := a.passwd.holder(uid); holder != "" {
		return nil, fmt.Errorf("its number %d is that of the user %q", uid, holder)
	}
	gid, err := r.primaryGroup(a, u, uid)
	if err != nil {
		return nil, err
	}
	home, shell := u.GetHome(), u.GetShell()
	if home == "" {
		home = "/home/" + u.GetName()
	}
	if shell == "" {
		shell = r.shell()
	}
	return []string{u.GetName(), "x", number(uid), number(gid), u.GetGecos(), home, shell}, nil
}

func (r *Provisioner) shell() string {
	if r.root.exists("/bin/bash") {
		return "/bin/bash"
	}
	return "/bin/sh"
}

// primaryGroup is the group that was asked for, or one of the user's own with the user's number, where that is free, or that of all.
func (r *Provisioner) primaryGroup(a *accounts, u *agentv1.User, uid uint32) (uint32, error) {
	if name := u.GetPrimaryGroup(); name != "" {
		return a.groupID(name)
	}
	if u.GetNoUserGroup() || a.defs["USERGROUPS_ENAB"] == "no" {
		const users = 100
		return users, nil
	}
	if a.group.find(u.GetName()) != nil {
		return 0, errors.New("there is a group of that name already: say which primary group the user is to have")
	}
	gid := uid
	if low, high := a.defs.numbers("GID", u.GetSystem()); gid < low || gid > high || a.group.holder(gid) != "" {
		var err error
		if gid, err = a.freeGID(u.GetSystem()); err != nil {
			return 0, err
		}
	}
	a.addGroup(u.GetName(), gid)
	return gid, nil
}

// groupID finds a group by its name, else by its number.
func (a *accounts) groupID(name string) (uint32, error) {
	gid, err := a.group.id(name)
	if n, nerr := strconv.ParseUint(name, 10, 32); err != nil && nerr == nil && a.group.holder(uint32(n)) != "" {
		return uint32(n), nil
	}
	if err != nil {
		return 0, fmt.Errorf("its group: %w", err)
	}
	return gid, nil
}

// changeUser brings the entry of a user that is there to what is asked for.
func (a *accounts) changeUser(c *account, e []string) error {
	u := c.User
	if u.Uid != nil && e[fieldID] != number(u.GetUid()) {
		if holder := a.passwd.holder(u.GetUid()); holder != "" {
			return fmt.Errorf("its number %d is that of the user %q", u.GetUid(), holder)
		}
		old, err := id(e[fieldID])
		if err != nil {
			return err
		}
		c.oldUID = old
		e[fieldID] = number(u.GetUid())
	}
	if name := u.GetPrimaryGroup(); name != "" {
		gid, err := a.groupID(name)
		if err != nil {
			return err
		}
		e[passwdGID] = number(gid)
	}
	if home := u.GetHome(); home != "" && home != e[passwdHome] {
		c.oldHome = e[passwdHome]
		e[passwdHome] = home
	}
	return nil
}

// setPassword sets the hash: "*", which nothing hashes to, where there is none. An account with keys only is not locked, which some
// sshd take for a reason to let nobody in.
func (a *accounts) setPassword(e []string, u *agentv1.User, isNew bool) {
	s := a.shadow.find(u.GetName())
	hash := "*"
	switch {
	case u.GetPasswordHash() != "":
		hash = u.GetPasswordHash()
	case u.PasswordHash != nil || isNew:
	case s != nil:
		hash = s[fieldPassword]
	case e[fieldPassword] != "x":
		hash = e[fieldPassword]
	}
	if u.GetLockPassword() && hash != "*" && !strings.HasPrefix(hash, "!") {
		hash = "!" + hash
	}
	if s == nil {
		s = a.newShadow(u)
	}
	if isNew || u.PasswordHash != nil || u.GetLockPassword() {
		e[fieldPassword] = "x"
		s[fieldPassword] = hash
		a.shadow.set(s)
	}
}

func (a *accounts) newShadow(u *agentv1.User) []string {
	days := strconv.FormatInt(time.Now().Unix()/(24*60*60), 10)
	s := []string{u.GetName(), "*", days, "", "", "", "", "", ""}
	if !u.GetSystem() {
		for i, key := range []string{"PASS_MIN_DAYS", "PASS_MAX_DAYS", "PASS_WARN_AGE"} {
			if n := a.defs.number(key, math.MaxUint32); n != math.MaxUint32 {
				s[3+i] = number(n)
			}
		}
	}
	return s
}

// setGroups makes the supplementary groups exactly those that are listed, where any are.
func (a *accounts) setGroups(u *agentv1.User) error {
	if len(u.GetGroups()) == 0 {
		return nil
	}
	for _, name := range u.GetGroups() {
		if a.group.find(name) == nil {
			return fmt.Errorf("its group %q is not in %s", name, groupFile)
		}
	}
	a.member(u.GetName(), u.GetGroups())
	return nil
}

// member makes a user a member of just these groups.
func (a *accounts) member(user string, groups []string) {
	for _, t := range []*table{a.group, a.gshadow} {
		t.all(func(i int, e []string) bool {
			t.setMember(i, e, user, slices.Contains(groups, e[fieldName]))
			return true
		})
	}
}

func (a *accounts) removeUser(u *agentv1.User, e []string) (*account, error) {
	uid, err := id(e[fieldID])
	if err != nil {
		return nil, err
	}
	if uid == 0 {
		return nil, errors.New("root cannot be removed")
	}
	a.passwd.drop(u.GetName())
	a.shadow.drop(u.GetName())
	a.member(u.GetName(), nil)
	if own := a.group.find(u.GetName()); own != nil && a.defs["USERGROUPS_ENAB"] != "no" && own[groupMembers] == "" {
		_ = a.removeGroup(u.GetName(), own) // it stays where it is another's primary group
	}
	return &account{User: u, uid: uid, home: e[passwdHome]}, nil
}
