package cloudconfig

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// Names of the commands that a config makes, by which userdata finds their place among scripts.
const (
	BootCommand  = "bootcmd"
	RunCommand   = "runcmd"
	FinalMessage = "final_message"
)

// fill adds what was read to p, and finds what does not go together.
func (s *settings) fill(p *plan.Plan) {
	s.fillUsers(p)
	s.fillNames(p)
	for _, f := range s.files {
		piece := []*agentv1.Piece{p.Bytes(f.data)}
		if f.append {
			f.Append = piece
		} else {
			f.Contents, f.HasContents = piece, true
		}
		p.Files = append(p.Files, f.File)
	}
	if s.pwauth != nil {
		answer := map[bool]string{true: "yes", false: "no"}[*s.pwauth]
		p.Files = append(p.Files, &agentv1.File{
			Node:     &agentv1.Node{Path: sshdConfig, Overwrite: proto.Bool(true), Mode: proto.Uint32(0o600)},
			Contents: []*agentv1.Piece{p.Bytes([]byte("PasswordAuthentication " + answer + "\n"))}, HasContents: true,
		})
	}
	p.SshHostKeys = append(p.SshHostKeys, s.sshKeys...)
	if s.timezone != "" {
		p.Timezone, p.Zone = s.timezone, nil
	}
	if s.locale != "" {
		p.Locale = s.locale
	}
	p.NTPServers = append(p.NTPServers, s.ntp...)
	p.Mounts = append(p.Mounts, s.mounts...)
	p.CaCertificates = append(p.CaCertificates, s.trusted...)
	if s.packages != nil {
		if p.Packages == nil {
			p.Packages = &agentv1.Packages{}
		}
		proto.Merge(p.Packages, s.packages)
	}
	if len(s.bootcmd) > 0 {
		p.Commands = append(p.Commands, &agentv1.Command{Name: BootCommand, Script: script(BootCommand, s.bootcmd), EachBoot: true, Early: true})
	}
	if len(s.runcmd) > 0 {
		p.Commands = append(p.Commands, &agentv1.Command{Name: RunCommand, Script: script(RunCommand, s.runcmd)})
	}
	if s.final != "" {
		echo := "#!/bin/sh\nprintf '%s\\n' '" + strings.ReplaceAll(s.final, "'", `'\''`) + "'\n"
		p.Commands = append(p.Commands, &agentv1.Command{Name: FinalMessage, Script: []byte(echo)})
	}
	p.Warnings = append(p.Warnings, s.warnings...)
}

// sshdConfig is where the distributions' sshd_config includes more, by the name that cloud-init gives it.
const sshdConfig = "/etc/ssh/sshd_config.d/50-cloud-init.conf"

// script has all items in one shell, as cloud-init does: a cd or a variable of one holds for the next. It ends at the first that fails,
// and says which.
func script(name string, items []string) []byte {
	var b strings.Builder
	b.WriteString("#!/bin/sh\nset -e\n")
	fmt.Fprintf(&b, "trap 'atoll_code=$?; [ $atoll_code = 0 ] || echo \"%s: item $atoll_item: exit code $atoll_code\" >&2; exit $atoll_code' EXIT\n", name)
	for i, text := range items {
		fmt.Fprintf(&b, "atoll_item=%d\n%s\n", i+1, text)
	}
	return []byte(b.String())
}

// fillUsers adds users, with the groups that they need.
func (s *settings) fillUsers(p *plan.Plan) {
	users := s.users
	deflt := s.deflt
	if s.noDefault {
		deflt = nil
	}
	if deflt != nil {
		if slices.ContainsFunc(users, func(u *user) bool { return u.GetName() == deflt.GetName() }) {
			deflt.at.fault("the user %s is among users too", deflt.GetName())
		}
		users = append([]*user{deflt}, users...)
	}
	find := func(name string) *user {
		if i := slices.IndexFunc(users, func(u *user) bool { return u.GetName() == name }); i >= 0 {
			return users[i]
		}
		if name != "root" {
			return nil
		}
		users = append(users, &user{User: &agentv1.User{Name: name}})
		return users[len(users)-1]
	}
	s.fillKeys(deflt, find)
	for _, pw := range s.passwords {
		u := deflt
		if pw.name != "" {
			u = find(pw.name)
		}
		if u == nil {
			pw.at.fault("it is the password of no user that is here: list that one under users")
			continue
		}
		u.PasswordHash, u.LockPassword = proto.String(pw.hash), false
	}
	for _, group := range s.groups {
		for _, m := range s.members[group] {
			u := find(m.name())
			if u == nil || u.GetName() == "root" && u.at.node == nil {
				// Only whom the config knows: its groups are set as a whole.
				m.fault("not among users, where its groups would be kept")
				continue
			}
			if !slices.Contains(u.GetGroups(), group) {
				u.Groups = append(u.Groups, group)
			}
		}
	}
	groups := slices.Clone(s.groups)
	for _, u := range users {
		if u.createGroups {
			groups = append(groups, u.GetGroups()...)
			groups = append(groups, u.GetPrimaryGroup())
		}
	}
	for _, g := range groups {
		if g != "" && !slices.ContainsFunc(p.GetGroups(), func(o *agentv1.Group) bool { return o.GetName() == g }) {
			p.Groups = append(p.Groups, &agentv1.Group{Name: g})
		}
	}
	for _, u := range users {
		p.Users = append(p.Users, u.User)
	}
}

// fillKeys gives the config's own keys to the default user, else to root: most images for containers have no other.
func (s *settings) fillKeys(deflt *user, find func(string) *user) {
	if len(s.keys) == 0 {
		return
	}
	to := []*user{deflt}
	switch {
	case deflt == nil && s.root != nil && *s.root:
		s.keysAt.fault("they would be root's, as there is no default user, but disable_root is true")
		return
	case deflt == nil:
		to = []*user{find("root")}
	case s.root != nil && !*s.root:
		to = append(to, find("root"))
	}
	for _, u := range to {
		for _, k := range s.keys {
			if !slices.Contains(u.GetSshAuthorizedKeys(), k) {
				u.SshAuthorizedKeys = append(u.SshAuthorizedKeys, k)
			}
		}
	}
}

// fillNames takes a name with dots for the full one, of which the host name is the first word.
func (s *settings) fillNames(p *plan.Plan) {
	host, fqdn := s.hostname, s.fqdn
	if fqdn == "" && strings.Contains(host, ".") {
		host, fqdn = "", host
	}
	if host == "" {
		host, _, _ = strings.Cut(fqdn, ".")
	}
	if s.preserve || host == "" {
		return
	}
	p.Hostname = host
	if fqdn == "" {
		return
	}
	if s.preferFQDN {
		p.Hostname = fqdn
	}
	if !s.noHosts {
		names := slices.Compact([]string{fqdn, host})
		p.Hosts = append(p.Hosts, &agentv1.HostEntry{Address: "127.0.1.1", Names: names})
	}
}
