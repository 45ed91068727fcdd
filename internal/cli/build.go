package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/build/progress"
	"github.com/atollvm/atoll/internal/hint"
)

// buildFlags is what a command line says of a build, before it is a request.
type buildFlags struct {
	start *atollv1.BuildStart

	file, mode             string
	quiet, check           bool
	args, labels, contexts []string
	secrets, ssh           []string
	addHosts               []string
	shm                    bytesValue
	cacheTo, cacheFrom     []string
	outputs                []string
	timeout                time.Duration
	iidFile, metadataFile  string
}

func newBuildCmd(e *environment) *cobra.Command {
	b := &buildFlags{start: &atollv1.BuildStart{}}
	cmd := &cobra.Command{
		Use:   "build [OPTIONS] PATH|URL|-",
		Short: "Build an image from a Dockerfile",
		Long: `Build an image from a Dockerfile and print its digest. FROM takes an image that
is here, else one from its registry.

The build context is a directory; a git repository (by https with a path that
ends in .git, git://, ssh:// or git@host:path; #REF or #REF:SUBDIR may follow);
the http(s) URL of a Dockerfile or an archive; or -, standard input, with an
archive (tar, plain or compressed) or a Dockerfile alone.

With -o the image is also kept here when it has a name by -t, or is of type disk.`,
		Example: `  atoll build -t hello examples/hello
  atoll build -t app:dev -f docker/Dockerfile --target test --build-arg VERSION=1.2 .
  atoll build -t app https://git.example.org/app.git#v1.2:docker
  tar -c . | atoll build -t app -
  atoll build -o type=disk,dest=app.erofs .`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := b.read(e, args[0])
			if err != nil {
				return err
			}
			return c.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&b.start.Tags, "tag", "t", nil, "reference of the image: `NAME[:TAG]`; may be given more than once")
	f.StringVarP(&b.file, "file", "f", "", "the Dockerfile (default: PATH/Dockerfile); - reads it from standard input")
	f.StringVar(&b.start.Target, "target", "", "stage to build (default: the last)")
	f.StringArrayVar(&b.args, "build-arg", nil, "set an ARG: `KEY=VALUE`, or KEY to take it from the environment")
	f.StringArrayVar(&b.contexts, "build-context", nil, "another context: `NAME=VALUE`, a directory, docker-image://REF, oci-layout://DIR[:TAG] or a URL")
	f.StringArrayVar(&b.secrets, "secret", nil, "a secret for RUN --mount=type=secret: `id=ID[,src=FILE|,env=NAME]`")
	f.StringArrayVar(&b.ssh, "ssh", nil, "an SSH agent for RUN --mount=type=ssh and for git: `default|ID[=SOCKET|KEY[,KEY]]`")
	f.StringArrayVar(&b.labels, "label", nil, "add a label to the image: `KEY=VALUE`")
	f.StringVar(&b.start.Platform, "platform", "", "`OS/ARCH[/VARIANT]` (default: this host's); RUN works for this host's only")
	f.BoolVar(&b.start.NoCache, "no-cache", false, "run every step again")
	f.StringSliceVar(&b.start.NoCacheStages, "no-cache-filter", nil, "run every step of these `STAGES` again")
	f.BoolVar(&b.start.Pull, "pull", false, "look for newer base images in their registries")
	f.StringVar(&b.start.Network, "network", "", "network of RUN steps: host (also called default) or none")
	f.StringArrayVar(&b.addHosts, "add-host", nil, "another line of /etc/hosts in RUN steps: `NAME:ADDRESS`")
	f.Var(&b.shm, "shm-size", "size of /dev/shm in RUN steps, as 128M")
	f.StringArrayVar(&b.start.Ulimits, "ulimit", nil, "limit in RUN steps: `NAME=SOFT[:HARD]`")
	f.StringArrayVar(&b.cacheTo, "cache-to", nil, "store the cache: `type=registry,ref=REF|type=local,dest=DIR|type=inline`")
	f.StringArrayVar(&b.cacheFrom, "cache-from", nil, "use a stored cache: `REF|type=registry,ref=REF|type=local,src=DIR`")
	f.StringArrayVarP(&b.outputs, "output", "o", nil, "write files: `type=disk|oci|docker|tar|local,dest=PATH`, DIR, or - for a tar on standard output")
	f.StringVar(&b.iidFile, "iidfile", "", "write the digest to this `FILE`")
	f.StringVar(&b.metadataFile, "metadata-file", "", "write what is known of the result to this `FILE`, as JSON")
	f.DurationVar(&b.timeout, "timeout", 0, "end the build after this time, as 30m (default: as the daemon's settings say)")
	f.BoolVar(&b.check, "check", false, "check the Dockerfile and build nothing; exit code 1 when there are warnings")
	f.StringVar(&b.start.Call, "call", "", "build nothing; print check, outline or targets")
	f.StringVar(&b.start.Isolation, "isolation", "", "where RUN steps run: host, or vm for a virtual machine of the build's own (default: as the daemon's settings say, host)")
	f.StringVar(&b.mode, "progress", "auto", "auto, plain, tty, quiet or rawjson")
	f.BoolVarP(&b.quiet, "quiet", "q", false, "the digest only; the same as --progress quiet")
	complete(cmd, "progress", "auto", "plain", "tty", "quiet", "rawjson")
	complete(cmd, "isolation", "host", "vm")
	complete(cmd, "network", "default", "host", "none")
	complete(cmd, "call", "check", "outline", "targets")
	return cmd
}

// buildCall is one build, ready to go.
type buildCall struct {
	*buildFlags
	env     *environment
	stdin   bool // is the context
	agents  map[string]agentDial
	outputs []*output
}

// read turns flags into a request. All that is wrong with the command line shows here, before the daemon hears of it.
func (b *buildFlags) read(e *environment, context string) (*buildCall, error) {
	c := &buildCall{buildFlags: b, env: e, agents: map[string]agentDial{}}
	if b.quiet {
		b.mode = "quiet"
	}
	switch b.mode {
	case "auto", "plain", "tty", "quiet", "rawjson":
	default:
		return nil, usagef("--progress %q: want auto, plain, tty, quiet or rawjson", b.mode)
	}
	switch b.start.Isolation {
	case "", "host", "vm":
	default:
		return nil, usagef("--isolation %q: want host or vm", b.start.Isolation)
	}
	if b.check {
		b.start.Call = "check"
	}
	switch b.start.Call {
	case "", "check", "outline", "targets":
	default:
		return nil, usagef("--call %q: want check, outline or targets", b.start.Call)
	}
	if b.timeout < 0 {
		return nil, usagef("--timeout %s: it is negative", b.timeout)
	}
	if b.timeout > 0 {
		b.start.Timeout = durationpb.New(b.timeout)
	}
	if b.start.Network == "default" {
		b.start.Network = ""
	}
	b.start.Quiet, b.start.ShmBytes = b.mode == "quiet", int64(b.shm)
	b.start.BuildArgs, b.start.Labels = pairs(e.environ(b.args)), pairs(b.labels)
	for _, read := range []func() error{
		func() error { return c.readContext(context) },
		c.readContexts, c.readSecrets, c.readAgents, c.readHosts, c.readCaches, c.readOutputs,
	} {
		if err := read(); err != nil {
			c.discard()
			return nil, err
		}
	}
	return c, nil
}

func (c *buildCall) run(ctx context.Context) error {
	defer c.discard()
	daemon, err := c.env.connect(ctx)
	if err != nil {
		return err
	}
	show, err := progress.NewPrinter(c.env.Stderr, c.mode)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx) // ends the stream, and with it who writes to it
	stream := &buildStream{BidiStreamForClient: daemon.Build.Build(ctx)}
	// net/http sees the end of a context only once the request has been sent whole.
	context.AfterFunc(ctx, func() { _ = stream.CloseRequest() })
	defer func() {
		cancel()
		_ = stream.CloseResponse() // nobody is interested any more
	}()
	if err := stream.send(&atollv1.BuildRequest{Kind: &atollv1.BuildRequest_Start{Start: c.start}}); err != nil {
		return errors.Join(err, show.Close())
	}
	if c.stdin {
		go stream.sendContext(c.env.Stdin) // cannot be waited for: a read of a terminal has no end
	}
	result, report, err := c.receive(ctx, stream, show)
	if closeErr := show.Close(); err == nil {
		err = closeErr
	}
	switch {
	case err != nil:
		return err
	case report != nil:
		return c.report(report)
	case result == nil:
		return errDisconnected
	}
	return c.finish(result)
}

func (c *buildCall) receive(ctx context.Context, stream *buildStream, show *progress.Printer) (result *atollv1.BuildResult, report *atollv1.BuildReport, err error) {
	agents := newAgentConns(stream, c.agents)
	defer agents.close()
	for {
		r, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return result, report, nil
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = hint.With(errDisconnected, "it was ended, or died: build again")
		}
		if err != nil {
			return nil, nil, err
		}
		switch k := r.GetKind().(type) {
		case *atollv1.BuildResponse_Status:
			err = show.Write(k.Status)
		case *atollv1.BuildResponse_Agent:
			agents.take(ctx, k.Agent)
		case *atollv1.BuildResponse_Output:
			if i := int(k.Output.GetIndex()); i < len(c.outputs) {
				err = c.outputs[i].write(k.Output.GetData())
			}
		case *atollv1.BuildResponse_Result:
			result = k.Result
		case *atollv1.BuildResponse_Report:
			report = k.Report
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

// report shows the answer of a build that only asked.
func (c *buildCall) report(r *atollv1.BuildReport) error {
	text := strings.TrimLeft(r.GetText(), "\n")
	if text == "" && c.start.GetCall() == "check" {
		text = "Check complete, no warnings found.\n"
	}
	fmt.Fprint(c.env.Stdout, text)
	if r.GetExitCode() != 0 {
		return &exitError{code: 1}
	}
	return nil
}

// finish writes what belongs to a build that was done.
func (c *buildCall) finish(r *atollv1.BuildResult) error {
	toStdout := false
	for _, o := range c.outputs {
		if err := o.finish(); err != nil {
			return err
		}
		toStdout = toStdout || o.dest == "-"
	}
	if c.iidFile != "" {
		if err := os.WriteFile(c.iidFile, []byte(r.GetDigest()), 0o644); err != nil {
			return fmt.Errorf("writing the digest: %w", err)
		}
	}
	if c.metadataFile != "" {
		if err := writeMetadata(c.metadataFile, r); err != nil {
			return fmt.Errorf("writing the metadata: %w", err)
		}
	}
	if r.GetDigest() != "" && !toStdout {
		fmt.Fprintln(c.env.Stdout, r.GetDigest())
	}
	return nil
}

// discard removes what an output of a build that failed has written. After finish it does nothing.
func (c *buildCall) discard() {
	for _, o := range c.outputs {
		o.discard()
	}
}

// buildStream is the stream of one build. Several write to it: a stream takes one message at a time.
type buildStream struct {
	*connect.BidiStreamForClient[atollv1.BuildRequest, atollv1.BuildResponse]
	mu sync.Mutex
}

// send says nothing of a stream that the daemon has ended: Receive knows why.
func (s *buildStream) send(r *atollv1.BuildRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.Send(r); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// sendContext streams the build context.
func (s *buildStream) sendContext(r io.Reader) {
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 && s.send(&atollv1.BuildRequest{Kind: &atollv1.BuildRequest_Context{Context: buf[:n]}}) != nil {
			return
		}
		if err != nil {
			_ = s.send(&atollv1.BuildRequest{Kind: &atollv1.BuildRequest_ContextEnd{ContextEnd: true}}) // the stream's end is seen where it is read
			return
		}
	}
}

func errNoStdin(what string) error {
	return hint.With(usagef("%s: standard input is a terminal", what), "send it with a pipe or <FILE")
}
