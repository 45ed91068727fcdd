package cli

import (
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newBuilderCmd(e *environment) *cobra.Command {
	return newGroup("builder", "The build cache", `  atoll builder du`, newBuilderDuCmd(e), newBuilderPruneCmd(e))
}

// cacheView is a piece of the build cache in builder du.
type cacheView struct {
	ID          string    `json:"id"`
	Type        string    `json:"type"`
	SizeBytes   int64     `json:"sizeBytes"`
	CreatedAt   time.Time `json:"createdAt"`
	LastUsedAt  time.Time `json:"lastUsedAt"` // year 1: never
	InUse       bool      `json:"inUse"`
	Shared      bool      `json:"shared"`
	Description string    `json:"description"`
}

func cacheViews(records []*atollv1.BuildCacheRecord) []cacheView {
	views := []cacheView{}
	for _, r := range records {
		v := cacheView{
			ID: r.GetId(), Type: r.GetType(), SizeBytes: r.GetSizeBytes(), CreatedAt: r.GetCreatedAt().AsTime(), InUse: r.GetInUse(), Shared: r.GetShared(),
			Description: r.GetDescription(),
		}
		if r.LastUsedAt != nil {
			v.LastUsedAt = r.GetLastUsedAt().AsTime()
		}
		views = append(views, v)
	}
	return views
}

func newBuilderDuCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "du [OPTIONS]",
		Short: "Show what the build cache holds",
		Long: `Show what the build cache holds, the largest first, and the sum.

The fields of --format are ID, Type, SizeBytes, CreatedAt, LastUsedAt, InUse,
Shared and Description.`,
		Example: `  atoll builder du --format '{{.SizeBytes}} {{.Description}}'`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Build.DiskUsage(cmd.Context(), connect.NewRequest(&atollv1.BuildDiskUsageRequest{}))
			if err != nil {
				return err
			}
			now, views, sum := e.now(), cacheViews(res.Msg.GetRecords()), int64(0)
			for _, v := range views {
				sum += v.SizeBytes
			}
			if err := ui.List(e.Stdout, format, []ui.Column[cacheView]{
				{Title: "ID", Cell: func(v cacheView) string { return ui.Short(v.ID) }},
				{Title: "TYPE", Cell: func(v cacheView) string { return v.Type }},
				{Title: "SIZE", Cell: func(v cacheView) string { return ui.Size(v.SizeBytes) }},
				{Title: "LAST USED", Cell: func(v cacheView) string { return lastUsed(now, v) }},
				{Title: "DESCRIPTION", Cell: func(v cacheView) string { return ui.Ellipsis(topLine(v.Description), 60) }},
			}, views); err != nil {
				return err
			}
			if format == "" || format == "table" {
				fmt.Fprintf(e.Stdout, "Total: %s\n", ui.Size(sum))
			}
			return nil
		},
	}
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func lastUsed(now time.Time, v cacheView) string {
	if v.InUse {
		return "in use"
	}
	if v.LastUsedAt.IsZero() {
		return "never"
	}
	return ui.Ago(now, v.LastUsedAt)
}

func topLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func newBuilderPruneCmd(e *environment) *cobra.Command {
	req := &atollv1.PruneBuildRequest{}
	var force bool
	var filters []string
	var keep bytesValue
	cmd := &cobra.Command{
		Use:   "prune [OPTIONS]",
		Short: "Remove the build cache",
		Long: `Remove what of the build cache no running build uses: layers, contexts and cache
mounts. With --all the builder's own records go too. Images stay as they are.`,
		Example: `  atoll builder prune -f
  atoll builder prune -a --filter until=48h --keep-storage 2G`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			unused, err := until(filters)
			if err != nil {
				return err
			}
			req.UnusedFor, req.KeepBytes = unused, int64(keep)
			if !force && !e.confirm("This will remove the build cache.") {
				return nil
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Build.Prune(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, "Total reclaimed space:", ui.Size(res.Msg.GetReclaimedBytes()))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&req.All, "all", "a", false, "the builder's own records, too")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "only some: `until=DURATION`, what was not used for so long")
	cmd.Flags().Var(&keep, "keep-storage", "leave so much, as 2G")
	return cmd
}

// until reads the filters; the last counts.
func until(filters []string) (unused *durationpb.Duration, err error) {
	for _, f := range filters {
		value, ok := strings.CutPrefix(f, "until=")
		d, err := time.ParseDuration(value)
		if !ok || err != nil || d < 0 {
			return nil, usagef("--filter %q: want until=DURATION, as until=48h", f)
		}
		unused = durationpb.New(d)
	}
	return unused, nil
}
