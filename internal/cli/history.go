package cli

import (
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

// historyView is one step of an image's making in history.
type historyView struct {
	ID        string    `json:"id"` // of the image, at the last step
	Layer     string    `json:"layer"`
	CreatedAt time.Time `json:"createdAt"`
	CreatedBy string    `json:"createdBy"`
	SizeBytes int64     `json:"sizeBytes"`
	Comment   string    `json:"comment"`
	Tags      []string  `json:"tags"`
}

func newHistoryCmd(e *environment) *cobra.Command {
	var quiet, noTrunc bool
	var format string
	cmd := &cobra.Command{
		Use:   "history [OPTIONS] IMAGE",
		Short: "Show how an image was made",
		Long: `Show the steps of an image's making, the last one first. SIZE is that of the
compressed layer.

--format json prints one array; templates and JSON have whole texts. The fields
are ID, Layer, CreatedAt, CreatedBy, SizeBytes, Comment and Tags.`,
		Example:           `  atoll history --no-trunc hello`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Images.History(cmd.Context(), connect.NewRequest(&atollv1.ImageHistoryRequest{Reference: args[0]}))
			if err != nil {
				return err
			}
			var rows []historyView
			for _, s := range res.Msg.GetSteps() {
				rows = append(rows, historyView{s.GetId(), s.GetLayer(), clock(s.GetCreatedAt()), s.GetCreatedBy(), s.GetSizeBytes(), s.GetComment(), list(s.GetReferences())})
			}
			id, text := ui.Short, func(s string) string { return ui.Ellipsis(s, 45) }
			if noTrunc {
				id, text = whole, whole
			}
			image := func(h historyView) string {
				if h.ID == "" {
					return "<missing>"
				}
				return id(h.ID)
			}
			if quiet {
				for _, r := range rows {
					fmt.Fprintln(e.Stdout, image(r))
				}
				return nil
			}
			now := e.now()
			return ui.List(e.Stdout, format, []ui.Column[historyView]{
				{Title: "IMAGE", Cell: image},
				{Title: "CREATED", Cell: func(h historyView) string {
					if h.CreatedAt.IsZero() {
						return "N/A"
					}
					return ui.Ago(now, h.CreatedAt)
				}},
				{Title: "CREATED BY", Cell: func(h historyView) string { return text(oneLine(h.CreatedBy)) }},
				{Title: "SIZE", Cell: func(h historyView) string { return ui.Size(h.SizeBytes) }},
				{Title: "COMMENT", Cell: func(h historyView) string { return text(oneLine(h.Comment)) }},
			}, rows)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "whole IDs and commands")
	addFormat(cmd, &format, "table", "json")
	return cmd
}

// oneLine is a stranger's text for a table.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
