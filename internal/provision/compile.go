package provision

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/form"
	"github.com/atollvm/atoll/internal/provision/hostkey"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/atollvm/atoll/internal/provision/zone"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// Options is what Compile needs beside a request.
type Options struct {
	HostKeys []hostkey.Key // those generated for the machine
	Spool    string        // a directory for what documents fetch; it must last until the plan is carried out
	// Transport makes the requests, with the host's proxy and certificate authorities; nil: Go's default.
	Transport *http.Transport
	Alive     func() // is called when a request makes progress; nil: nobody asks
}

// Compile makes the plan of a request that Check has passed. Documents come first and what flags say after them, so that flags win. It may
// use the network, where a document refers to others.
func Compile(ctx context.Context, r Request, o Options) (*plan.Plan, error) {
	p := plan.New()
	if err := r.applyDocuments(ctx, p, o); err != nil {
		return nil, err
	}
	if err := r.applyUsers(p); err != nil {
		return nil, err
	}
	if err := r.applyFiles(p); err != nil {
		return nil, err
	}
	if err := keepEachBoot(p); err != nil {
		return nil, err
	}
	r.applyMounts(p)
	if err := r.applySecrets(p); err != nil {
		return nil, err
	}
	if r.Timezone != "" {
		p.Timezone, p.Zone = r.Timezone, nil
	}
	if name := p.GetTimezone(); name != "" && len(p.GetZone()) == 0 {
		tz, err := zone.Find(name)
		if err != nil {
			return nil, err
		}
		p.Zone = tz
	}
	if r.Locale != "" {
		p.Locale = r.Locale
	}
	if len(r.NTPServers) > 0 {
		p.NTPServers = r.NTPServers
	}
	for _, name := range r.Packages {
		if p.Packages == nil {
			p.Packages = &agentv1.Packages{}
		}
		if !slices.Contains(p.Packages.GetNames(), name) {
			p.Packages.Names = append(p.Packages.Names, name)
		}
	}
	return p, r.applyHostKeys(p, o.HostKeys)
}

func (r *Request) applyDocuments(ctx context.Context, p *plan.Plan, o Options) error {
	if r.Ignition != nil {
		if err := applyIgnition(ctx, r.Ignition, p, o); err != nil {
			return fmt.Errorf("ignition: %w", err)
		}
	}
	if r.UserData == nil {
		return nil
	}
	var err error
	switch kindOf(r.UserData) {
	case script:
		p.Commands = append(p.Commands, &agentv1.Command{Name: "user-data", Script: r.UserData})
	case ignitionOrButane:
		err = applyIgnition(ctx, r.UserData, p, o)
	default:
		err = applyCloudConfig(ctx, r.UserData, p, o)
	}
	if err != nil {
		return fmt.Errorf("user-data: %w", err)
	}
	return nil
}

// sudoRule is what a user who may do anything without a password has in sudoers.
const sudoRule = "ALL=(ALL:ALL) NOPASSWD:ALL"

// applyUsers adds the users, or changes those that a document has made.
func (r *Request) applyUsers(p *plan.Plan) error {
	user := func(name string) *agentv1.User {
		i := slices.IndexFunc(p.GetUsers(), func(u *agentv1.User) bool { return u.GetName() == name })
		if i < 0 {
			i = len(p.Users)
			p.Users = append(p.Users, &agentv1.User{Name: name})
		}
		return p.Users[i]
	}
	for _, given := range r.Users {
		u := user(given.Name)
		u.Absent = false
		if given.UID != nil {
			u.Uid = proto.Uint32(*given.UID)
		}
		if given.Home != "" {
			u.Home = given.Home
		}
		if given.Shell != "" {
			u.Shell = given.Shell
		}
		if given.Groups != nil {
			u.Groups = given.Groups
		}
		if given.Sudo {
			u.Sudo = []string{sudoRule}
		}
		if given.PasswordHash != "" {
			u.PasswordHash, u.LockPassword = proto.String(given.PasswordHash), false
		}
		keys := given.SSHAuthorizedKeys
		if len(keys) == 0 {
			keys = r.SSHAuthorizedKeys
		}
		addKeys(u, keys)
	}
	if len(r.SSHAuthorizedKeys) > 0 && !slices.ContainsFunc(r.Users, func(u User) bool { return u.Name == "root" }) {
		addKeys(user("root"), r.SSHAuthorizedKeys)
	}
	return nil
}

func addKeys(u *agentv1.User, keys []string) {
	for _, k := range keys {
		if !slices.Contains(u.GetSshAuthorizedKeys(), k) {
			u.SshAuthorizedKeys = append(u.SshAuthorizedKeys, k)
		}
	}
}

// applyFiles adds the files; one of a document with the same path, and what else is to be there, gives way.
func (r *Request) applyFiles(p *plan.Plan) error {
	for _, f := range r.Files {
		mode := f.Mode
		if mode == 0 {
			mode = 0o644
		}
		user, group, err := owners(f.Owner)
		if err != nil {
			return err
		}
		p.Files = slices.DeleteFunc(p.Files, func(o *agentv1.File) bool { return o.GetNode().GetPath() == f.Path })
		p.Links = slices.DeleteFunc(p.Links, func(o *agentv1.Link) bool { return o.GetNode().GetPath() == f.Path })
		p.Files = append(p.Files, &agentv1.File{
			Node:        &agentv1.Node{Path: f.Path, Overwrite: proto.Bool(true), User: owner(user), Group: owner(group), Mode: proto.Uint32(mode)},
			Contents:    []*agentv1.Piece{p.Bytes(f.Data)},
			HasContents: true,
		})
	}
	return nil
}

// keepEachBoot looks at the files that the machine writes anew at each boot: one that is written at the first would be lost at the second.
// The hostname's becomes the hostname.
func keepEachBoot(p *plan.Plan) error {
	var kept []*agentv1.File
	for _, f := range p.GetFiles() {
		help := ""
		switch f.GetNode().GetPath() {
		case "/etc/hosts":
			help = "give the lines by --add-host NAME:ADDRESS; in cloud-config, manage_etc_hosts adds the name of the machine"
		case "/etc/resolv.conf":
			help = "give --dns, --dns-search and --dns-option"
		case "/etc/hostname":
			name, ok := inline(f)
			if name = strings.TrimSpace(name); ok && form.Host(name) && len(name) <= 64 {
				p.Hostname = name
				continue
			}
			help = "give it by --hostname, or as nothing but a hostname"
		default:
			kept = append(kept, f)
			continue
		}
		return hint.With(fmt.Errorf("file %s: a machine writes it anew at each boot: %w", f.GetNode().GetPath(), errdefs.ErrInvalidArgument), "%s", help)
	}
	p.Files = kept
	return nil
}

// inline is what a file is to hold, if that is short and no addition to what is there.
func inline(f *agentv1.File) (text string, ok bool) {
	for _, piece := range f.GetContents() {
		if _, ok := piece.GetKind().(*agentv1.Piece_Inline); !ok {
			return "", false
		}
		text += string(piece.GetInline())
	}
	return text, f.GetHasContents() && len(f.GetAppend()) == 0
}

// owner is nil, which is root, for "".
func owner(s string) *agentv1.Owner {
	if s == "" {
		return nil
	}
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return &agentv1.Owner{Id: proto.Uint32(uint32(n))}
	}
	return &agentv1.Owner{Name: s}
}

func (r *Request) applyMounts(p *plan.Plan) {
	for _, m := range r.Mounts {
		p.Mounts = slices.DeleteFunc(p.Mounts, func(o *agentv1.FileSystemMount) bool { return o.GetPath() == m.Path })
		source := m.Source
		if source == "" {
			source = m.Type
		}
		p.Mounts = append(p.Mounts, &agentv1.FileSystemMount{Source: source, Path: m.Path, Type: m.Type, Options: m.Options})
	}
}

func (r *Request) applySecrets(p *plan.Plan) error {
	for _, s := range r.Secrets {
		user, group, err := owners(s.Owner)
		if err != nil {
			return err
		}
		out := &agentv1.Secret{Name: s.Name, Data: s.Data, User: owner(user), Group: owner(group)}
		if s.Mode != 0 {
			out.Mode = proto.Uint32(s.Mode)
		}
		p.Secrets = slices.DeleteFunc(p.Secrets, func(o *agentv1.Secret) bool { return o.GetName() == s.Name })
		p.Secrets = append(p.Secrets, out)
	}
	return nil
}

// applyHostKeys adds the keys that were given, or generated where neither flags nor a document have any.
func (r *Request) applyHostKeys(p *plan.Plan, generated []hostkey.Key) error {
	if len(r.SSHHostKeys) == 0 && len(p.GetSshHostKeys()) > 0 {
		return nil
	}
	keys, err := r.HostKeys(generated)
	if err != nil {
		return err
	}
	p.SshHostKeys = nil
	for _, k := range keys {
		p.SshHostKeys = append(p.SshHostKeys, &agentv1.SSHHostKey{Type: k.Type, Private: k.Private, Public: k.Public})
	}
	return nil
}

// Standing is what of a plan holds at each boot of the machine, the first included.
type Standing struct {
	Provision  []byte   `json:",omitempty"` // agentv1.Provision
	Hostname   string   `json:",omitempty"`
	Hosts      []byte   `json:",omitempty"` // agentv1.Config with nothing but hosts
	NTPServers []string `json:",omitempty"`
	KernelArgs []string `json:",omitempty"`
	DropArgs   []string `json:",omitempty"`
}

// StandingOf takes out of a plan what later boots need of it.
func StandingOf(p *plan.Plan) (Standing, error) {
	each := &agentv1.Provision{Mounts: p.GetMounts(), Secrets: p.GetSecrets(), Locale: p.GetLocale()}
	for _, c := range p.GetCommands() {
		if c.GetEachBoot() {
			each.Commands = append(each.Commands, c)
		}
	}
	s := Standing{Hostname: p.Hostname, NTPServers: p.NTPServers, KernelArgs: p.KernelArgs, DropArgs: p.DropArgs}
	var err error
	if s.Provision, err = proto.Marshal(each); err != nil {
		return s, fmt.Errorf("keeping what holds at each boot: %w", err)
	}
	if s.Hosts, err = proto.Marshal(&agentv1.Config{Hosts: p.Hosts}); err != nil {
		return s, fmt.Errorf("keeping what holds at each boot: %w", err)
	}
	return s, nil
}

// Plan is the plan for a boot at which nothing else is to be done.
func (s Standing) Plan() (*plan.Plan, error) {
	p := plan.New()
	var hosts agentv1.Config
	if err := proto.Unmarshal(s.Provision, p.Provision); err != nil {
		return nil, fmt.Errorf("reading what holds at each boot: %w", err)
	}
	if err := proto.Unmarshal(s.Hosts, &hosts); err != nil {
		return nil, fmt.Errorf("reading what holds at each boot: %w", err)
	}
	p.Hostname, p.Hosts, p.NTPServers, p.KernelArgs, p.DropArgs = s.Hostname, hosts.GetHosts(), s.NTPServers, s.KernelArgs, s.DropArgs
	return p, nil
}

// Empty says that later boots need nothing.
func (s Standing) Empty() bool {
	return len(s.Provision)+len(s.Hosts)+len(s.NTPServers)+len(s.KernelArgs)+len(s.DropArgs) == 0 && s.Hostname == ""
}
