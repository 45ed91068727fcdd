package cli

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

// each calls do for all names at once and prints what it returns in the order of the names. One failure stops no other.
func (e *environment) each(ctx context.Context, names []string, do func(context.Context, *client.Client, string) (string, error)) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	type answer struct {
		line string
		err  error
		done chan struct{}
	}
	answers := make([]answer, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		a := &answers[i]
		a.done = make(chan struct{})
		wg.Go(func() {
			defer close(a.done)
			a.line, a.err = do(ctx, c, name)
		})
	}
	defer wg.Wait()
	var failures []error
	for i := range answers {
		a := &answers[i]
		<-a.done
		if a.err != nil {
			failures = append(failures, a.err)
			continue
		}
		fmt.Fprintln(e.Stdout, a.line)
	}
	return errors.Join(failures...)
}

func newStartCmd(e *environment) *cobra.Command {
	var again bool
	var flags *provisionFlags
	cmd := &cobra.Command{
		Use:   "start [OPTIONS] MACHINE...",
		Short: "Start machines",
		Long: `Start machines that were created or have stopped. Their disks are as they left
them.

What a machine was given to be set up with (--user-data, --add-user and the
like) is done at its first boot, and only there. --reprovision does it again, on
the disk as it is. With options of that kind it does what they say, from then on
in place of all that was asked for before.`,
		Example: `  atoll start web db
  atoll start --reprovision web
  atoll start --reprovision --user-data setup.sh --timezone Europe/Berlin web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			request, err := flags.provisioning(e, cmd)
			if err != nil {
				return err
			}
			if request != nil && !again {
				return usageError{hint.With(errors.New("options for the first boot of a machine, which was set up before"), "add --reprovision to set it up again")}
			}
			var mu sync.Mutex
			var warnings []string
			err = e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				stop := e.watchProvisioning(ctx, c, name, len(args) > 1)
				defer stop()
				res, err := c.Machines.Start(ctx, connect.NewRequest(&atollv1.StartMachineRequest{Machine: name, Reprovision: again, Provisioning: request}))
				if err != nil {
					return "", err
				}
				mu.Lock()
				defer mu.Unlock()
				warnings = append(warnings, res.Msg.GetWarnings()...)
				if again {
					fmt.Fprintf(e.Stderr, "%s: provisioned again\n", name)
				}
				return name, nil
			})
			ui.Warnings(e.Stderr, warnings)
			return err
		},
	}
	cmd.Flags().BoolVar(&again, "reprovision", false, "set the guest up again, as at its first boot")
	flags = addProvisionFlags(cmd)
	return cmd
}

func newStopCmd(e *environment) *cobra.Command {
	var timeout seconds
	cmd := &cobra.Command{
		Use:   "stop [OPTIONS] MACHINE...",
		Short: "Stop machines",
		Long: `Send the stop signal to the entrypoint (the image's STOPSIGNAL, else TERM), and
end the machine when it has not stopped by itself in time. A machine that does
not run is left as it is.`,
		Example:           `  atoll stop -t 30 web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				return name, stopMachine(ctx, c, name, timeout)
			})
		},
	}
	addStopTimeout(cmd, &timeout)
	return cmd
}

func newRestartCmd(e *environment) *cobra.Command {
	var timeout seconds
	cmd := &cobra.Command{
		Use:               "restart [OPTIONS] MACHINE...",
		Short:             "Stop and start machines",
		Example:           `  atoll restart web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				if err := stopMachine(ctx, c, name, timeout); err != nil {
					return "", err
				}
				_, err := startMachine(ctx, c, name)
				return name, err
			})
		},
	}
	addStopTimeout(cmd, &timeout)
	return cmd
}

func newKillCmd(e *environment) *cobra.Command {
	var signal string
	cmd := &cobra.Command{
		Use:               "kill [OPTIONS] MACHINE...",
		Short:             "Send a signal to the entrypoint of machines",
		Long:              `Send a signal to the entrypoint of running machines. KILL, the default, ends the whole machine at once.`,
		Example:           `  atoll kill -s HUP web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				_, err := c.Machines.Kill(ctx, connect.NewRequest(&atollv1.KillMachineRequest{Machine: name, Signal: signal}))
				return name, err
			})
		},
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "KILL", "signal by name or number")
	complete(cmd, "signal", "KILL", "TERM", "INT", "HUP", "QUIT", "USR1", "USR2")
	return cmd
}

func newRmCmd(e *environment) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rm [OPTIONS] MACHINE...",
		Short:             "Remove machines",
		Long:              `Remove machines with their disks, logs and addresses. A running machine is refused without --force, which kills it.`,
		Example:           `  atoll rm -f web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				_, err := c.Machines.Remove(ctx, connect.NewRequest(&atollv1.RemoveMachineRequest{Machine: name, Force: force}))
				return name, err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill a machine that runs")
	return cmd
}

func newWaitCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:               "wait MACHINE...",
		Short:             "Wait until machines stop and print their exit codes",
		Example:           `  atoll wait job && atoll logs job`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeMachines(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.each(cmd.Context(), args, func(ctx context.Context, c *client.Client, name string) (string, error) {
				res, err := c.Machines.Wait(ctx, connect.NewRequest(&atollv1.WaitMachineRequest{Machine: name}))
				if err != nil {
					return "", err
				}
				return fmt.Sprint(res.Msg.GetExitCode()), nil
			})
		},
	}
}

func startMachine(ctx context.Context, c *client.Client, name string) (warnings []string, err error) {
	res, err := c.Machines.Start(ctx, connect.NewRequest(&atollv1.StartMachineRequest{Machine: name}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetWarnings(), nil
}

func addStopTimeout(cmd *cobra.Command, timeout *seconds) {
	cmd.Flags().VarP(timeout, "timeout", "t", "time to end before it is killed, such as 30 or 1m30s (default: the machine's, else 10s)")
}

func stopMachine(ctx context.Context, c *client.Client, name string, timeout seconds) error {
	req := &atollv1.StopMachineRequest{Machine: name}
	if timeout.set {
		req.Timeout = durationpb.New(timeout.d)
	}
	_, err := c.Machines.Stop(ctx, connect.NewRequest(req))
	return err
}
