package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newImageCmd(e *environment) *cobra.Command {
	ls, rm := newImagesCmd(e), newRmiCmd(e)
	ls.Use, ls.Aliases, ls.Example = "ls [OPTIONS] [REFERENCE]", []string{"list"}, `  atoll image ls --format '{{.Reference}} {{.SizeBytes}}'`
	rm.Use, rm.Aliases, rm.Example = "rm [OPTIONS] IMAGE...", []string{"remove"}, `  atoll image rm hello:old`
	return newGroup("image", "Images", `  atoll image ls`, ls, newPullCmd(e), newPushCmd(e), rm, newTagCmd(e), newImageInspectCmd(e),
		newHistoryCmd(e), newSaveCmd(e), newLoadCmd(e), newImportCmd(e), newImagePruneCmd(e))
}

func newImagesCmd(e *environment) *cobra.Command {
	var quiet, noTrunc, digests, all bool
	var format string
	var filters []string
	cmd := &cobra.Command{
		Use:   "images [OPTIONS] [REFERENCE]",
		Short: "List images",
		Long: `List images, one row for each reference. SIZE is that of the compressed layers.
REFERENCE chooses by name, as debian, or by pattern, as 'team/*:1.*'.

The filters are reference=PATTERN, dangling=BOOL (without a name),
label=KEY[=VALUE], label!=KEY[=VALUE], before=IMAGE, since=IMAGE and until=TIME
(made before it; also a duration, as 24h). An image must meet all of them, and
one of several references.

--format json prints one array; templates and JSON have whole IDs. The fields
are ID, Repository, Tag, Reference, Digest (as its registry has it), CreatedAt,
SizeBytes, RootDiskBytes and Platform.`,
		Example: `  atoll images
  atoll images -q --filter dangling=true
  atoll images 'team/*'`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: e.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			for _, reference := range args {
				filters = append(filters, "reference="+reference)
			}
			res, err := c.Images.List(cmd.Context(), connect.NewRequest(&atollv1.ListImagesRequest{Filters: filters}))
			if err != nil {
				return err
			}
			id, now := ui.Short, e.now()
			if noTrunc {
				id = whole
			}
			rows := imageViews(res.Msg.GetImages())
			if quiet {
				rows = slices.CompactFunc(rows, func(a, b imageView) bool { return a.ID == b.ID })
				for _, r := range rows {
					fmt.Fprintln(e.Stdout, id(r.ID))
				}
				return nil
			}
			columns := []ui.Column[imageView]{
				{Title: "REPOSITORY", Cell: func(i imageView) string { return i.Repository }},
				{Title: "TAG", Cell: func(i imageView) string { return i.Tag }},
			}
			if digests {
				columns = append(columns, ui.Column[imageView]{Title: "DIGEST", Cell: func(i imageView) string { return cmp.Or(i.Digest, "<none>") }})
			}
			return ui.List(e.Stdout, format, append(columns, []ui.Column[imageView]{
				{Title: "IMAGE ID", Cell: func(i imageView) string { return id(i.ID) }},
				{Title: "CREATED", Cell: func(i imageView) string { return ui.Ago(now, i.CreatedAt) }},
				{Title: "SIZE", Cell: func(i imageView) string { return ui.Size(i.SizeBytes) }},
			}...), rows)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "IDs only")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "whole IDs")
	cmd.Flags().BoolVar(&digests, "digests", false, "also the digests, as registries have them")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "all images: for Docker's users, since none is hidden here")
	cmd.Flags().StringArrayVarP(&filters, "filter", "f", nil, "only images that meet it: `KEY=VALUE`; may be given more than once")
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func newPullCmd(e *environment) *cobra.Command {
	var quiet bool
	req := &atollv1.PullImageRequest{}
	cmd := &cobra.Command{
		Use:   "pull [OPTIONS] IMAGE",
		Short: "Fetch an image from its registry",
		Long: `Fetch an image from its registry and print its digest. What is here already is
not fetched again, also after an interrupted pull. Credentials are those of
"atoll login" and "docker login". Of an index of several platforms the image for
one is fetched, or with --platform all the whole of it.`,
		Example: `  atoll pull debian:bookworm
  atoll pull localhost:5000/team/app@sha256:…`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			req.Reference = args[0]
			image, err := e.pull(cmd.Context(), c, req, quiet)
			if err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, image.GetDigest())
			return nil
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	cmd.Flags().StringVar(&req.Platform, "platform", "", "`OS/ARCH[/VARIANT]`, or all (default: this host's)")
	addReferrers(cmd, &req.Referrers)
	cmd.Flags().BoolVar(&req.WithDisk, "with-disk", false, "take the root disks that were pushed with it, and convert nothing:\nwhoever can push to that repository decides what is in them")
	cmd.Flags().BoolVar(&req.WithKernel, "with-kernel", false, "also the kernel that was pushed with it")
	return cmd
}

// pull fetches an image, with its progress on stderr.
func (e *environment) pull(ctx context.Context, c *client.Client, req *atollv1.PullImageRequest, quiet bool) (*atollv1.Image, error) {
	stream, err := c.Images.Pull(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return pulled(e, stream, quiet, (*atollv1.PullImageResponse).GetTransfer, (*atollv1.PullImageResponse).GetImage)
}

// pulled shows the transfers of a stream and returns its result.
func pulled[R, T any](e *environment, stream *connect.ServerStreamForClient[R], quiet bool, transfer func(*R) *atollv1.Transfer, result func(*R) *T) (*T, error) {
	show := e.progress(quiet)
	defer show.Close()
	var got *T
	err := each(stream, func(r *R) error {
		if t := result(r); t != nil {
			got = t
		}
		showTransfer(show, transfer(r))
		return nil
	})
	if err == nil && got == nil {
		err = errDisconnected
	}
	return got, err
}

func newTagCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:               "tag SOURCE TARGET",
		Short:             "Give an image another reference",
		Example:           `  atoll tag hello localhost:5000/hello:1.0`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: e.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			_, err = c.Images.Tag(cmd.Context(), connect.NewRequest(&atollv1.TagImageRequest{Source: args[0], Target: args[1]}))
			return err
		},
	}
}

func newRmiCmd(e *environment) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rmi [OPTIONS] IMAGE...",
		Short: "Remove images",
		Long: `Remove references, and with the last one the image and what no other needs. An
image that machines use is refused.`,
		Example:           `  atoll rmi hello:old`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeImages(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			var failures []error
			for _, ref := range args {
				res, err := c.Images.Remove(cmd.Context(), connect.NewRequest(&atollv1.RemoveImageRequest{Reference: ref, Force: force}))
				if err != nil {
					failures = append(failures, err)
					continue
				}
				for _, r := range res.Msg.GetUntagged() {
					fmt.Fprintf(e.Stdout, "Untagged: %s\n", r)
				}
				for _, d := range res.Msg.GetDeleted() {
					fmt.Fprintf(e.Stdout, "Deleted: %s\n", d)
				}
			}
			return errors.Join(failures...)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also when stopped machines use it or it has several references")
	return cmd
}

func newImageInspectCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] IMAGE...",
		Short: "Show all there is to know about images",
		Long: `Show images as a JSON array, or by a Go template that is applied to each. The
fields are ID, References, RepoDigests, CreatedAt, Author, SizeBytes, OS,
Architecture, Variant, Config (with the keys of the image specification),
Layers, DiffIDs, IndexDigest and Variants (of the index that the image came
from), Referrers, RootDisks (the lowest first, each with Path, SizeBytes, Images
that use it, Layers, RootHash and Salt), RootDisk (the lowest's path),
RootDiskBytes and RootDiskOwnBytes (of those that no other image uses).`,
		Example:           `  atoll image inspect --format '{{json .Config.Cmd}}' hello`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeImages(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inspectEach(cmd.Context(), e, format, args, func(c *client.Client, ref string) (imageDetail, error) {
				res, err := c.Images.Get(cmd.Context(), connect.NewRequest(&atollv1.GetImageRequest{Reference: ref}))
				if err != nil {
					return imageDetail{}, err
				}
				return newImageDetail(res.Msg.GetImage())
			})
		},
	}
	addFormat(cmd, &format, "json")
	return cmd
}

// progress shows transfers on stderr, or nothing when quiet.
func (e *environment) progress(quiet bool) *ui.Progress {
	if quiet {
		return nil
	}
	return ui.NewProgress(e.Stderr)
}

func showTransfer(p *ui.Progress, t *atollv1.Transfer) {
	if t != nil {
		p.Update(ui.Transfer{ID: t.GetId(), Status: t.GetStatus(), Done: t.GetDoneBytes(), Total: t.GetTotalBytes()})
	}
}
