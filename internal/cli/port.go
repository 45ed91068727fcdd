package cli

import (
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func newPortCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "port MACHINE [GUEST_PORT[/PROTOCOL]]",
		Short: "Show where a machine's ports are published",
		Example: `  atoll port web
  atoll port web 80/tcp`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: e.completeMachines(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Machines.Get(cmd.Context(), connect.NewRequest(&atollv1.GetMachineRequest{Machine: args[0]}))
			if err != nil {
				return err
			}
			bound := newMachineView(res.Msg.GetMachine(), e.now()).Ports
			if len(args) == 1 {
				for _, p := range bound {
					fmt.Fprintf(e.Stdout, "%d/%s -> %s\n", p.GuestPort, p.Protocol, p.host())
				}
				return nil
			}
			want := args[1]
			if !strings.Contains(want, "/") {
				want += "/tcp"
			}
			found := false
			for _, p := range bound {
				if fmt.Sprintf("%d/%s", p.GuestPort, p.Protocol) == want {
					found = true
					fmt.Fprintln(e.Stdout, p.host())
				}
			}
			if !found {
				return fmt.Errorf("machine %q: port %s is not published: %w", args[0], want, errdefs.ErrNotFound)
			}
			return nil
		},
	}
}
