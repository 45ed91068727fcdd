package cli

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
)

// completionTime is how long somebody who has pressed Tab may wait.
const completionTime = time.Second

type completer = func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective)

// completeMachines offers names of machines for the first n arguments, or for all when n is 0.
func (e *environment) completeMachines(n int) completer {
	return e.completeFrom(n, func(ctx context.Context, c *client.Client) (names []string) {
		res, err := c.Machines.List(ctx, connect.NewRequest(&atollv1.ListMachinesRequest{All: true}))
		if err != nil {
			return nil
		}
		for _, m := range res.Msg.GetMachines() {
			names = append(names, m.GetSpec().GetName())
		}
		return names
	})
}

// completeImages offers references of images.
func (e *environment) completeImages(n int) completer {
	return e.completeFrom(n, func(ctx context.Context, c *client.Client) (refs []string) {
		res, err := c.Images.List(ctx, connect.NewRequest(&atollv1.ListImagesRequest{}))
		if err != nil {
			return nil
		}
		for _, i := range res.Msg.GetImages() {
			refs = append(refs, i.GetReferences()...)
		}
		return refs
	})
}

// completeKernels offers names of kernels.
func (e *environment) completeKernels(n int) completer {
	return e.completeFrom(n, func(ctx context.Context, c *client.Client) (names []string) {
		res, err := c.Kernels.List(ctx, connect.NewRequest(&atollv1.ListKernelsRequest{}))
		if err != nil {
			return nil
		}
		for _, k := range res.Msg.GetKernels() {
			names = append(names, k.GetName())
		}
		return names
	})
}

func (e *environment) completeProfiles(n int) completer {
	return e.completeFrom(n, func(ctx context.Context, c *client.Client) (names []string) {
		res, err := c.Profiles.List(ctx, connect.NewRequest(&atollv1.ListProfilesRequest{}))
		if err != nil {
			return nil
		}
		for _, p := range res.Msg.GetProfiles() {
			names = append(names, p.GetName())
		}
		return names
	})
}

// completeFrom asks a daemon that runs; a Tab starts none.
func (e *environment) completeFrom(n int, names func(context.Context, *client.Client) []string) completer {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if n > 0 && len(args) >= n {
			return nil, cobra.ShellCompDirectiveDefault
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completionTime)
		defer cancel()
		e.DaemonCmd = nil
		c, err := e.connect(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return names(ctx, c), cobra.ShellCompDirectiveNoFileComp
	}
}

// complete offers fixed values for a flag.
func complete(cmd *cobra.Command, flag string, values ...string) {
	completeBy(cmd, flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

func completeBy(cmd *cobra.Command, flag string, values completer) {
	if err := cmd.RegisterFlagCompletionFunc(flag, values); err != nil {
		panic(err) // the flag does not exist: a mistake in this package
	}
}
