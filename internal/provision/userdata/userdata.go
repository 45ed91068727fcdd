// Package userdata takes user-data apart as cloud-init does: MIME messages of several parts, gzip, #include, boothooks, archives; and
// makes a plan of the cloud-configs and scripts in it. It owns the order in which parts take effect. What is in a cloud-config is
// provision/cloudconfig's. docs/provisioning-cloud-config.md lists the kinds of parts. Imported by provision. Its functions may be
// called from several goroutines.
package userdata

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/containerd/errdefs"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/cloudconfig"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// Bounds of what a document may come to.
const (
	mostBytes    = 32 << 20 // of all parts together, unpacked
	mostParts    = 256
	mostDepth    = 8         // of parts in parts
	mostIncludes = 64        // URLs
	mostMessage  = 512 << 10 // what travels in the agent's one message, whose frame has 1 MiB
)

// Options are what Apply needs of its surroundings.
type Options struct {
	// Transport makes the requests of #include, with the host's proxy and certificate authorities. nil: http.DefaultTransport's settings.
	Transport *http.Transport
	Alive     func() // is called when a request is answered; nil: nobody asks
}

// Check finds every fault that can be found without the network: what is included is not looked at.
func Check(raw []byte) (warnings []string, err error) {
	p := plan.New()
	err = apply(context.Background(), raw, p, nil)
	return p.Warnings, err
}

// Apply fetches what is included and adds all to p. After an error p may have some of it.
func Apply(ctx context.Context, raw []byte, p *plan.Plan, o Options) error {
	f := newFetcher(o)
	defer f.close()
	return apply(ctx, raw, p, f)
}

func apply(ctx context.Context, raw []byte, p *plan.Plan, f *fetcher) error {
	w := &walker{fetch: f}
	w.walk(ctx, part{data: raw}, 0)
	if err := errors.Join(w.faults...); err != nil {
		return err
	}
	scripts, before := w.scripts, len(p.Commands)
	if w.config != nil {
		if err := w.config.Apply(p); err != nil {
			return err
		}
		for _, c := range p.Commands[before:] {
			scripts = append(scripts, script{c, turns[c.GetName()]})
		}
	}
	p.Commands = append(p.Commands[:before:before], inOrder(scripts)...)
	if size := proto.Size(p.Provision); size > mostMessage {
		err := fmt.Errorf("scripts, users and all else but files have %d bytes, more than %d: %w", size, mostMessage, errdefs.ErrInvalidArgument)
		return hint.With(err, "put what is large into files, by write_files or --file")
	}
	return nil
}

// part is a piece of user-data. Without a kind, its beginning tells.
type part struct {
	name string // for errors; empty where the document has one part only
	file string // its name, by which scripts are sorted
	kind string // a media type
	data []byte
}

func (p part) String() string {
	switch {
	case p.name != "" && p.file != "":
		return fmt.Sprintf("%s (%q)", p.name, p.file)
	case p.file != "":
		return fmt.Sprintf("%q", p.file)
	}
	return p.name
}

// walker gathers what parts come to.
type walker struct {
	fetch   *fetcher // nil: nothing is fetched
	config  *cloudconfig.Config
	scripts []script
	faults  []error
	parts   int
	leaves  int // that are configs or scripts
	bytes   int
	fetched int
	outside int  // how many of the documents that led here were fetched
	full    bool // a bound was met
}

func (w *walker) fault(p part, format string, args ...any) {
	place := p.String()
	if place != "" {
		place += ": "
	}
	args = append(append([]any{place}, args...), errdefs.ErrInvalidArgument)
	w.faults = append(w.faults, fmt.Errorf("%s"+format+": %w", args...))
}

// bound says that there is no room for one more part.
func (w *walker) bound(p part, depth int) bool {
	w.parts++
	w.bytes += len(p.data)
	var what string
	switch {
	case w.full:
		return true
	case depth > mostDepth:
		what = fmt.Sprintf("parts in parts go deeper than %d", mostDepth)
	case w.parts > mostParts:
		what = fmt.Sprintf("there are more than %d parts", mostParts)
	case w.bytes > mostBytes:
		what = fmt.Sprintf("all parts have more than %d bytes", mostBytes)
	default:
		return false
	}
	w.full = true
	w.fault(p, "%s", what)
	return true
}

// The kinds of parts, as cloud-init names them.
const (
	kindConfig      = "text/cloud-config"
	kindArchive     = "text/cloud-config-archive"
	kindInclude     = "text/x-include-url"
	kindIncludeOnce = "text/x-include-once-url"
	kindBoothook    = "text/cloud-boothook"
	kindScript      = "text/x-shellscript"
	kindPerBoot     = "text/x-shellscript-per-boot"
	kindPerInstance = "text/x-shellscript-per-instance"
	kindPerOnce     = "text/x-shellscript-per-once"
	kindJinja       = "text/jinja2"
	kindMessage     = "message/rfc822"
)

// beginnings tell a part's kind where its media type does not; those that begin another come after it.
var beginnings = []struct{ text, kind string }{
	{"#cloud-config-archive", kindArchive},
	{"#cloud-config-jsonp", "text/cloud-config-jsonp"},
	{"#cloud-config", kindConfig},
	{"#include-once", kindIncludeOnce},
	{"#include", kindInclude},
	{"#cloud-boothook", kindBoothook},
	{"#part-handler", "text/part-handler"},
	{"#upstart-job", "text/upstart-job"},
	{"## template: jinja", kindJinja},
	{"#!", kindScript},
	{"content-type:", kindMessage},
	{"mime-version:", kindMessage},
}

func kindOf(data []byte) string {
	for _, b := range beginnings {
		if len(data) >= len(b.text) && strings.EqualFold(string(data[:len(b.text)]), b.text) {
			return b.kind
		}
	}
	return ""
}

// walk takes one part for what it is.
func (w *walker) walk(ctx context.Context, p part, depth int) {
	if w.bound(p, depth) {
		return
	}
	if data, packed, err := gunzip(p.data, mostBytes-w.bytes); packed {
		if err != nil {
			w.fault(p, "unpacking it: %w", err)
			return
		}
		w.walk(ctx, part{p.name, p.file, "", data}, depth+1)
		return
	}
	switch p.kind {
	case "", "text/plain", "text/x-not-multipart", "application/octet-stream":
		p.kind = kindOf(p.data)
	}
	if kindOf(p.data) == kindJinja { // whatever it says it is
		p.kind = kindJinja
	}
	switch p.kind {
	case kindConfig:
		w.addConfig(p)
	case kindArchive:
		w.archive(ctx, p, depth)
	case kindInclude, kindIncludeOnce:
		w.include(ctx, p, depth)
	case kindMessage:
		w.message(ctx, p, depth)
	case kindBoothook:
		w.addScript(p, afterLine(p.data, "#cloud-boothook"))
	case kindScript, kindPerBoot, kindPerInstance, kindPerOnce:
		w.addScript(p, p.data)
	case "":
		first, _, _ := bytes.Cut(p.data, []byte("\n"))
		w.fault(p, "its first line %q tells nothing that is known here", first[:min(len(first), 60)])
	default:
		w.fault(p, "parts of type %s are not implemented", p.kind)
	}
}

func (w *walker) addConfig(p part) {
	w.leaves++
	c, err := cloudconfig.Parse(p.String(), p.data)
	switch {
	case err != nil:
		w.faults = append(w.faults, err)
	case w.config == nil:
		w.config = c
	default:
		w.config.Merge(c)
	}
}

func (w *walker) addScript(p part, text []byte) {
	w.leaves++
	name := p.file
	if name == "" {
		name = fmt.Sprintf("part-%03d", w.leaves)
	}
	if p.name == "" && p.file == "" {
		name = "user-data"
	}
	if len(bytes.TrimSpace(text)) == 0 {
		w.fault(p, "the script is empty")
	}
	w.scripts = append(w.scripts, script{
		&agentv1.Command{Name: name, Script: text, Early: p.kind == kindBoothook, EachBoot: p.kind == kindBoothook || p.kind == kindPerBoot},
		turns[p.kind],
	})
}

// afterLine is what follows the first line, where that begins so.
func afterLine(data []byte, beginning string) []byte {
	if !bytes.HasPrefix(data, []byte(beginning)) {
		return data
	}
	_, rest, _ := bytes.Cut(data, []byte("\n"))
	return rest
}

// script is a command and its turn.
type script struct {
	*agentv1.Command
	turn int
}

// turns are cloud-init's, by a part's kind, or by the name of a command that a config makes.
var turns = map[string]int{
	kindBoothook:             0,
	cloudconfig.BootCommand:  1,
	kindPerOnce:              2,
	kindPerBoot:              3,
	kindPerInstance:          4,
	kindScript:               5,
	cloudconfig.RunCommand:   5,
	cloudconfig.FinalMessage: 6,
}

// inOrder has plain scripts by their names, among which runcmd is one, and all others as they came.
func inOrder(scripts []script) []*agentv1.Command {
	slices.SortStableFunc(scripts, func(a, b script) int {
		if a.turn == turns[kindScript] && b.turn == a.turn {
			return cmp.Compare(a.GetName(), b.GetName())
		}
		return a.turn - b.turn
	})
	var commands []*agentv1.Command
	for _, s := range scripts {
		commands = append(commands, s.Command)
	}
	return commands
}
