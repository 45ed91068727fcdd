package cli

import (
	"context"
	"errors"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newInspectCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] MACHINE...",
		Short: "Show all there is to know about machines",
		Long: `Show machines as a JSON array, or by a Go template that is applied to each.
Beside the fields of "atoll ps" there are Host, Spec, Network, VMM, ExposedPorts
and Volumes of the image, HealthStatus with the last five results of the health
check, and Steps, which tells how long each step of the last start took.`,
		Example: `  atoll inspect web
  atoll inspect --format '{{.State}} {{.ExitCode}} {{.Network.Address}}' web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inspectEach(cmd.Context(), e, format, args, func(c *client.Client, name string) (machineDetail, error) {
				res, err := c.Machines.Get(cmd.Context(), connect.NewRequest(&atollv1.GetMachineRequest{Machine: name}))
				if err != nil {
					return machineDetail{}, err
				}
				return newMachineDetail(res.Msg.GetMachine(), e.now()), nil
			})
		},
	}
	addFormat(cmd, &format, "json")
	return cmd
}

// inspectEach shows what get returns for each of the names. One that fails stops no other.
func inspectEach[V any](ctx context.Context, e *environment, format string, names []string, get func(*client.Client, string) (V, error)) error {
	if err := ui.CheckFormat(format); err != nil {
		return usageError{err}
	}
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	var rows []V
	var failures []error
	for _, name := range names {
		row, err := get(c, name)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		rows = append(rows, row)
	}
	return errors.Join(append([]error{ui.Inspect(e.Stdout, format, rows)}, failures...)...)
}
