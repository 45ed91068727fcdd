package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

const profileForm = `A profile is YAML: the long names of the flags of "atoll run" and their values.
What may be repeated has a list; KEY=VALUE pairs may be a mapping. Files that it
names are read now.

  memory: 2G
  publish: ["8080:80"]
  env:
    MODE: production
  read-only: true`

func newProfileCmd(e *environment) *cobra.Command {
	return newGroup("profile", "Settings under a name, for run and create", `  atoll profile ls`,
		newProfileCreateCmd(e), newProfileLsCmd(e), newProfileInspectCmd(e), newProfileEditCmd(e), newProfileRmCmd(e))
}

func newProfileCreateCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "create NAME [FILE|-]",
		Short: "Keep settings under a name",
		Long: `Keep settings under a name and print it. They are read from FILE, or from
standard input. "atoll run --profile NAME" uses them.

` + profileForm,
		Example: `  atoll profile create web web.yaml
  echo 'memory: 2G' | atoll profile create large
  atoll run -d --profile web --profile large hello`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			file := "-"
			if len(args) == 2 {
				file = args[1]
			}
			source, err := e.readProfile(file)
			if err != nil {
				return err
			}
			spec, err := e.profileSpec(source)
			if err != nil {
				return fmt.Errorf("profile %s: %w: %w", file, err, errdefs.ErrInvalidArgument)
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			req := &atollv1.PutProfileRequest{Name: args[0], Source: source, Spec: spec, Create: true}
			if _, err := c.Profiles.Put(cmd.Context(), connect.NewRequest(req)); err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, args[0])
			return nil
		},
	}
}

func (e *environment) readProfile(file string) ([]byte, error) {
	if file == "-" {
		data, err := io.ReadAll(e.Stdin)
		if err != nil {
			return nil, fmt.Errorf("reading the profile from standard input: %w", err)
		}
		return data, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading the profile: %w", err)
	}
	return data, nil
}

func newProfileLsCmd(e *environment) *cobra.Command {
	var quiet bool
	var format string
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List profiles",
		Long: `List profiles. --format json prints one array. The fields are those of
"atoll profile inspect".`,
		Example: `  atoll profile ls`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Profiles.List(cmd.Context(), connect.NewRequest(&atollv1.ListProfilesRequest{}))
			if err != nil {
				return err
			}
			var rows []profileView
			for _, p := range res.Msg.GetProfiles() {
				row, err := newProfileView(p)
				if err != nil {
					return err
				}
				rows = append(rows, row)
				if quiet {
					fmt.Fprintln(e.Stdout, p.GetName())
				}
			}
			if quiet {
				return nil
			}
			now := e.now()
			return ui.List(e.Stdout, format, []ui.Column[profileView]{
				{Title: "NAME", Cell: func(p profileView) string { return p.Name }},
				{Title: "CREATED", Cell: func(p profileView) string { return ui.Ago(now, p.CreatedAt) }},
				{Title: "UPDATED", Cell: func(p profileView) string { return ui.Ago(now, p.UpdatedAt) }},
			}, rows)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "names only")
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func newProfileInspectCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] PROFILE...",
		Short: "Show profiles",
		Long: `Show profiles as a JSON array, or by a Go template that is applied to each. The
fields are Name, Source (as it was written), Spec (what it sets, as the API has
it), CreatedAt and UpdatedAt.`,
		Example:           `  atoll profile inspect --format '{{.Source}}' web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeProfiles(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inspectEach(cmd.Context(), e, format, args, func(c *client.Client, name string) (profileView, error) {
				res, err := c.Profiles.Get(cmd.Context(), connect.NewRequest(&atollv1.GetProfileRequest{Name: name}))
				if err != nil {
					return profileView{}, err
				}
				return newProfileView(res.Msg.GetProfile())
			})
		},
	}
	addFormat(cmd, &format, "json")
	return cmd
}

func newProfileEditCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "edit PROFILE",
		Short: "Change a profile",
		Long: `Change a profile in the editor that VISUAL or EDITOR names (vi otherwise), or by
standard input where that is no terminal. Machines keep what they got from it.

` + profileForm,
		Example: `  atoll profile edit web
  atoll profile edit web <web.yaml`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeProfiles(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Profiles.Get(cmd.Context(), connect.NewRequest(&atollv1.GetProfileRequest{Name: args[0]}))
			if err != nil {
				return err
			}
			old := res.Msg.GetProfile().GetSource()
			if _, ok := ui.Terminal(e.Stdin); !ok {
				source, err := e.readProfile("-")
				if err != nil {
					return err
				}
				return e.replaceProfile(cmd.Context(), c, args[0], old, source)
			}
			if len(old) == 0 {
				return hint.With(fmt.Errorf("profile %q was made by the API and has no text to edit: %w", args[0], errdefs.ErrFailedPrecondition), "write it anew: atoll profile edit %s <FILE", args[0])
			}
			return e.editProfile(cmd.Context(), c, args[0], old)
		},
	}
}

// editProfile gives the text to the user's editor. What cannot be taken stays in its file.
func (e *environment) editProfile(ctx context.Context, c *client.Client, name string, old []byte) error {
	f, err := os.CreateTemp("", "atoll-profile-*.yaml") // mode 0600
	if err != nil {
		return fmt.Errorf("editing profile %q: %w", name, err)
	}
	_, err = f.Write(old)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("editing profile %q: %w", name, err)
	}
	if err := e.runEditor(ctx, f.Name()); err != nil {
		return errors.Join(fmt.Errorf("editing profile %q: %w", name, err), os.Remove(f.Name()))
	}
	source, err := os.ReadFile(f.Name())
	if err != nil {
		return fmt.Errorf("editing profile %q: %w", name, err)
	}
	if bytes.Equal(source, old) {
		fmt.Fprintln(e.Stderr, "Nothing was changed")
		return os.Remove(f.Name())
	}
	if err := e.replaceProfile(ctx, c, name, old, source); err != nil {
		return hint.With(err, "your text is in %s: mend it there, then atoll profile edit %s <%s", f.Name(), name, f.Name())
	}
	return os.Remove(f.Name())
}

func (e *environment) runEditor(ctx context.Context, file string) error {
	editor := "vi"
	for _, name := range []string{"EDITOR", "VISUAL"} {
		if v, ok := e.LookupEnv(name); ok && v != "" {
			editor = v
		}
	}
	words := append(strings.Fields(editor), file)
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.Stdin, e.Stdout, e.Stderr
	return cmd.Run()
}

func (e *environment) replaceProfile(ctx context.Context, c *client.Client, name string, old, source []byte) error {
	if len(bytes.TrimSpace(source)) == 0 {
		return hint.With(fmt.Errorf("profile %q: its new text is empty: %w", name, errdefs.ErrInvalidArgument), "for a profile that sets nothing, write {}; to remove it: atoll profile rm %s", name)
	}
	spec, err := e.profileSpec(source)
	if err != nil {
		return fmt.Errorf("profile %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	_, err = c.Profiles.Put(ctx, connect.NewRequest(&atollv1.PutProfileRequest{Name: name, Source: source, Spec: spec, Replaces: old}))
	return err
}

func newProfileRmCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:               "rm PROFILE...",
		Aliases:           []string{"remove"},
		Short:             "Remove profiles",
		Long:              `Remove profiles and print their names. Machines keep what they got from them.`,
		Example:           `  atoll profile rm web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeProfiles(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				_, err := c.Profiles.Remove(ctx, connect.NewRequest(&atollv1.RemoveProfileRequest{Name: name}))
				return name, err
			})
		},
	}
}
