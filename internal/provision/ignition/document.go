package ignition

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strings"

	ignerrors "github.com/coreos/ignition/v2/config/shared/errors"
	latest "github.com/coreos/ignition/v2/config/v3_7_experimental"
	"github.com/coreos/ignition/v2/config/v3_7_experimental/types"
	vjson "github.com/coreos/vcontext/json"
	"github.com/coreos/vcontext/path"
	"github.com/coreos/vcontext/report"
)

// parse reads one config of either language. Whatever the version, the config comes as the newest one has it.
func parse(raw []byte) (config types.Config, warnings, faults []string) {
	if len(raw) > mostDocument {
		return config, nil, []string{fmt.Sprintf("%d bytes are more than a config may have (%d)", len(raw), mostDocument)}
	}
	if IsButane(raw) {
		return parseButane(raw)
	}
	config, rep, err := latest.ParseCompatibleVersion(raw)
	warnings, faults = sorted(rep)
	if err != nil && len(faults) == 0 {
		faults = append(faults, versionFault(raw, err))
	}
	if syntax := (*json.SyntaxError)(nil); errors.As(json.Unmarshal(raw, new(any)), &syntax) {
		return config, nil, []string{fmt.Sprintf("%s: %v", position(raw, int(syntax.Offset)), syntax)}
	}
	if err != nil {
		// What is refused is said along with the other faults, as far as it can be read.
		config = types.Config{}
		if json.Unmarshal(raw, &config) != nil {
			return config, nil, faults
		}
	}
	ours := refusals(config)
	if root, err := vjson.UnmarshalToContext(raw); err == nil && root != nil {
		ours.Correlate(root)
	}
	_, more := sorted(ours)
	return config, warnings, append(faults, more...)
}

// position is where the byte is that ends what could be read. (The library gives up on the last one.)
func position(raw []byte, end int) string {
	head := raw[:max(0, min(end, len(raw))-1)]
	return fmt.Sprintf("line %d col %d", 1+bytes.Count(head, []byte("\n")), len(head)-bytes.LastIndexByte(head, '\n'))
}

func versionFault(raw []byte, err error) string {
	var stub struct {
		Ignition struct {
			Version string `json:"version"`
		} `json:"ignition"`
	}
	if errors.Is(err, ignerrors.ErrUnknownVersion) && json.Unmarshal(raw, &stub) == nil {
		return fmt.Sprintf("$.ignition.version: version %q is not known; 3.0.0 to 3.6.0 and %s are", stub.Ignition.Version, types.MaxVersion.String())
	}
	return err.Error()
}

// sorted tells what is fatal in a report.
func sorted(rep report.Report) (warnings, faults []string) {
	// The official library goes over maps, in any order.
	entries := slices.SortedStableFunc(slices.Values(rep.Entries), func(a, b report.Entry) int {
		aLine, aColumn := a.Marker.Start()
		bLine, bColumn := b.Marker.Start()
		return cmp.Or(cmp.Compare(aLine, bLine), cmp.Compare(aColumn, bColumn), strings.Compare(describe(a), describe(b)))
	})
	for _, e := range entries {
		if e.Kind.IsFatal() {
			faults = append(faults, describe(e))
		} else {
			warnings = append(warnings, describe(e))
		}
	}
	return warnings, faults
}

func describe(e report.Entry) string {
	at := ""
	if e.Context.Len() > 0 {
		at = e.Context.String()
	}
	if e.Marker.StartP != nil {
		if at != "" {
			at += ", "
		}
		at += e.Marker.String()
	}
	if at == "" {
		return e.Message
	}
	return at + ": " + e.Message
}

// refusals names what the config asks for and Atoll does not do, and values that Ignition lets pass and no guest can have.
func refusals(c types.Config) report.Report {
	var r refusal
	for field, entries := range map[string]int{
		"disks": len(c.Storage.Disks), "raid": len(c.Storage.Raid), "luks": len(c.Storage.Luks), "filesystems": len(c.Storage.Filesystems),
	} {
		if entries > 0 {
			r.add(noStorage(field), "storage", field)
		}
	}
	r.source(c.Ignition.Config.Replace, "ignition", "config", "replace")
	for i, res := range c.Ignition.Config.Merge {
		r.source(res, "ignition", "config", "merge", i)
	}
	for i, res := range c.Ignition.Security.TLS.CertificateAuthorities {
		r.source(res, "ignition", "security", "tls", "certificateAuthorities", i)
	}
	for i, n := range c.Storage.Directories {
		r.node(n.Node, "storage", "directories", i)
	}
	for i, f := range c.Storage.Files {
		r.node(f.Node, "storage", "files", i)
		r.source(f.Contents, "storage", "files", i, "contents")
		for j, res := range f.Append {
			r.source(res, "storage", "files", i, "append", j)
		}
	}
	for i, n := range c.Storage.Links {
		r.node(n.Node, "storage", "links", i)
		if n.Target != nil {
			r.text(*n.Target, "storage", "links", i, "target")
		}
	}
	for i, u := range c.Passwd.Users {
		r.id(u.UID, "passwd", "users", i, "uid")
	}
	for i, g := range c.Passwd.Groups {
		r.id(g.Gid, "passwd", "groups", i, "gid")
	}
	for i, u := range c.Systemd.Units {
		r.fileName(u.Name, "systemd", "units", i, "name")
		for j, d := range u.Dropins {
			r.fileName(d.Name, "systemd", "units", i, "dropins", j, "name")
		}
	}
	for i, a := range c.KernelArguments.ShouldExist {
		r.argument(string(a), "kernelArguments", "shouldExist", i)
	}
	for i, a := range c.KernelArguments.ShouldNotExist {
		r.argument(string(a), "kernelArguments", "shouldNotExist", i)
	}
	return r.Report
}

func noStorage(field string) error {
	if field == "filesystems" {
		return errors.New("storage.filesystems is not implemented: use the machine's volumes, or mount with a systemd unit")
	}
	return fmt.Errorf("storage.%s is not implemented: a machine's root disk comes from its image", field)
}

type refusal struct{ report.Report }

func (r *refusal) add(err error, at ...any) { r.AddOnError(path.New("json", at...), err) }

func (r *refusal) source(res types.Resource, at ...any) {
	if res.Source == nil || *res.Source == "" {
		return
	}
	u, err := url.Parse(*res.Source)
	if err != nil {
		return // the official parser has said so
	}
	switch u.Scheme {
	case "data", "http", "https":
	case "s3", "gs", "tftp", "arn":
		r.add(fmt.Errorf("source %s: scheme %s is not implemented: data, http and https are", shown(u), u.Scheme), append(at, "source")...)
	}
}

func (r *refusal) node(n types.Node, at ...any) {
	r.text(n.Path, append(at, "path")...)
	r.id(n.User.ID, append(at, "user", "id")...)
	r.id(n.Group.ID, append(at, "group", "id")...)
}

func (r *refusal) id(id *int, at ...any) {
	// 2^32-1 means "no change" to chown(2).
	if id != nil && (*id < 0 || int64(*id) >= math.MaxUint32) {
		r.add(fmt.Errorf("%d is no ID: 0 to %d are", *id, uint32(math.MaxUint32-1)), at...)
	}
}

func (r *refusal) text(s string, at ...any) {
	if strings.ContainsRune(s, 0) {
		r.add(fmt.Errorf("%q has a zero byte in it", s), at...)
	}
}

func (r *refusal) fileName(s string, at ...any) {
	if strings.ContainsAny(s, "/\x00\n") {
		r.add(fmt.Errorf("%q is no name of a file", s), at...)
	}
}

func (r *refusal) argument(s string, at ...any) {
	if s == "" || strings.ContainsAny(s, "\x00\n\r") {
		r.add(fmt.Errorf("%q is no kernel argument", s), at...)
	}
}

// shown is a source for a person: without what may be secret in it.
func shown(u *url.URL) string {
	if u.Scheme == "data" {
		return "data:…"
	}
	c := *u
	if c.RawQuery != "" {
		c.RawQuery = "…"
	}
	return strings.Replace(c.Redacted(), "?%E2%80%A6", "?…", 1)
}
