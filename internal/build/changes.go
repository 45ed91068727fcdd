//go:build linux

package build

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
)

// Changes makes an image's configuration of Dockerfile instructions, as docker import --change takes them: those that change nothing
// but configuration.
func Changes(lines []string) (dockerspec.DockerOCIImageConfig, error) {
	var c dockerspec.DockerOCIImageConfig
	for _, line := range lines {
		if err := change(&c, line); err != nil {
			return c, hint.With(fmt.Errorf("change %q: %w: %w", line, err, errdefs.ErrInvalidArgument),
				"write a Dockerfile instruction: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME or WORKDIR")
		}
	}
	return c, nil
}

func change(c *dockerspec.DockerOCIImageConfig, line string) error {
	parsed, err := parser.Parse(strings.NewReader(line))
	if err != nil {
		return err
	}
	for _, node := range parsed.AST.Children {
		instruction, err := instructions.ParseInstruction(node)
		if err != nil {
			return err
		}
		if e, ok := instruction.(instructions.SupportsSingleWordExpansion); ok {
			words := shell.NewLex(parsed.EscapeToken)
			err := e.Expand(func(word string) (string, error) {
				value, _, err := words.ProcessWord(word, shell.EnvsFromSlice(c.Env))
				return value, err
			})
			if err != nil {
				return err
			}
		}
		if err := apply(c, instruction); err != nil {
			return err
		}
	}
	return nil
}

func apply(c *dockerspec.DockerOCIImageConfig, instruction any) error {
	set := func(m *map[string]struct{}, keys []string) {
		if *m == nil {
			*m = map[string]struct{}{}
		}
		for _, k := range keys {
			(*m)[k] = struct{}{}
		}
	}
	switch i := instruction.(type) {
	case *instructions.CmdCommand:
		c.Cmd = shellForm(i.ShellDependantCmdLine)
	case *instructions.EntrypointCommand:
		c.Entrypoint = shellForm(i.ShellDependantCmdLine)
	case *instructions.EnvCommand:
		for _, kv := range i.Env {
			c.Env = append(c.Env, kv.Key+"="+kv.Value)
		}
	case *instructions.LabelCommand:
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		for _, kv := range i.Labels {
			c.Labels[kv.Key] = kv.Value
		}
	case *instructions.ExposeCommand:
		for n, p := range i.Ports {
			if !strings.Contains(p, "/") {
				i.Ports[n] = p + "/tcp"
			}
		}
		set(&c.ExposedPorts, i.Ports)
	case *instructions.VolumeCommand:
		set(&c.Volumes, i.Volumes)
	case *instructions.HealthCheckCommand:
		c.Healthcheck = i.Health
	case *instructions.OnbuildCommand:
		c.OnBuild = append(c.OnBuild, i.Expression)
	case *instructions.StopSignalCommand:
		c.StopSignal = i.Signal
	case *instructions.UserCommand:
		c.User = i.User
	case *instructions.WorkdirCommand:
		c.WorkingDir = i.Path
	default:
		return errors.New("it does more than change the configuration")
	}
	return nil
}

func shellForm(l instructions.ShellDependantCmdLine) []string {
	if l.PrependShell {
		return append([]string{"/bin/sh", "-c"}, strings.Join(l.CmdLine, " "))
	}
	return l.CmdLine
}
