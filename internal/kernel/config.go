package kernel

import (
	"bytes"
	_ "embed"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// The configuration of our own kernel: docs/kernels.md says how it is chosen.
//
//go:embed config/common.config
var commonConfig string

//go:embed config/amd64.config
var amd64Config string

//go:embed config/arm64.config
var arm64Config string

// setting is a line of a fragment: what a symbol shall be, n for "is not set".
type setting struct {
	symbol, value string
	optional      bool // it may come out otherwise: not every version of Linux has it
}

// parseSettings reads a fragment, or a whole configuration: every line is CONFIG_X=value, "# CONFIG_X is not set" or a comment. It
// gathers every fault before it returns. Only our own fragments have the mark "# optional".
func parseSettings(name, text string) ([]setting, error) {
	var all []setting
	var faults []string
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if symbol, ok := strings.CutSuffix(line, " is not set"); ok && strings.HasPrefix(symbol, "# CONFIG_") {
			all = append(all, setting{symbol: strings.TrimPrefix(symbol, "# CONFIG_"), value: "n"})
			continue
		}
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		line, comment, _ := strings.Cut(line, " # ")
		symbol, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		symbol, prefixed := strings.CutPrefix(symbol, "CONFIG_")
		if !ok || !prefixed || !isSymbol(symbol) || !isValue(value) {
			faults = append(faults, fmt.Sprintf("%s:%d: %.80q", name, n, line))
			continue
		}
		all = append(all, setting{symbol, value, strings.HasPrefix(comment, "optional")})
	}
	if len(faults) > 0 {
		more := ""
		if len(faults) > 10 {
			faults, more = faults[:10], ", …"
		}
		return nil, hint.With(fmt.Errorf("reading the kernel configuration: %s%s: %w", strings.Join(faults, ", "), more, errdefs.ErrInvalidArgument),
			"each line is CONFIG_NAME=value, # CONFIG_NAME is not set, or a comment")
	}
	return all, nil
}

func isSymbol(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	})
}

// isValue accepts what Kconfig writes: y, m, n, numbers and strings in quotes.
func isValue(v string) bool {
	if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' {
		return true
	}
	return v != "" && !strings.ContainsFunc(v, func(r rune) bool {
		return r != '-' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	})
}

// isWhole tells a whole .config, which the kernel's own tools wrote, from a fragment.
func isWhole(text []byte) bool {
	return bytes.Contains(text, []byte("\n# Automatically generated file; DO NOT EDIT.\n")) ||
		bytes.HasPrefix(text, []byte("# Automatically generated file; DO NOT EDIT.\n")) ||
		bytes.Contains(text, []byte("\nCONFIG_CC_VERSION_TEXT="))
}

// recipe is what a kernel is configured from.
type recipe struct {
	whole    bool // take what the settings do not name from the defaults of Linux, and not n
	settings []setting
}

// newRecipe joins our configuration and the user's: a fragment has the last word over ours, a whole configuration replaces it.
func newRecipe(arch string, user []byte) (recipe, error) {
	own, err := ownSettings(arch)
	if err != nil {
		return recipe{}, err
	}
	given, err := parseSettings("--config", string(user))
	if err != nil {
		return recipe{}, err
	}
	for _, g := range given {
		if g.value == "m" && !isWhole(user) {
			return recipe{}, hint.With(fmt.Errorf("CONFIG_%s=m: Atoll's own kernel has no modules: %w", g.symbol, errdefs.ErrInvalidArgument),
				"build it in: CONFIG_%s=y", g.symbol)
		}
	}
	if isWhole(user) {
		return recipe{whole: true, settings: given}, nil
	}
	return recipe{settings: merge(own, given)}, nil
}

func ownSettings(arch string) ([]setting, error) {
	text := amd64Config
	if arch == "arm64" {
		text = arm64Config
	}
	common, err := parseSettings("common.config", commonConfig)
	if err != nil {
		return nil, err
	}
	special, err := parseSettings(arch+".config", text)
	if err != nil {
		return nil, err
	}
	return merge(common, special), nil
}

// merge returns the settings of both, where they differ those of over.
func merge(base, over []setting) []setting {
	named := map[string]bool{}
	for _, s := range over {
		named[s.symbol] = true
	}
	kept := slices.DeleteFunc(slices.Clone(base), func(s setting) bool { return named[s.symbol] })
	return append(kept, over...)
}

// text is the recipe as the kernel's own tools read it.
func (r recipe) text() string {
	var b strings.Builder
	for _, s := range r.settings {
		if s.value == "n" {
			fmt.Fprintf(&b, "# CONFIG_%s is not set\n", s.symbol)
		} else {
			fmt.Fprintf(&b, "CONFIG_%s=%s\n", s.symbol, s.value)
		}
	}
	return b.String()
}

// check holds the final configuration against what was asked for and what guests cannot do without: a symbol with an unmet dependency, or one
// that this version of Linux does not know, has vanished without a word. It names every one.
func (r recipe) check(final config, arch string) error {
	if missing := missing(final, arch); len(missing) > 0 {
		return hint.With(fmt.Errorf("the configuration lacks what guests need built in: %s: %w", strings.Join(missing, ", "), errdefs.ErrFailedPrecondition),
			"set them to y in the file given with --config, with what they depend on")
	}
	if r.whole {
		return nil // the rest of it is the user's
	}
	var lost []string
	for _, s := range r.settings {
		got, ok := final[s.symbol]
		if s.optional || ok && got == s.value || !ok && (s.value == "n" || s.value == "0") {
			continue
		}
		if !ok {
			got = "n"
		}
		lost = append(lost, fmt.Sprintf("CONFIG_%s is %s instead of %s", s.symbol, got, s.value))
	}
	if len(lost) > 0 {
		return hint.With(fmt.Errorf("the configuration did not come out as asked for: %s: %w", strings.Join(lost, ", "), errdefs.ErrFailedPrecondition),
			"this version of Linux does not have such a symbol, or it depends on another that is not set: \"depends on\" in its Kconfig says which; add that to the file given with --config, or give this one the value that it came out with")
	}
	return nil
}

// missing names the symbols that a guest without modules cannot do without and that are not built in.
func missing(final config, arch string) []string {
	var names []string
	for _, w := range wanted {
		if final[w.symbol] != "y" && !w.optional {
			names = append(names, "CONFIG_"+w.symbol)
		}
	}
	if arch == "amd64" && final["PVH"] != "y" {
		names = append(names, "CONFIG_PVH")
	}
	for _, symbol := range []string{"BLK_DEV_INITRD", "DEVTMPFS", "PROC_FS", "SYSFS", "UNIX", "INET"} {
		if final[symbol] != "y" {
			names = append(names, "CONFIG_"+symbol)
		}
	}
	return names
}
