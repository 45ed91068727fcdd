package cli

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
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
one array. The fields are Name, Digest, BuiltAt and Description.`,
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
	cmd := &cobra.Command{
		Use:   "build [OPTIONS] NAME",
		Short: "Make a base image from the distribution's signed packages",
		Long: `Make a base image from the distribution's own signed packages and print its
digest. It is stored under NAME, so that FROM NAME needs no registry.`,
		Example: `  atoll base build debian:bookworm`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
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
	cmd.Flags().StringVar(&req.Mirror, "mirror", "", "`URL` of the archive (default: the distribution's)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}
