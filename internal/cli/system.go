package cli

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newSystemCmd(e *environment) *cobra.Command {
	return newGroup("system", "The whole of it", `  atoll system prune`, newSystemPruneCmd(e))
}

func newSystemPruneCmd(e *environment) *cobra.Command {
	var force bool
	req := &atollv1.PruneSystemRequest{}
	cmd := &cobra.Command{
		Use:   "prune [OPTIONS]",
		Short: "Remove what nothing uses",
		Long: `Remove images without a name that no machine uses, and what of the build cache
no running build uses; with --all also images with names that no machine uses,
and the builder's own records.`,
		Example: `  atoll system prune -f`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			what := "all images without a name that no machine uses, and the build cache"
			if req.GetAll() {
				what = "all images that no machine uses, and the build cache"
			}
			if !force && !e.confirm("This will remove "+what+".") {
				return nil
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.System.Prune(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			e.printPruned(res.Msg.GetImages(), "untagged:", "deleted:")
			fmt.Fprintln(e.Stdout, "Total reclaimed space:", ui.Size(res.Msg.GetImages().GetReclaimedBytes()+res.Msg.GetBuildCacheBytes()))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&req.All, "all", "a", false, "also images with names")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	return cmd
}
