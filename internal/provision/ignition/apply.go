package ignition

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/coreos/ignition/v2/config/v3_7_experimental/types"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// downloaded is a config with all that its files have.
type downloaded struct {
	config   types.Config
	contents map[int]content   // by the file's place in the config
	appends  map[int][]content // in their order
}

func download(ctx context.Context, f *fetcher, c types.Config) (*downloaded, error) {
	d := &downloaded{config: c, contents: map[int]content{}, appends: map[int][]content{}}
	for i, file := range c.Storage.Files {
		get := func(res types.Resource) (content, error) {
			got, err := f.content(ctx, res)
			if err != nil {
				return content{}, fmt.Errorf("file %s: source %s: %w", file.Path, sourceName(res), err)
			}
			return got, nil
		}
		var err error
		if file.Contents.Source != nil {
			if d.contents[i], err = get(file.Contents); err != nil {
				return nil, err
			}
		}
		for _, res := range file.Append {
			got, err := get(res)
			if err != nil {
				return nil, err
			}
			d.appends[i] = append(d.appends[i], got)
		}
	}
	return d, nil
}

func (d *downloaded) addTo(p *plan.Plan) {
	for _, g := range d.config.Passwd.Groups {
		p.Groups = append(p.Groups, &agentv1.Group{
			Name: g.Name, Gid: number(g.Gid), PasswordHash: full(g.PasswordHash), System: is(g.System), Absent: isNot(g.ShouldExist),
		})
	}
	for _, u := range d.config.Passwd.Users {
		p.Users = append(p.Users, user(u))
	}
	// The agent makes these in the order of the list; what lies deeper may lie in what comes first.
	for _, n := range byDepth(d.config.Storage.Directories, func(n types.Directory) types.Node { return n.Node }) {
		p.Directories = append(p.Directories, &agentv1.Directory{Node: node(n.Node, n.Mode)})
	}
	for i, n := range d.config.Storage.Files {
		file := &agentv1.File{Node: node(n.Node, n.Mode), HasContents: n.Contents.Source != nil}
		if c, ok := d.contents[i]; ok && c.size > 0 {
			file.Contents = append(file.Contents, c.piece(p))
		}
		for _, c := range d.appends[i] {
			if c.size > 0 {
				file.Append = append(file.Append, c.piece(p))
			}
		}
		p.Files = append(p.Files, file)
	}
	links := byDepth(d.config.Storage.Links, func(n types.Link) types.Node { return n.Node })
	// Hard links last: they may be to what lies deeper.
	slices.SortStableFunc(links, func(a, b types.Link) int { return rank(a) - rank(b) })
	for _, n := range links {
		p.Links = append(p.Links, &agentv1.Link{Node: node(n.Node, nil), Target: value(n.Target), Hard: is(n.Hard)})
	}
	for _, u := range d.config.Systemd.Units {
		p.Units = append(p.Units, unit(u))
	}
	for _, a := range d.config.KernelArguments.ShouldExist {
		p.KernelArgs = append(p.KernelArgs, string(a))
	}
	for _, a := range d.config.KernelArguments.ShouldNotExist {
		p.DropArgs = append(p.DropArgs, string(a))
	}
}

func (c content) piece(p *plan.Plan) *agentv1.Piece {
	if c.path == "" {
		return p.Bytes(bytes.Clone(c.data))
	}
	return p.Stream(plan.Content{Size: c.size, Open: func() (io.ReadCloser, error) { return os.Open(c.path) }})
}

func byDepth[T any](nodes []T, of func(T) types.Node) []T {
	sorted := slices.Clone(nodes)
	slices.SortStableFunc(sorted, func(a, b T) int { return of(a).Depth() - of(b).Depth() })
	return sorted
}

func rank(l types.Link) int {
	if is(l.Hard) {
		return 1
	}
	return 0
}

func user(u types.PasswdUser) *agentv1.User {
	out := &agentv1.User{
		Name: u.Name, Uid: number(u.UID), Gecos: value(u.Gecos), Home: value(u.HomeDir), NoCreateHome: is(u.NoCreateHome),
		PrimaryGroup: value(u.PrimaryGroup), NoUserGroup: is(u.NoUserGroup), System: is(u.System), Shell: value(u.Shell),
		PasswordHash: u.PasswordHash, Absent: isNot(u.ShouldExist),
	}
	// An empty hash would let in without a password; Ignition takes it for one that nothing matches.
	if u.PasswordHash != nil && *u.PasswordHash == "" {
		none := "*"
		out.PasswordHash = &none
	}
	for _, g := range u.Groups {
		out.Groups = append(out.Groups, string(g))
	}
	for _, k := range u.SSHAuthorizedKeys {
		out.SshAuthorizedKeys = append(out.SshAuthorizedKeys, strings.TrimRight(string(k), "\n"))
	}
	return out
}

func unit(u types.Unit) *agentv1.Unit {
	out := &agentv1.Unit{Name: u.Name, Enabled: u.Enabled, Masked: u.Mask}
	if value(u.Contents) != "" {
		out.Contents = []byte(*u.Contents)
	}
	for _, d := range u.Dropins {
		if d.Contents != nil {
			out.DropIns = append(out.DropIns, &agentv1.DropIn{Name: d.Name, Contents: []byte(*d.Contents)})
		}
	}
	return out
}

func node(n types.Node, mode *int) *agentv1.Node {
	return &agentv1.Node{
		Path: n.Path, Overwrite: n.Overwrite, Mode: number(mode),
		User: owner(n.User.ID, n.User.Name), Group: owner(n.Group.ID, n.Group.Name),
	}
}

func owner(id *int, name *string) *agentv1.Owner {
	if id == nil && value(name) == "" {
		return nil
	}
	return &agentv1.Owner{Id: number(id), Name: value(name)}
}

// number is for IDs and modes, whose bounds were checked.
func number(n *int) *uint32 {
	if n == nil {
		return nil
	}
	u := uint32(*n)
	return &u
}

func full(s *string) *string {
	if value(s) == "" {
		return nil
	}
	return s
}

func is(b *bool) bool    { return b != nil && *b }
func isNot(b *bool) bool { return b != nil && !*b }
