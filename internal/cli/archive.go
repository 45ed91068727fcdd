package cli

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

// archiveChunk is the size of a message of an archive.
const archiveChunk = 256 << 10

func newSaveCmd(e *environment) *cobra.Command {
	var output string
	req := &atollv1.SaveImagesRequest{}
	cmd := &cobra.Command{
		Use:   "save [OPTIONS] IMAGE...",
		Short: "Write images into a tar archive",
		Long: `Write images into a tar archive, for "atoll load", "docker load" and others. The
format docker-archive is an oci-archive too, as Docker writes it from version
25 on. The same images give the same bytes.`,
		Example: `  atoll save -o hello.tar hello
  atoll save hello | ssh far atoll load`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeImages(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, terminal := ui.Terminal(e.Stdout); terminal && (output == "" || output == "-") {
				return hint.With(errors.New("an archive is not for a terminal"), "give a file with -o, or redirect the output")
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			req.References = args
			stream, err := c.Images.Save(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			write := func(w io.Writer) error {
				return each(stream, func(r *atollv1.SaveImagesResponse) error {
					_, err := w.Write(r.GetData())
					return err
				})
			}
			if output == "" || output == "-" {
				return write(e.Stdout)
			}
			return writeWhole(output, write)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "`FILE` to write; -: standard output (the default)")
	cmd.Flags().StringVar(&req.Format, "format", "docker-archive", "docker-archive or oci-archive")
	cmd.Flags().StringVar(&req.Platform, "platform", "", "of an index only the image for `OS/ARCH[/VARIANT]`")
	complete(cmd, "format", "docker-archive", "oci-archive")
	return cmd
}

// writeWhole writes a file that is there whole or not at all.
func writeWhole(path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func newLoadCmd(e *environment) *cobra.Command {
	var input string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "load [OPTIONS]",
		Short: "Take images from a tar archive",
		Long: `Take images from a tar archive that "docker save", "atoll save" or another tool
has written: a Docker or OCI archive, plain or compressed, or the directory of
an OCI layout. All images in it are loaded, or none.`,
		Example: `  atoll load -i hello.tar
  curl -L https://example.com/images.tar.zst | atoll load`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			in, err := e.openArchive(input)
			if err != nil {
				return err
			}
			defer in.Close()
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			stream := c.Images.Load(ctx)
			up := upload(in, cancel, stream.CloseRequest, func(b []byte) error { return stream.Send(&atollv1.LoadImagesRequest{Data: b}) })
			show := e.progress(quiet)
			err = receiveAll(stream.Receive, func(r *atollv1.LoadImagesResponse) {
				showTransfer(show, r.GetTransfer())
				switch l := r.GetLoaded(); {
				case l == nil:
				case l.GetReference() == "":
					fmt.Fprintln(e.Stdout, "Loaded image ID:", l.GetDigest())
				default:
					fmt.Fprintln(e.Stdout, "Loaded image:", l.GetReference())
				}
			})
			show.Close()
			return up.failure(err)
		},
	}
	cmd.Flags().StringVarP(&input, "input", "i", "", "`FILE` or directory to read; -: standard input (the default)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func newImportCmd(e *environment) *cobra.Command {
	var quiet bool
	start := &atollv1.ImportStart{}
	cmd := &cobra.Command{
		Use:   "import [OPTIONS] FILE|- [NAME[:TAG]]",
		Short: "Make an image of the tar archive of a root file system",
		Long: `Make an image of one layer of the tar archive of a root file system, plain or
compressed, and print its digest. --change gives the image its configuration,
by the Dockerfile instructions CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL,
ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR.`,
		Example: `  atoll import -c 'CMD ["/sbin/init"]' rootfs.tar.gz mine:1`,
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.Contains(args[0], "://") {
				return hint.With(fmt.Errorf("importing %q: a URL is not fetched: %w", args[0], errdefs.ErrInvalidArgument), "curl -L %s | atoll import - …", args[0])
			}
			in, err := e.openArchive(args[0])
			if err != nil {
				return err
			}
			defer in.Close()
			if len(args) == 2 {
				start.Reference = args[1]
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			stream := c.Images.Import(ctx)
			// A failure to send shows where the answer is received.
			_ = stream.Send(&atollv1.ImportImageRequest{Kind: &atollv1.ImportImageRequest_Start{Start: start}})
			up := upload(in, cancel, stream.CloseRequest, func(b []byte) error {
				return stream.Send(&atollv1.ImportImageRequest{Kind: &atollv1.ImportImageRequest_Data{Data: b}})
			})
			show := e.progress(quiet)
			var image *atollv1.Image
			err = receiveAll(stream.Receive, func(r *atollv1.ImportImageResponse) {
				showTransfer(show, r.GetTransfer())
				if r.GetImage() != nil {
					image = r.GetImage()
				}
			})
			show.Close()
			if err := up.failure(err); err != nil {
				return err
			}
			if image == nil {
				return errDisconnected
			}
			fmt.Fprintln(e.Stdout, image.GetDigest())
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&start.Changes, "change", "c", nil, "Dockerfile `INSTRUCTION` for the image's configuration; may be given more than once")
	cmd.Flags().StringVarP(&start.Message, "message", "m", "", "comment for the image's history")
	cmd.Flags().StringVar(&start.Platform, "platform", "", "`OS/ARCH[/VARIANT]` that the root file system is for (default: this host's)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

// openArchive opens a file, standard input, or a directory, which is read as a tar archive of what is in it.
func (e *environment) openArchive(path string) (io.ReadCloser, error) {
	if path == "" || path == "-" {
		if _, terminal := ui.Terminal(e.Stdin); terminal {
			return nil, hint.With(errors.New("an archive is not typed at a terminal"), "name a file, or redirect the input")
		}
		return io.NopCloser(e.Stdin), nil
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hint.With(fmt.Errorf("archive %q: no such file: %w", path, errdefs.ErrNotFound), "check the path")
	}
	if err != nil {
		return nil, fmt.Errorf("archive %q: %w", path, err)
	}
	if !info.IsDir() {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("archive %q: %w", path, err)
		}
		return f, nil
	}
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		w.CloseWithError(errors.Join(tw.AddFS(os.DirFS(path)), tw.Close()))
	}()
	return r, nil
}

// uploading is an archive on its way to the daemon.
type uploading struct {
	read chan error // why the archive could not be read; closed at the end
}

// upload sends what is read, chunk by chunk, until its end. An archive that cannot be read ends the call by cancel: the daemon must not
// take the part for the whole.
func upload(r io.Reader, cancel func(), closeRequest func() error, send func([]byte) error) *uploading {
	u := &uploading{read: make(chan error, 1)}
	go func() {
		defer close(u.read)
		buf := make([]byte, archiveChunk)
		for {
			n, err := io.ReadFull(r, buf)
			if n > 0 && send(buf[:n]) != nil {
				return // the answer tells why
			}
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				_ = closeRequest()
				return
			}
			if err != nil {
				u.read <- fmt.Errorf("reading the archive: %w", err)
				cancel()
				return
			}
		}
	}()
	return u
}

// failure is why the call failed: the archive's fault rather than that the call was ended because of it.
func (u *uploading) failure(err error) error {
	if err == nil {
		return nil
	}
	select {
	case readErr, ok := <-u.read:
		if ok {
			return readErr
		}
	default:
	}
	return err
}

// receiveAll takes the messages of a stream to its end.
func receiveAll[T any](next func() (*T, error), do func(*T)) error {
	for {
		m, err := next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		do(m)
	}
}
