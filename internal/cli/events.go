package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newEventsCmd(e *environment) *cobra.Command {
	var since, format string
	var filters []string
	cmd := &cobra.Command{
		Use:   "events [OPTIONS]",
		Short: "Show what happens, as it happens",
		Long: `Show events until interrupted, one line each. --format json prints one object
per line, with the keys seq, time, type, action, id and attributes.

Filters are type=, action=, machine= and image=; those with one key are
alternatives, and an event must pass each key.`,
		Example: `  atoll events --filter type=machine --filter action=die
  atoll events --since 10m --format '{{.Action}} {{.ID}}'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			for _, f := range filters {
				if k, _, ok := strings.Cut(f, "="); !ok || k == "" {
					return usagef("--filter %q: want KEY=VALUE", f)
				}
			}
			from, err := parseTime("since", since, e.now())
			if err != nil {
				return err
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			stream, err := c.System.Events(cmd.Context(), connect.NewRequest(&atollv1.EventsRequest{Since: from, Filters: filters}))
			if err != nil {
				return err
			}
			err = each(stream, func(ev *atollv1.Event) error {
				v := newEventView(ev)
				if format == "" || format == "table" {
					_, err := fmt.Fprintln(e.Stdout, v)
					return err
				}
				return ui.Each(e.Stdout, format, []eventView{v})
			})
			if err == nil || errors.Is(err, context.Canceled) && cmd.Context().Err() == nil { // a daemon that ends cancels what it answers
				return errDisconnected
			}
			return err
		},
	}
	cmd.Flags().StringVar(&since, "since", "", "also those kept from then on: a time or a duration (10m)")
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "only events with `KEY=VALUE`")
	addFormat(cmd, &format, "table", "json")
	return cmd
}
