// Package cloudconfig turns cloud-init's #cloud-config into what the guest gets. It owns which keys there are and what each means here;
// a key that it does not carry out is refused by name and line, never ignored. docs/provisioning-cloud-config.md lists them.
// User-data of several parts is userdata's, which merges configs. Imported by provision/userdata. Its functions may be called from
// several goroutines; a Config belongs to one.
package cloudconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// Config is a config whose keys and values are each right by themselves.
type Config struct{ keys map[string]item }

// Check finds every fault of a config.
func Check(raw []byte) error {
	c, err := Parse("", raw)
	if err != nil {
		return err
	}
	return c.Apply(plan.New())
}

// Apply adds what a config says to p. After an error p may have some of it.
func Apply(raw []byte, p *plan.Plan) error {
	c, err := Parse("", raw)
	if err != nil {
		return err
	}
	return c.Apply(p)
}

// Parse reads a config and finds what is wrong with single keys. from names it in errors, before the line; it may be empty.
func Parse(from string, raw []byte) (*Config, error) {
	r := newReader(from)
	c := &Config{keys: map[string]item{}}
	var doc, more yaml.Node
	switch d := yaml.NewDecoder(bytes.NewReader(raw)); {
	case !decode(r, d, &doc): // empty, or a fault
	case decode(r, d, &more):
		r.fault(&more, "", "a second document begins; a config has one")
	default:
		top := item{r, doc.Content[0], ""}
		if top.node.Kind == yaml.ScalarNode && top.node.Tag == "!!null" {
			break // nothing but comments
		}
		top.each(func(name string, it item) {
			name = strings.ReplaceAll(name, "-", "_") // ca-certs
			it.path = name
			c.keys[name] = it
		})
	}
	c.settings(r)
	return c, r.error()
}

// decode reads the next document, and says whether there was one.
func decode(r *reader, d *yaml.Decoder, doc *yaml.Node) bool {
	err := d.Decode(doc)
	switch {
	case errors.Is(err, io.EOF):
		return false
	case err != nil:
		r.faults = append(r.faults, fault{text: r.place(0) + strings.TrimPrefix(err.Error(), "yaml: ")})
		return false
	}
	return len(doc.Content) == 1
}

// Merge lets the keys of a later config replace those of this one, as cloud-init does where nobody says otherwise.
func (c *Config) Merge(later *Config) { maps.Copy(c.keys, later.keys) }

// Apply adds what the config says to p, where its keys go together.
func (c *Config) Apply(p *plan.Plan) error {
	r := newReader("")
	s := c.settings(r)
	s.fill(p)
	return r.error()
}

// settings reads all keys.
func (c *Config) settings(r *reader) *settings {
	s := &settings{members: map[string][]item{}}
	var names []string
	for name := range c.keys {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return c.keys[a].node.Line - c.keys[b].node.Line })
	for _, name := range names {
		it := c.keys[name]
		it.r = &reader{it.r.from, r.report}
		switch read := keys[name]; {
		case read != nil:
			read(s, it)
		case slices.Contains(others, name):
			it.fault("not implemented")
		default:
			it.fault("no such key")
		}
	}
	return s
}

func newReader(from string) *reader { return &reader{from, &report{left: maxNodes}} }

// maxNodes bounds what aliases can make of a small document.
const maxNodes = 1 << 20

// reader knows which document it reads, for the report that it shares with others.
type reader struct {
	from string
	*report
}

// report gathers faults.
type report struct {
	faults []fault
	left   int // how many nodes may still be read
}

type fault struct {
	line int
	text string
}

func (r *reader) place(line int) string {
	words := r.from
	if line > 0 {
		if words != "" {
			words += ", "
		}
		words += fmt.Sprintf("line %d", line)
	}
	if words != "" {
		words += ": "
	}
	return words
}

// fault must not quote values, which may be secret.
func (r *reader) fault(n *yaml.Node, path, format string, args ...any) {
	if len(r.faults) > 10*maxFaults {
		return
	}
	if path != "" {
		path += ": "
	}
	r.faults = append(r.faults, fault{n.Line, r.place(n.Line) + path + fmt.Sprintf(format, args...)})
}

// maxFaults keeps an error readable.
const maxFaults = 20

func (r *reader) error() error {
	if len(r.faults) == 0 {
		return nil
	}
	var lines []string
	for _, f := range r.faults {
		if !slices.Contains(lines, f.text) {
			lines = append(lines, f.text)
		}
	}
	if over := len(lines) - maxFaults; over > 0 {
		lines = append(lines[:maxFaults], fmt.Sprintf("and %d more", over))
	}
	err := fmt.Errorf("cloud-config: %s: %w", strings.Join(lines, "\n  "), errdefs.ErrInvalidArgument)
	if len(lines) > 1 {
		err = fmt.Errorf("cloud-config:\n  %s: %w", strings.Join(lines, "\n  "), errdefs.ErrInvalidArgument)
	}
	return hint.With(err, "docs/provisioning-cloud-config.md lists what is implemented")
}
