package cli

import (
	"context"
	"fmt"
	"path/filepath"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newKernelCmd(e *environment) *cobra.Command {
	return newGroup("kernel", "Kernels that machines boot", `  atoll kernel ls`,
		newKernelLsCmd(e), newKernelPullCmd(e), newKernelPushCmd(e), newKernelBuildCmd(e), newKernelImportCmd(e), newKernelInspectCmd(e), newKernelRmCmd(e), newKernelSetDefaultCmd(e))
}

func newKernelLsCmd(e *environment) *cobra.Command {
	var quiet bool
	var format string
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List kernels",
		Long: `List kernels; the default one is marked. --format json prints one array. The
fields are those of "atoll kernel inspect".`,
		Example: `  atoll kernel ls`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Kernels.List(cmd.Context(), connect.NewRequest(&atollv1.ListKernelsRequest{}))
			if err != nil {
				return err
			}
			var rows []kernelView
			for _, k := range res.Msg.GetKernels() {
				rows = append(rows, newKernelView(k))
				if quiet {
					fmt.Fprintln(e.Stdout, k.GetName())
				}
			}
			if quiet {
				return nil
			}
			now := e.now()
			return ui.List(e.Stdout, format, []ui.Column[kernelView]{
				{Title: "NAME", Cell: func(k kernelView) string { return k.Name }},
				{Title: "VERSION", Cell: func(k kernelView) string { return k.Version }},
				{Title: "ARCH", Cell: func(k kernelView) string { return k.Architecture }},
				{Title: "CREATED", Cell: func(k kernelView) string { return ui.Ago(now, k.CreatedAt) }},
				{Title: "SIZE", Cell: func(k kernelView) string { return ui.Size(k.SizeBytes) }},
				{Title: "DEFAULT", Cell: func(k kernelView) string {
					if k.Default {
						return "*"
					}
					return ""
				}},
			}, rows)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "names only")
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func newKernelPullCmd(e *environment) *cobra.Command {
	req := &atollv1.PullKernelRequest{}
	var quiet bool
	cmd := &cobra.Command{
		Use:   "pull [OPTIONS] [NAME|REFERENCE]",
		Short: "Fetch a kernel from a distribution's archive or a registry",
		Long: `Fetch a kernel from a distribution's archive, verify it along the chain of
signatures, and print its name. NAME is debian unless given.

With a REFERENCE, which has a slash, the kernel comes from a registry where
"atoll kernel push" has brought it. Its files are verified by their digests.`,
		Example: `  atoll kernel pull
  atoll kernel pull registry.example.com/kernels/mine:6.1`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			if len(args) == 1 {
				req.Name = args[0]
			}
			kernel, err := e.pullKernel(cmd.Context(), c, req, quiet)
			if err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, kernel.GetName())
			return nil
		},
	}
	cmd.Flags().StringVar(&req.Mirror, "mirror", "", "`URL` of the archive (default: the distribution's)")
	cmd.Flags().StringVar(&req.Architecture, "arch", "", "architecture, such as amd64 (default: this host's)")
	cmd.Flags().StringVar(&req.As, "name", "", "`NAME` here of a kernel from a registry (default: the one it had)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func newKernelPushCmd(e *environment) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "push [OPTIONS] NAME REFERENCE",
		Short: "Bring a kernel to a registry",
		Long: `Bring a kernel with its modules and its configuration to a registry, as an OCI
artifact, and print its digest there.`,
		Example: `  atoll kernel push mine registry.example.com/kernels/mine:6.1`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			stream, err := c.Kernels.Push(cmd.Context(), connect.NewRequest(&atollv1.PushKernelRequest{Name: args[0], Reference: args[1]}))
			if err != nil {
				return err
			}
			pushed, err := pulled(e, stream, quiet, (*atollv1.PushKernelResponse).GetTransfer, (*atollv1.PushKernelResponse).GetPushed)
			if err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, pushed.GetDigest())
			return nil
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

// pullKernel fetches a kernel and shows how far it is.
func (e *environment) pullKernel(ctx context.Context, c *client.Client, req *atollv1.PullKernelRequest, quiet bool) (*atollv1.Kernel, error) {
	stream, err := c.Kernels.Pull(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return pulled(e, stream, quiet, (*atollv1.PullKernelResponse).GetTransfer, (*atollv1.PullKernelResponse).GetKernel)
}

func newKernelImportCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "import FILE NAME",
		Short: "Take a kernel from a file",
		Long: `Take a kernel from a file: an uncompressed ELF kernel with a PVH entry, a
bzImage, or an arm64 Image, with everything built in that a guest needs. The
name is printed; "atoll run --kernel NAME" boots it.`,
		Example: `  atoll kernel import ./vmlinux mine`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[0])
			if err != nil {
				return fmt.Errorf("finding kernel %q: %w", args[0], err)
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Kernels.Import(cmd.Context(), connect.NewRequest(&atollv1.ImportKernelRequest{Path: path, Name: args[1]}))
			if err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, res.Msg.GetKernel().GetName())
			return nil
		},
	}
}

func newKernelInspectCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] [NAME...]",
		Short: "Show all there is to know about kernels",
		Long: `Show kernels, the default one when none is named, as a JSON array, or by a Go
template that is applied to each. The fields are Name, Version, Digest,
Architecture, Source, Args, SizeBytes, Default, CreatedAt, Path, Modules (in
load order) and ConfigDigest.`,
		Example:           `  atoll kernel inspect --format '{{.Source}}' debian-6.1.0-40-cloud-amd64`,
		ValidArgsFunction: e.completeKernels(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{""} // the default one
			}
			return inspectEach(cmd.Context(), e, format, args, func(c *client.Client, name string) (kernelView, error) {
				res, err := c.Kernels.Get(cmd.Context(), connect.NewRequest(&atollv1.GetKernelRequest{Name: name}))
				if err != nil {
					return kernelView{}, err
				}
				return newKernelView(res.Msg.GetKernel()), nil
			})
		},
	}
	addFormat(cmd, &format, "json")
	return cmd
}
