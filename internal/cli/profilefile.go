package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// isOwn says whether a flag of run is about one machine or one command, and so neither in a profile nor in the environment.
func isOwn(flag string) bool {
	return slices.Contains([]string{"name", "help", "detach", "interactive", "tty", "rm", "pull", "platform", "disk", "firmware", "host"}, flag)
}

// profileSpec reads a profile: the long names of run's flags and their values. A flag that may be repeated has a list or, where its
// values are KEY=VALUE, a mapping. Every fault is told, with its line.
func (e *environment) profileSpec(source []byte) (*atollv1.MachineSpec, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(source, &doc); err != nil {
		return nil, fmt.Errorf("reading the profile: %w", err)
	}
	cmd := &cobra.Command{}
	flags := addSpecFlags(cmd)
	if len(doc.Content) > 0 { // else it is empty
		root := doc.Content[0]
		if root.Kind != yaml.MappingNode {
			return nil, fmt.Errorf("line %d: a profile is a mapping of settings, such as memory: 1G", root.Line)
		}
		var faults []error
		seen := map[string]bool{}
		for i := 0; i+1 < len(root.Content); i += 2 {
			key, value := root.Content[i], root.Content[i+1]
			if seen[key.Value] {
				faults = append(faults, fmt.Errorf("line %d: %s is there twice", key.Line, key.Value))
			}
			seen[key.Value] = true
			faults = append(faults, setFromProfile(cmd.Flags(), key, value))
		}
		if err := errors.Join(faults...); err != nil {
			return nil, err
		}
	}
	spec, err := flags.machine(e, cmd, []string{""})
	if err != nil {
		return nil, err
	}
	spec.Command = nil
	return spec, nil
}

func setFromProfile(flags *pflag.FlagSet, key, value *yaml.Node) error {
	f := flags.Lookup(key.Value)
	switch {
	case f != nil && isOwn(f.Name) || key.Value == "profile" || key.Value == "image":
		return fmt.Errorf("line %d: %s is a machine's own and cannot be in a profile", key.Line, key.Value)
	case f == nil:
		return fmt.Errorf("line %d: unknown setting %q: a profile has the long names of the flags of atoll run", key.Line, key.Value)
	}
	words, err := valuesOf(value)
	if err != nil {
		return fmt.Errorf("line %d: %s: %w", value.Line, key.Value, err)
	}
	_, many := f.Value.(pflag.SliceValue)
	if many = many || strings.HasSuffix(f.Value.Type(), "Array"); !many && (value.Kind != yaml.ScalarNode || len(words) != 1) {
		return fmt.Errorf("line %d: %s takes one value", value.Line, key.Value)
	}
	var faults []error
	for _, w := range words {
		if err := flags.Set(f.Name, w); err != nil {
			faults = append(faults, fmt.Errorf("line %d: %w", value.Line, err))
		}
	}
	return errors.Join(faults...)
}

// valuesOf gives a scalar as it is written, a list's scalars, or a mapping's as KEY=VALUE.
func valuesOf(n *yaml.Node) ([]string, error) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch n.Kind {
	case yaml.ScalarNode:
		if n.Tag == "!!null" {
			return nil, errors.New("no value")
		}
		return []string{n.Value}, nil
	case yaml.SequenceNode, yaml.MappingNode:
	default:
		return nil, errors.New("want a value, a list or a mapping")
	}
	var words []string
	for i := 0; i < len(n.Content); i++ {
		word := ""
		if n.Kind == yaml.MappingNode {
			word = n.Content[i].Value + "="
			i++
		}
		c := n.Content[i]
		if c.Kind != yaml.ScalarNode || c.Tag == "!!null" {
			return nil, fmt.Errorf("line %d: want a single value here", c.Line)
		}
		words = append(words, word+c.Value)
	}
	return words, nil
}

// setFromEnvironment gives the flags of run that were not given the values that ATOLL_RUN_* have, such as ATOLL_RUN_MEMORY=1G.
func (e *environment) setFromEnvironment(cmd *cobra.Command) error {
	var faults []error
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Changed || isOwn(f.Name) {
			return
		}
		name := "ATOLL_RUN_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if value, ok := e.LookupEnv(name); ok && value != "" {
			if err := cmd.Flags().Set(f.Name, value); err != nil {
				faults = append(faults, usagef("%s: %v", name, err))
			}
		}
	})
	return errors.Join(faults...)
}
