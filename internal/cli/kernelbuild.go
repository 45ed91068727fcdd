package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func newKernelBuildCmd(e *environment) *cobra.Command {
	req := &atollv1.BuildKernelRequest{}
	var config, keyring string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "build [OPTIONS]",
		Short: "Build a kernel made for small machines",
		Long: `Build a kernel that has everything built in that machines need and nothing else,
print its name, and make it the default. It boots in a fraction of the time of a
distribution's kernel. The same source, configuration and compiler are built
once; then the answer comes at once.

--source is debian (the package linux-source of Debian's signed archive, 6.1 or
6.12), the URL of an archive, or the directory of an unpacked tree. An archive
needs --keyring with the public keys of its signers, whose signature is fetched
from beside it, or --sha256.

--config is a fragment, which goes on top of Atoll's configuration and has the
last word, or a whole .config, which replaces it. The build fails when a symbol
does not come out as asked for, and names it.`,
		Example: `  atoll kernel build
  atoll kernel build --config xfs.config -t with-xfs
  atoll kernel build --source https://cdn.kernel.org/pub/linux/kernel/v6.x/linux-6.12.58.tar.xz --keyring keys.gpg`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("jobs") && req.Jobs < 1 {
				return usagef("--jobs %d: want 1 or more", req.Jobs)
			}
			var err error
			if req.Config, err = readOption("--config", config); err != nil {
				return err
			}
			if req.Keyring, err = readOption("--keyring", keyring); err != nil {
				return err
			}
			if s := req.Source; s != "debian" && !strings.HasPrefix(s, "http://") && !strings.HasPrefix(s, "https://") {
				if req.Source, err = filepath.Abs(s); err != nil {
					return fmt.Errorf("finding source %q: %w", s, err)
				}
			}
			return e.buildKernel(cmd, req, quiet)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&req.Name, "tag", "t", "", "`NAME` of the kernel (default: atoll-VERSION)")
	f.StringVar(&req.Version, "version", "", "version of Linux, such as 6.1 (default: the source's)")
	f.StringVar(&req.Source, "source", "debian", "debian, `URL` of an archive, or directory")
	f.StringVar(&config, "config", "", "`FILE` with a fragment or a whole .config")
	f.StringVar(&keyring, "keyring", "", "`FILE` with the public keys of those who sign the archive")
	f.StringVar(&req.Sha256, "sha256", "", "`HASH` of the archive, instead of a signature")
	f.StringVar(&req.Mirror, "mirror", "", "`URL` of Debian's archive (default: deb.debian.org)")
	f.StringVar(&req.Architecture, "arch", "", "amd64 or arm64 (default: this host's)")
	f.Int32VarP(&req.Jobs, "jobs", "j", 0, "compilers at a time (default: one for each CPU)")
	f.BoolVarP(&quiet, "quiet", "q", false, "no progress")
	complete(cmd, "arch", "amd64", "arm64")
	return cmd
}

// readOption reads the file that an option names.
func readOption(option, path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the file of %s: %w", option, err)
	}
	if len(data) == 0 {
		return nil, fmt.Errorf("reading the file of %s: %s is empty", option, path)
	}
	return data, nil
}

func (e *environment) buildKernel(cmd *cobra.Command, req *atollv1.BuildKernelRequest, quiet bool) error {
	c, err := e.connect(cmd.Context())
	if err != nil {
		return err
	}
	stream, err := c.Kernels.Build(cmd.Context(), connect.NewRequest(req))
	if err != nil {
		return err
	}
	show := e.progress(quiet)
	defer show.Close()
	var kernel *atollv1.Kernel
	err = each(stream, func(r *atollv1.BuildKernelResponse) error {
		switch k := r.GetKind().(type) {
		case *atollv1.BuildKernelResponse_Line:
			show.Line(k.Line)
		case *atollv1.BuildKernelResponse_Transfer:
			showTransfer(show, k.Transfer)
		case *atollv1.BuildKernelResponse_Kernel:
			kernel = k.Kernel
		}
		return nil
	})
	if err != nil {
		return err
	}
	if kernel == nil {
		return errDisconnected
	}
	show.Close()
	fmt.Fprintln(e.Stdout, kernel.GetName())
	return nil
}

func newKernelRmCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:     "rm KERNEL...",
		Aliases: []string{"remove"},
		Short:   "Remove kernels",
		Long: `Remove kernels. One that machines use is refused, and so is the default one as
long as there are others.`,
		Example:           `  atoll kernel rm debian-6.1.0-40-cloud-amd64`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: e.completeKernels(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			var failures []error
			for _, name := range args { // in this order: the default one goes last
				if _, err := c.Kernels.Remove(cmd.Context(), connect.NewRequest(&atollv1.RemoveKernelRequest{Name: name})); err != nil {
					failures = append(failures, err)
					continue
				}
				fmt.Fprintln(e.Stdout, name)
			}
			return errors.Join(failures...)
		},
	}
}

func newKernelSetDefaultCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:   "set-default KERNEL",
		Short: "Choose the kernel of machines that name none",
		Long: `Choose the kernel that machines boot that name none with --kernel. Those that
run go on with theirs until their next start.`,
		Example:           `  atoll kernel set-default debian-6.1.0-40-cloud-amd64`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeKernels(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			if _, err := c.Kernels.SetDefault(cmd.Context(), connect.NewRequest(&atollv1.SetDefaultKernelRequest{Name: args[0]})); err != nil {
				return err
			}
			fmt.Fprintln(e.Stdout, args[0])
			return nil
		},
	}
}
