package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/build/progress"
	"github.com/atollvm/atoll/internal/hint"
)

func newBuildCmd(e *environment) *cobra.Command {
	req := &atollv1.BuildRequest{}
	var file, mode string
	var quiet bool
	var buildArgs, labels []string
	cmd := &cobra.Command{
		Use:   "build [OPTIONS] PATH",
		Short: "Build an image from a Dockerfile",
		Long: `Build an image from the Dockerfile in PATH, which is also the build context, and
print its digest. FROM takes an image that is here, else one from its registry.`,
		Example: `  atoll build -t hello examples/hello
  atoll build -t app:dev -f docker/Dockerfile --target test --build-arg VERSION=1.2 .`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if quiet {
				mode = "quiet"
			}
			switch req.Isolation {
			case "", "host", "vm":
			default:
				return usagef("--isolation %q: want host or vm", req.Isolation)
			}
			switch mode {
			case "auto", "plain", "tty", "quiet", "rawjson":
			default:
				return usagef("--progress %q: want auto, plain, tty, quiet or rawjson", mode)
			}
			var err error
			if req.ContextDir, err = contextDir(args[0]); err != nil {
				return err
			}
			if req.Dockerfile, err = dockerfile(file); err != nil {
				return err
			}
			req.BuildArgs, req.Labels = pairs(e.environ(buildArgs)), pairs(labels)
			return e.build(cmd, req, mode)
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&req.Tags, "tag", "t", nil, "reference of the image: `NAME[:TAG]`; may be given more than once")
	f.StringVarP(&file, "file", "f", "", "the Dockerfile (default: PATH/Dockerfile)")
	f.StringVar(&req.Target, "target", "", "stage to build (default: the last)")
	f.StringArrayVar(&buildArgs, "build-arg", nil, "set an ARG: `KEY=VALUE`, or KEY to take it from the environment")
	f.StringArrayVar(&labels, "label", nil, "add a label to the image: `KEY=VALUE`")
	f.BoolVar(&req.NoCache, "no-cache", false, "run every step again")
	f.BoolVar(&req.Pull, "pull", false, "look for newer base images in their registries")
	f.StringVar(&req.Isolation, "isolation", "", "where RUN steps run: host, or vm for a virtual machine of the build's own (default: the daemon's setting, host)")
	f.StringVar(&mode, "progress", "auto", "auto, plain, tty, quiet or rawjson")
	f.BoolVarP(&quiet, "quiet", "q", false, "the digest only; the same as --progress quiet")
	complete(cmd, "isolation", "host", "vm")
	complete(cmd, "progress", "auto", "plain", "tty", "quiet", "rawjson")
	return cmd
}

func (e *environment) build(cmd *cobra.Command, req *atollv1.BuildRequest, mode string) error {
	c, err := e.connect(cmd.Context())
	if err != nil {
		return err
	}
	stream, err := c.Build.Build(cmd.Context(), connect.NewRequest(req))
	if err != nil {
		return err
	}
	show, err := progress.NewPrinter(e.Stderr, mode)
	if err != nil {
		return err
	}
	var result *atollv1.BuildResult
	err = each(stream, func(r *atollv1.BuildResponse) error {
		if r.GetResult() != nil {
			result = r.GetResult()
		}
		if s := r.GetStatus(); s != nil {
			return show.Write(s)
		}
		return nil
	})
	if closeErr := show.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	if result == nil {
		return errDisconnected
	}
	fmt.Fprintln(e.Stdout, result.GetDigest())
	return nil
}

func contextDir(path string) (string, error) {
	if kind := remoteContext(path); kind != "" {
		return "", hint.With(fmt.Errorf("build context %q: %s is not supported yet: %w", path, kind, errdefs.ErrInvalidArgument),
			"fetch it first, then build from the directory")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("build context %q: %w", path, err)
	}
	info, err := os.Stat(abs)
	switch {
	case os.IsNotExist(err):
		return "", hint.With(fmt.Errorf("build context %q: no such directory: %w", path, errdefs.ErrNotFound), "the last argument is the directory to build from, often .")
	case err != nil:
		return "", fmt.Errorf("build context %q: %w", path, err)
	case !info.IsDir():
		return "", hint.With(fmt.Errorf("build context %q: not a directory: %w", path, errdefs.ErrInvalidArgument), "name the Dockerfile with -f and its directory as the last argument")
	}
	return abs, nil
}

// remoteContext is what kind of context path is when it is no local directory.
func remoteContext(path string) string {
	switch {
	case path == "-":
		return "a context on standard input"
	case strings.HasPrefix(path, "http://"), strings.HasPrefix(path, "https://"):
		return "a URL"
	case strings.HasPrefix(path, "git://"), strings.HasPrefix(path, "ssh://"), strings.HasPrefix(path, "git@"), strings.HasPrefix(path, "github.com/"):
		return "a git repository"
	}
	return ""
}

// dockerfile makes the value of -f absolute; it is relative to where the command runs, not to the context.
func dockerfile(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	if file == "-" {
		return "", fmt.Errorf("reading Dockerfile %q: standard input is not supported yet: %w", file, errdefs.ErrInvalidArgument)
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return "", fmt.Errorf("finding Dockerfile %q: %w", file, err)
	}
	return abs, nil
}
