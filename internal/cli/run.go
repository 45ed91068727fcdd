package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

// lastWord bounds what run still does after a failure: asking for the exit code, taking the machine away.
const lastWord = 5 * time.Second

func newRunCmd(e *environment) *cobra.Command {
	var detach bool
	var who presence
	var flags *specFlags
	cmd := &cobra.Command{
		Use:   "run [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short: "Create and start a machine",
		Long: `Create a machine from an image and start it, attached to its entrypoint unless
--detach is given. An image that is not here is pulled. COMMAND replaces the
image's CMD, word for word.

Without a terminal, signals such as that of Ctrl-C go to the entrypoint. At one,
ctrl-p ctrl-q leaves the machine, which runs on. The exit code is the
entrypoint's, 128+n when signal n ended it; 126 when it could not be executed,
127 when it was not found, 125 when Atoll failed.

With --disk there is no IMAGE: the machine boots a disk image, such as a
distribution's cloud image, with the system that is on it. The file stays as it
is; what the machine writes goes to a disk of its own. Its serial console is
the output.`,
		Example: `  atoll run --rm debian:bookworm uname -a
  atoll run -d --name web -p 8080:80 --memory 1G hello
  atoll run --rm -it debian:bookworm bash
  atoll run -d --name debian -p 2222:22 --disk debian-12-generic-amd64.qcow2`,
		Args:              bootArgs,
		ValidArgsFunction: e.completeImages(1),
		RunE: guestCode(func(cmd *cobra.Command, args []string) error {
			if err := e.setFromEnvironment(cmd); err != nil {
				return err
			}
			spec, err := flags.machine(e, cmd, args)
			if err != nil {
				return err
			}
			if err := e.checkTerminal(spec.Stdin && !detach, spec.Tty); err != nil {
				return err
			}
			if who.keys, err = parseDetachKeys(who.keyNames); err != nil {
				return err
			}
			return e.run(cmd.Context(), spec, flags.pull, detach, who)
		}),
	}
	flags = addSpecFlags(cmd)
	completeBy(cmd, "profile", e.completeProfiles(0))
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "print the machine's ID and leave it running")
	addSigProxy(cmd, &who.sigProxy)
	addDetachKeys(cmd, &who.keyNames)
	return cmd
}

// presence is how somebody attached takes part.
type presence struct {
	sigProxy bool
	keyNames string
	keys     []byte
}

func newCreateCmd(e *environment) *cobra.Command {
	var flags *specFlags
	cmd := &cobra.Command{
		Use:   "create [OPTIONS] IMAGE [COMMAND] [ARG...]",
		Short: "Create a machine without starting it",
		Long: `Create a machine from an image and print its ID. The options are those of
"atoll run"; "atoll start" starts it.`,
		Example:           `  atoll create --name web -p 8080:80 hello`,
		Args:              bootArgs,
		ValidArgsFunction: e.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := e.setFromEnvironment(cmd); err != nil {
				return err
			}
			spec, err := flags.machine(e, cmd, args)
			if err != nil {
				return err
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			m, warnings, err := e.create(cmd.Context(), c, spec, flags.pull)
			if err != nil {
				return err
			}
			ui.Warnings(e.Stderr, warnings)
			fmt.Fprintln(e.Stdout, m.GetId())
			return nil
		},
	}
	flags = addSpecFlags(cmd)
	completeBy(cmd, "profile", e.completeProfiles(0))
	return cmd
}

// create makes the machine, with its image pulled first where the policy says so.
func (e *environment) create(ctx context.Context, c *client.Client, spec *atollv1.MachineSpec, pull string) (*atollv1.Machine, []string, error) {
	ofImage := spec.GetDisk() == ""
	absent := ofImage && pull == "always"
	if ofImage && pull == "missing" {
		_, err := c.Images.Get(ctx, connect.NewRequest(&atollv1.GetImageRequest{Reference: spec.GetImage()}))
		if absent = errdefs.IsNotFound(err); absent {
			fmt.Fprintf(e.Stderr, "Image %s is not here; pulling it\n", spec.GetImage())
		} else if err != nil {
			return nil, nil, err
		}
	}
	if absent {
		if _, err := e.pull(ctx, c, &atollv1.PullImageRequest{Reference: spec.GetImage(), Platform: spec.GetPlatform()}, false); err != nil {
			return nil, nil, err
		}
	}
	if ofImage && spec.GetKernel() == "" {
		if err := e.ensureKernel(ctx, c); err != nil {
			return nil, nil, err
		}
	}
	res, err := c.Machines.Create(ctx, connect.NewRequest(&atollv1.CreateMachineRequest{Spec: spec}))
	if err != nil {
		return nil, nil, err
	}
	return res.Msg.GetMachine(), res.Msg.GetWarnings(), nil
}

// ensureKernel fetches Debian's kernel where there is none at all, so that the first run needs no preparation.
func (e *environment) ensureKernel(ctx context.Context, c *client.Client) error {
	_, err := c.Kernels.Get(ctx, connect.NewRequest(&atollv1.GetKernelRequest{}))
	if !errdefs.IsNotFound(err) {
		return err
	}
	fmt.Fprintln(e.Stderr, "There is no kernel yet; fetching Debian's")
	_, err = e.pullKernel(ctx, c, &atollv1.PullKernelRequest{}, false)
	return err
}

func (e *environment) run(ctx context.Context, spec *atollv1.MachineSpec, pull string, detach bool, who presence) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	m, warnings, err := e.create(ctx, c, spec, pull)
	if err != nil {
		return err
	}
	if detach {
		more, err := e.start(ctx, c, m, nil)
		ui.Warnings(e.Stderr, append(warnings, more...))
		if err != nil {
			return err
		}
		fmt.Fprintln(e.Stdout, m.GetId())
		return nil
	}
	a, err := e.openAttach(ctx, c, m.GetId(), spec.GetStdin(), spec.GetTty())
	if err != nil {
		return e.discard(ctx, c, m, err)
	}
	defer a.close()
	a.take(who)
	more, err := e.start(ctx, c, m, a.result)
	ui.Warnings(e.Stderr, append(warnings, more...))
	if err != nil {
		return err
	}
	return runsOn(m, a.wait(ctx))
}

// start starts the machine. The error of an entrypoint that could not be executed carries its code, 126 or 127, which the
// machine knows, or, where it is gone already, the attached stream.
func (e *environment) start(ctx context.Context, c *client.Client, m *atollv1.Machine, attached <-chan outcome) (warnings []string, err error) {
	stop := e.watchProvisioning(ctx, c, m.GetId(), false)
	res, err := c.Machines.Start(ctx, connect.NewRequest(&atollv1.StartMachineRequest{Machine: m.GetId()}))
	stop()
	if err == nil {
		return res.Msg.GetWarnings(), nil
	}
	code := 125
	if name := m.GetSpec().GetName(); isBroken(err) {
		err = hint.With(fmt.Errorf("starting machine %q: %w", name, errDisconnected), "atoll start %s", name)
	}
	if ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(ctx, lastWord)
		defer cancel()
		failed, getErr := c.Machines.Get(ctx, connect.NewRequest(&atollv1.GetMachineRequest{Machine: m.GetId()}))
		if getErr == nil && failed.Msg.GetMachine().GetExitCode() != 0 {
			code = int(failed.Msg.GetMachine().GetExitCode())
		} else if errdefs.IsNotFound(getErr) && attached != nil {
			select {
			case o := <-attached:
				if o.code != 0 {
					code = o.code
				}
			case <-ctx.Done():
			}
		}
	}
	return nil, &exitError{code, e.discard(ctx, c, m, err)}
}

// discard takes away a machine that was to be removed when it stops but will never have run. Another one stays, but does not run
// on when the user has broken off its start.
func (e *environment) discard(ctx context.Context, c *client.Client, m *atollv1.Machine, cause error) error {
	brokenOff := ctx.Err() != nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWord)
	defer cancel()
	if !m.GetSpec().GetRemove() {
		if brokenOff {
			// It may not run at all, and then this fails.
			_, _ = c.Machines.Kill(ctx, connect.NewRequest(&atollv1.KillMachineRequest{Machine: m.GetId()}))
		}
		return cause
	}
	_, err := c.Machines.Remove(ctx, connect.NewRequest(&atollv1.RemoveMachineRequest{Machine: m.GetId(), Force: true}))
	if err == nil || errdefs.IsNotFound(err) {
		return cause
	}
	return errors.Join(cause, fmt.Errorf("removing machine %q: %w", m.GetSpec().GetName(), err))
}
