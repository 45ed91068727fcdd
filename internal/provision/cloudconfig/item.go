package cloudconfig

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// item is a value in a document, and its way there, as users[0].name. What is wrong with it goes to the reader; the answer is empty then.
type item struct {
	r    *reader
	node *yaml.Node
	path string
}

func (it item) fault(format string, args ...any) { it.r.fault(it.node, it.path, format, args...) }

// nothing is what is read once the document has turned out to be too large.
func nothing() *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"} }

// value follows an alias.
func (it item) value() *yaml.Node {
	n := it.node
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if it.r.left <= 0 {
		return nothing()
	}
	if it.r.left -= 1 + len(n.Content) + len(n.Value)>>10; it.r.left <= 0 {
		it.fault("the document is too large, with what its aliases stand for")
		return nothing()
	}
	return n
}

func (it item) isNull() bool    { return isNull(it.value()) }
func (it item) isList() bool    { return it.value().Kind == yaml.SequenceNode }
func (it item) isMapping() bool { return it.value().Kind == yaml.MappingNode }
func isNull(n *yaml.Node) bool  { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }
func plain(n *yaml.Node) bool {
	return n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0
}

// boolean reads those of YAML 1.1, as cloud-init does.
func boolean(s string) (is, ok bool) {
	switch strings.ToLower(s) {
	case "yes", "true", "on":
		return true, true
	case "no", "false", "off":
		return false, true
	}
	return false, false
}

// isBool says whether cloud-init would read a boolean here.
func (it item) isBool() bool {
	n := it.value()
	_, ok := boolean(n.Value)
	return ok && n.Kind == yaml.ScalarNode && plain(n)
}

// bool also takes the words in quotes, as cloud-init does.
func (it item) bool() bool {
	n := it.value()
	is, ok := boolean(n.Value)
	if !ok || n.Kind != yaml.ScalarNode {
		it.fault("want true or false")
	}
	return is
}

// text is a string. What YAML takes for another thing, but was most likely meant as one, has to be in quotes.
func (it item) text() string {
	n := it.value()
	switch {
	case n.Kind != yaml.ScalarNode:
		it.fault("want a string")
		return ""
	case isNull(n):
		it.fault("there is nothing")
		return ""
	case it.isBool():
		it.fault("%s is a boolean in YAML: put it in quotes", n.Value)
		return ""
	case strings.ContainsRune(n.Value, 0):
		it.fault("there is a NUL in it")
		return ""
	}
	return n.Value
}

// line is a string without line breaks at least.
func (it item) line() string {
	s := strings.TrimRight(it.text(), "\n")
	if strings.ContainsAny(s, "\n\r") {
		it.fault("want one line")
		return ""
	}
	return s
}

// id is a user's or group's number.
func (it item) id() *uint32 {
	n, err := strconv.ParseUint(it.text(), 10, 32)
	if err != nil || n == 1<<32-1 {
		it.fault("want a number from 0 to %d", uint32(1<<32-2))
		return nil
	}
	id := uint32(n)
	return &id
}

// mode is octal. A number without a leading zero is decimal to YAML, which nobody means.
func (it item) mode() uint32 {
	text := it.text()
	n := it.value()
	digits := strings.TrimPrefix(text, "0o")
	mode, err := strconv.ParseUint(digits, 8, 32)
	if text == "" {
		return 0
	}
	if plain(n) && n.ShortTag() == "!!int" && !strings.HasPrefix(text, "0") {
		it.fault("%s is a decimal number to YAML: put it in quotes, as '0644'", text)
	} else if err != nil || mode > 0o7777 {
		it.fault("want an octal number in quotes, as '0644'")
	}
	return uint32(mode)
}

// items are the elements of a list.
func (it item) items() []item {
	n := it.value()
	if n.Kind != yaml.SequenceNode {
		it.fault("want a list")
		return nil
	}
	out := make([]item, len(n.Content))
	for i, c := range n.Content {
		out[i] = item{it.r, c, fmt.Sprintf("%s[%d]", it.path, i)}
	}
	return out
}

// texts are the elements of a list of strings.
func (it item) texts(one func(item) string) []string {
	var out []string
	for _, e := range it.items() {
		out = append(out, one(e))
	}
	return out
}

// each goes through a mapping. Its keys are strings, and none is there twice, but for those that come by <<, which hold where there are
// no others.
func (it item) each(do func(name string, value item)) {
	seen := map[string]bool{}
	it.pairs(0, func(key, value *yaml.Node, merged bool) {
		switch {
		case key.Kind != yaml.ScalarNode:
			it.r.fault(key, it.path, "want a string for a key")
		case !seen[key.Value]:
			seen[key.Value] = true
			path := key.Value
			if it.path != "" {
				path = it.path + "." + path
			}
			v := item{it.r, value, path}
			if v.node.Line == 0 || merged {
				do(key.Value, v)
				return
			}
			// A value that goes on for lines is looked for at its key.
			at := *value
			at.Line = key.Line
			v.node = &at
			do(key.Value, v)
		case !merged:
			it.r.fault(key, it.path, "%s is there twice", key.Value)
		}
	})
}

const maxMerges = 8 // deep

func (it item) pairs(depth int, do func(key, value *yaml.Node, merged bool)) {
	n := it.value()
	if n.Kind != yaml.MappingNode {
		it.fault("want keys with values")
		return
	}
	if depth > maxMerges {
		it.fault("<< goes too deep")
		return
	}
	var merges []item
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.ShortTag() != "!!merge" {
			do(key, value, depth > 0)
			continue
		}
		m := item{it.r, value, it.path}
		if m.isList() {
			merges = append(merges, m.items()...)
		} else {
			merges = append(merges, m)
		}
	}
	for _, m := range merges {
		m.pairs(depth+1, do)
	}
}

// fields goes through a mapping whose keys are known: hyphens stand for underscores, as in old configs.
func (it item) fields(known map[string]func(item), unimplemented ...string) {
	it.each(func(name string, v item) {
		normal := strings.ReplaceAll(name, "-", "_")
		switch read := known[normal]; {
		case read != nil:
			read(v)
		case slices.Contains(unimplemented, normal):
			v.fault("not implemented")
		default:
			v.fault("no such key")
		}
	})
}
