package cli

import (
	"context"
	"fmt"
	"io"
	"os"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newBaseCmd(e *environment) *cobra.Command {
	return newGroup("base", "Base images made from distributions' packages", `  atoll base build debian:bookworm`, newBaseLsCmd(e), newBaseBuildCmd(e))
}

func newBaseLsCmd(e *environment) *cobra.Command {
	var quiet bool
	var format string
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List the base images that can be built",
		Long: `List the base images that can be built, and those that are. --format json prints
one array. The fields are Name, Digest, BuiltAt, Description, SizeBytes and
Aliases.`,
		Example: `  atoll base ls`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Bases.List(cmd.Context(), connect.NewRequest(&atollv1.ListBasesRequest{}))
			if err != nil {
				return err
			}
			var rows []baseView
			for _, b := range res.Msg.GetBases() {
				rows = append(rows, newBaseView(b))
				if quiet {
					fmt.Fprintln(e.Stdout, b.GetName())
				}
			}
			if quiet {
				return nil
			}
			now := e.now()
			return ui.List(e.Stdout, format, []ui.Column[baseView]{
				{Title: "NAME", Cell: func(b baseView) string { return b.Name }},
				{Title: "IMAGE ID", Cell: func(b baseView) string { return ui.Short(b.Digest) }},
				{Title: "BUILT", Cell: func(b baseView) string {
					if b.BuiltAt == nil {
						return "not yet"
					}
					return ui.Ago(now, *b.BuiltAt)
				}},
				{Title: "SIZE", Cell: func(b baseView) string {
					if b.SizeBytes == 0 {
						return ""
					}
					return ui.Size(b.SizeBytes)
				}},
				{Title: "DESCRIPTION", Cell: func(b baseView) string { return b.Description }},
			}, rows)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "names only")
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func newBaseBuildCmd(e *environment) *cobra.Command {
	req := &atollv1.BuildBaseRequest{}
	var quiet bool
	var keyring string
	cmd := &cobra.Command{
		Use:   "build [OPTIONS] NAME",
		Short: "Make a base image from the distribution's signed packages",
		Long: `Make a base image from the distribution's own signed packages and print its
digest. It is stored under NAME, so that FROM NAME needs no registry. The same
packages give the same digest.

A NAME that ends in -systemd or -openrc boots that init as PID 1; root has no
password, so use "atoll exec" to get in. Red Hat's UBI is an image of Red Hat's
registry and takes --mirror only: another registry and repository.

Tested with the distributions' own archives: Debian and Ubuntu. Alpine was
tested with a small archive made for that; UBI and --snapshot never were.`,
		Example: `  atoll base build debian:bookworm
  atoll base build debian:trixie-systemd --package openssh-server -t sshd
  atoll base build debian:bookworm --snapshot 2026-01-15`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeBases(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if keyring != "" {
				data, err := readSmall(keyring)
				if err != nil {
					return fmt.Errorf("reading --keyring: %w", err)
				}
				req.Keyring = data
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			req.Name = args[0]
			stream, err := c.Bases.Build(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			show := e.progress(quiet)
			defer show.Close()
			var base *atollv1.Base
			err = each(stream, func(r *atollv1.BuildBaseResponse) error {
				switch k := r.GetKind().(type) {
				case *atollv1.BuildBaseResponse_Line:
					show.Line(k.Line)
				case *atollv1.BuildBaseResponse_Transfer:
					showTransfer(show, k.Transfer)
				case *atollv1.BuildBaseResponse_Base:
					base = k.Base
				}
				return nil
			})
			if err != nil {
				return err
			}
			if base == nil {
				return errDisconnected
			}
			show.Close()
			fmt.Fprintln(e.Stdout, base.GetDigest())
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Mirror, "mirror", "", "`URL` of the archive (default: the distribution's)")
	f.StringVar(&keyring, "keyring", "", "`FILE` of the keys that sign the archive (default: the distribution's):\nOpenPGP, or PEM for Alpine")
	f.StringArrayVar(&req.Packages, "package", nil, "add a package; may be repeated")
	f.StringVar(&req.Snapshot, "snapshot", "", "the archive as it was on that `DATE`, such as 2026-01-15 or\n20260115T120000Z (Debian, Ubuntu)")
	f.StringVarP(&req.Tag, "tag", "t", "", "store it under this name (default: NAME)")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

// readSmall reads a file that must not be large.
func readSmall(path string) ([]byte, error) {
	const most = 1 << 20
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(data) > most {
		err = fmt.Errorf("%s is larger than 1 MiB: %w", path, errdefs.ErrInvalidArgument)
	}
	if err == nil && len(data) == 0 {
		err = fmt.Errorf("%s is empty: %w", path, errdefs.ErrInvalidArgument)
	}
	return data, err
}

// completeBases offers the bases, also by their other names.
func (e *environment) completeBases(n int) completer {
	return e.completeFrom(n, func(ctx context.Context, c *client.Client) (names []string) {
		res, err := c.Bases.List(ctx, connect.NewRequest(&atollv1.ListBasesRequest{}))
		if err != nil {
			return nil
		}
		for _, b := range res.Msg.GetBases() {
			names = append(append(names, b.GetName()), b.GetAliases()...)
		}
		return names
	})
}
