package cli

import (
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newPushCmd(e *environment) *cobra.Command {
	var quiet bool
	req := &atollv1.PushImageRequest{}
	cmd := &cobra.Command{
		Use:   "push [OPTIONS] NAME[:TAG]",
		Short: "Bring an image to its registry",
		Long: `Bring an image to the registry that its name begins with, and print the digest
that it has there. What the registry has already is not sent again. An image
that came from an index of several platforms goes with the whole index where
all of it is here, else alone. Credentials are those of "atoll login".`,
		Example: `  atoll tag hello registry.example.com/team/hello:1.0
  atoll push registry.example.com/team/hello:1.0`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			req.Reference = args[0]
			stream, err := c.Images.Push(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			pushed, err := pulled(e, stream, quiet, (*atollv1.PushImageResponse).GetTransfer, (*atollv1.PushImageResponse).GetPushed)
			if err != nil {
				return err
			}
			if missing := pushed.GetMissingPlatforms(); len(missing) > 0 {
				ui.Warnings(e.Stderr, []string{fmt.Sprintf("only this platform's image was pushed: %s of its index is not here (atoll pull --platform all fetches it)", strings.Join(missing, ", "))})
			}
			fmt.Fprintln(e.Stdout, pushed.GetDigest())
			return nil
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	cmd.Flags().StringVar(&req.Platform, "platform", "", "of an index push only the image for `OS/ARCH[/VARIANT]`; all: fail unless all of it is here")
	addReferrers(cmd, &req.Referrers)
	cmd.Flags().BoolVar(&req.WithDisk, "with-disk", false, "also the root disks, so that another host need not convert the layers")
	cmd.Flags().StringVar(&req.WithKernel, "with-kernel", "", "also the kernel `NAME`")
	return cmd
}

func addReferrers(cmd *cobra.Command, types *[]string) {
	cmd.Flags().StringSliceVar(types, "referrers", nil, "also artifacts of these `TYPES` that refer to the image, such as signatures; '*': all")
}
