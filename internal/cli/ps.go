package cli

import (
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newPsCmd(e *environment) *cobra.Command {
	var all, quiet, noTrunc bool
	var format string
	var filters []string
	cmd := &cobra.Command{
		Use:     "ps [OPTIONS]",
		Aliases: []string{"ls"},
		Short:   "List machines",
		Long: `List running machines, the newest first; with --all also those that do not run.

--format json prints one array; templates and JSON have whole IDs. The fields
are ID, Name, Image, ImageDigest, Command, State, Status, Reason, ExitCode,
Error, FailedStep, CreatedAt, StartedAt, FinishedAt, Address, Ports, Labels and
Health.

The filters are ancestor=IMAGE, before=MACHINE, since=MACHINE, exited=CODE,
expose=PORT, publish=PORT, health=starting|healthy|unhealthy|none, id=PREFIX,
label=KEY[=VALUE], name=PATTERN, network=NAME and status=STATE; the latter and
exited also show machines that do not run. Those with one key are alternatives,
but for label; a machine must pass each key.`,
		Example: `  atoll ps -a
  atoll ps --filter label=team=web --filter health=unhealthy
  atoll ps --format '{{.Name}} {{.Ports}}'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Machines.List(cmd.Context(), connect.NewRequest(&atollv1.ListMachinesRequest{All: all, Filters: filters}))
			if err != nil {
				return err
			}
			now := e.now()
			var rows []machineView
			for _, m := range res.Msg.GetMachines() {
				rows = append(rows, newMachineView(m, now))
			}
			slices.SortStableFunc(rows, func(a, b machineView) int { return b.CreatedAt.Compare(a.CreatedAt) })

			id, command := ui.Short, func(w words) string { return ui.Ellipsis(w.String(), 20) }
			if noTrunc {
				id, command = whole, words.String
			}
			if quiet {
				for _, r := range rows {
					fmt.Fprintln(e.Stdout, id(r.ID))
				}
				return nil
			}
			return ui.List(e.Stdout, format, []ui.Column[machineView]{
				{Title: "MACHINE ID", Cell: func(m machineView) string { return id(m.ID) }},
				{Title: "IMAGE", Cell: func(m machineView) string { return m.Image }},
				{Title: "COMMAND", Cell: func(m machineView) string { return `"` + command(m.Command) + `"` }},
				{Title: "CREATED", Cell: func(m machineView) string { return ui.Ago(now, m.CreatedAt) }},
				{Title: "STATUS", Cell: func(m machineView) string { return m.Status }},
				{Title: "PORTS", Cell: func(m machineView) string { return m.Ports.String() }},
				{Title: "NAMES", Cell: func(m machineView) string { return m.Name }},
			}, rows)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also machines that do not run")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	cmd.Flags().StringArrayVarP(&filters, "filter", "f", nil, "only machines that meet it: `KEY=VALUE`; may be given more than once")
	complete(cmd, "filter", "ancestor=", "before=", "exited=", "expose=", "health=healthy", "health=none", "health=starting", "health=unhealthy", "id=", "label=",
		"name=", "network=", "publish=", "since=", "status=created", "status=failed", "status=running", "status=stopped")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "whole IDs and commands")
	addFormat(cmd, &format, "table", "json")
	return cmd
}

// addFormat adds the flag --format, whose first value is the default.
func addFormat(cmd *cobra.Command, format *string, values ...string) {
	usage := values[0]
	for _, v := range values[1:] {
		usage += ", " + v
	}
	cmd.Flags().StringVar(format, "format", "", usage+", or a Go template such as '{{.Name}}'")
	complete(cmd, "format", values...)
}

func whole(id string) string { return id }
