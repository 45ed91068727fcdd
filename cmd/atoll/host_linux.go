package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/daemon"
	"github.com/atollvm/atoll/internal/network/user"
	"github.com/spf13/cobra"
)

// hostCommands are the daemon and, hidden, the processes that it starts.
func hostCommands(exe string) []*cobra.Command {
	return []*cobra.Command{newDaemonCmd(exe), newHelperCmd(daemon.BuildChild, child.Run), newHelperCmd(daemon.NetworkHelper, user.RunHelper)}
}

func newDaemonCmd(exe string) *cobra.Command {
	var debug bool
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run the daemon in the foreground",
		Long: `Run the daemon of this ATOLL_HOME in the foreground, logging to stderr. Other commands start it by themselves when none runs.
SIGTERM and SIGINT end it; machines run on and are taken back by the next one.`,
		Example: "  ATOLL_HOME=/srv/atoll atoll daemon --debug",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(os.LookupEnv, os.Getuid(), config.Flags{})
			if err != nil {
				return err
			}
			settings, err := config.LoadSettings(c.Home)
			if err != nil {
				return err
			}
			settings.Proxy = settings.Proxy.OrEnvironment(os.LookupEnv)
			level := slog.LevelInfo
			if debug {
				level = slog.LevelDebug
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return daemon.Run(ctx, daemon.Config{
				Home: c.Home, Socket: c.Socket(), Exe: exe, DockerConfigDir: c.DockerConfig, Settings: settings,
				Version: version, Commit: commit,
				Log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level})),
			})
		},
	}
	cmd.Flags().BoolVar(&debug, "debug", false, "log what is only of use for finding faults")
	return cmd
}

// newHelperCmd is a process that only the daemon starts; its arguments are its own.
func newHelperCmd(name string, run func(ctx context.Context, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use: name, Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error { return run(cmd.Context(), args) },
	}
}
