package cli

import (
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

func newDoctorCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "doctor [OPTIONS]",
		Short: "Check what this host has and lacks",
		Long: `Check whether this host has what Atoll needs, and name the command that mends
what it lacks. The exit code is 1 when a check fails; a warning is no failure.
--format json prints one array, with the keys name, level, message and hint.`,
		Example: `  atoll doctor`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			var checks []checkView
			failed := false
			c, err := e.connect(cmd.Context())
			if err == nil {
				var res *connect.Response[atollv1.DoctorResponse]
				if res, err = c.System.Doctor(cmd.Context(), connect.NewRequest(&atollv1.DoctorRequest{})); err == nil {
					for _, k := range res.Msg.GetChecks() {
						level := strings.ToLower(strings.TrimPrefix(k.GetLevel().String(), "LEVEL_"))
						failed = failed || level == "fail"
						checks = append(checks, checkView{k.GetName(), level, k.GetMessage(), k.GetHint()})
					}
				}
			}
			if cmd.Context().Err() != nil {
				return err
			}
			if err != nil {
				failed = true
				checks = []checkView{{"daemon", "fail", err.Error(), hint.Of(err)}}
			}
			if err := e.printChecks(format, checks); err != nil {
				return err
			}
			if failed {
				return &exitError{code: 1}
			}
			return nil
		},
	}
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func (e *environment) printChecks(format string, checks []checkView) error {
	if format != "" && format != "table" {
		return ui.List(e.Stdout, format, nil, checks)
	}
	marks := map[string]string{"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
	if _, ok := ui.Terminal(e.Stdout); ok {
		marks = map[string]string{"ok": "✓", "warn": "!", "fail": "✗"}
		if cfg, err := e.config(); err == nil && !cfg.NoColor {
			marks = map[string]string{"ok": "\x1b[32m✓\x1b[0m", "warn": "\x1b[33m!\x1b[0m", "fail": "\x1b[31m✗\x1b[0m"}
		}
	}
	width := 0
	for _, k := range checks {
		width = max(width, len(k.Name))
	}
	for _, k := range checks {
		fmt.Fprintf(e.Stdout, "%s  %-*s  %s\n", marks[k.Level], width, k.Name, k.Message)
		if k.Hint != "" {
			fmt.Fprintf(e.Stdout, "      Hint: %s\n", k.Hint)
		}
	}
	return nil
}
