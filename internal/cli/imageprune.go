package cli

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newImagePruneCmd(e *environment) *cobra.Command {
	var force bool
	req := &atollv1.PruneImagesRequest{}
	cmd := &cobra.Command{
		Use:   "prune [OPTIONS]",
		Short: "Remove images that nobody uses",
		Long: `Remove images without a name that no machine uses, and what interrupted
transfers have left; with --all also images with names that no machine uses.

The filters are until=TIME (images made before it; also a duration, as 24h),
label=KEY[=VALUE] and label!=KEY[=VALUE].`,
		Example: `  atoll image prune -a -f --filter until=240h`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			what := "all images without a name that no machine uses"
			if req.GetAll() {
				what = "all images that no machine uses"
			}
			if !force && !req.GetDryRun() && !e.confirm("This will remove "+what+".") {
				return nil
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Images.Prune(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			m := res.Msg
			untagged, deleted, total := "untagged:", "deleted:", "Total reclaimed space:"
			if req.GetDryRun() {
				untagged, deleted, total = "would untag:", "would delete:", "Total reclaimable space:"
			}
			e.printPruned(m, untagged, deleted)
			fmt.Fprintln(e.Stdout, total, ui.Size(m.GetReclaimedBytes()))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&req.All, "all", "a", false, "also images with names")
	cmd.Flags().StringArrayVar(&req.Filters, "filter", nil, "only images that meet it: `KEY=VALUE`; may be given more than once")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what would be removed")
	return cmd
}

func (e *environment) printPruned(m *atollv1.PruneImagesResponse, untagged, deleted string) {
	for _, r := range m.GetUntagged() {
		fmt.Fprintln(e.Stdout, untagged, r)
	}
	for _, d := range m.GetDeleted() {
		fmt.Fprintln(e.Stdout, deleted, d)
	}
	if m.GetLater() {
		ui.Warnings(e.Stderr, []string{"a build or a transfer is under way: the space is reclaimed when it ends"})
	}
}
