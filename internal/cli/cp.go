package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/compression"
	"github.com/atollvm/atoll/internal/filetar"
	"github.com/atollvm/atoll/internal/hint"
)

func newCpCmd(e *environment) *cobra.Command {
	var c copying
	cmd := &cobra.Command{
		Use:   "cp [OPTIONS] [MACHINE:]SRC|- [MACHINE:]DST|-",
		Short: "Copy files between a running machine and here",
		Long: `Copy a file or a tree between a running machine and here, by the rules of
docker cp: into DST where that is a directory, else as DST, which need not be
there; SRC/. is the contents of SRC. Links are copied as links. A file is there
whole or not at all, and holes stay holes.

With - the other end is a tar archive: on standard output, or from standard
input, plain or compressed, unpacked in DST.

Copied files belong to root in the machine and to you here, unless --archive is
given. What comes from a machine is not trusted: nothing is written outside of
DST, links that lie below it are not followed, and without --archive devices are
left out and no file gets the setuid or setgid bit.`,
		Example: `  atoll cp nginx.conf web:/etc/nginx/
  atoll cp web:/var/log/. logs
  atoll cp web:/etc - | tar t`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: e.completeCopy,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.environment = e
			return c.run(cmd.Context(), parseCopyEnd(args[0]), parseCopyEnd(args[1]))
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&c.archive, "archive", "a", false, "keep the owners, and with them setuid bits, extended attributes and devices")
	f.BoolVarP(&c.follow, "follow-link", "L", false, "copy what SRC leads to where it is a link")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "no progress")
	return cmd
}

// completeCopy offers machines, as NAME:, and leaves paths to the shell.
func (e *environment) completeCopy(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 1 || strings.ContainsAny(prefix, "/.:") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	names, _ := e.completeMachines(0)(cmd, args, prefix)
	var ends []string
	for _, n := range names {
		if strings.HasPrefix(n, prefix) {
			ends = append(ends, n+":")
		}
	}
	return ends, cobra.ShellCompDirectiveNoSpace
}

// copying is one cp.
type copying struct {
	*environment
	archive, follow, quiet bool
	client                 *client.Client
}

func (c *copying) run(ctx context.Context, src, dst copyEnd) error {
	switch {
	case src.machine == "" && dst.machine == "":
		return usagef("cp: one of %s and %s must be MACHINE:PATH", src, dst)
	case src.machine != "" && dst.machine != "":
		return hint.With(usagef("cp: both ends are in machines"), "atoll cp %s - | atoll cp - %s", src, dst)
	case src.machine != "" && src.path == "" || dst.machine != "" && dst.path == "":
		return usagef("cp: the path after the machine's name is empty")
	}
	var err error
	if c.client, err = c.connect(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if src.machine != "" {
		err = c.get(ctx, src, dst.path)
	} else {
		err = c.put(ctx, cancel, src.path, dst)
	}
	if err != nil {
		return fmt.Errorf("copying %s to %s: %w", src, dst, err)
	}
	return nil
}

// get copies from a machine.
func (c *copying) get(ctx context.Context, src copyEnd, dst string) error {
	stat, err := c.stat(ctx, src)
	if err != nil {
		return err
	}
	if c.follow && stat.GetLinkTarget() != "" {
		if stat, err = c.stat(ctx, copyEnd{src.machine, stat.GetLinkTarget()}); err != nil {
			return err
		}
	}
	_, terminal := ui.Terminal(c.Stdout)
	if dst == "-" && terminal {
		return hint.With(errors.New("an archive is not for a terminal"), "redirect the output")
	}
	var dir, name string
	if dst != "-" {
		target, err := localTarget(dst)
		if err != nil {
			return err
		}
		if dir, name, err = place(copySource{isDir: isDirectory(stat), base: filetar.Base(src.path)}, target); err != nil {
			return err
		}
	}
	stream, err := c.client.Machines.GetFiles(ctx, connect.NewRequest(&atollv1.GetFilesRequest{Machine: src.machine, Path: src.path, Follow: c.follow}))
	if err != nil {
		return err
	}
	defer stream.Close()
	show := c.progress()
	defer show.close()
	r := show.reader(&messages{next: func() ([]byte, error) {
		if stream.Receive() {
			return stream.Msg().GetData(), nil
		}
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, io.EOF
	}})
	if dst == "-" {
		_, err := io.Copy(c.Stdout, r)
		return err
	}
	err = filetar.Unpack(ctx, r, dir, filetar.UnpackOptions{
		Name: name, Owners: c.archive, Trusted: c.archive, NoReplaceKind: true,
		Left: func(name, why string) { ui.Warnings(c.Stderr, []string{"left out " + name + ": " + why}) },
	})
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r) // what went wrong in the machine comes last
	return err
}

// put copies to a machine.
func (c *copying) put(ctx context.Context, cancel func(), src string, dst copyEnd) error {
	target, err := c.remoteTarget(ctx, dst)
	if err != nil {
		return err
	}
	var write func(io.Writer) error
	dir := target.path
	if src == "-" {
		if !target.isDir {
			return fmt.Errorf("%s is not a directory: %w", dst, errdefs.ErrInvalidArgument)
		}
		if _, terminal := ui.Terminal(c.Stdin); terminal {
			return hint.With(errors.New("an archive is not typed at a terminal"), "redirect the input")
		}
		write = func(w io.Writer) error { return plain(c.Stdin, w) }
	} else {
		source, err := c.localSource(src)
		if err != nil {
			return err
		}
		var name string
		if dir, name, err = place(source, target); err != nil {
			return err
		}
		write = func(w io.Writer) error {
			return filetar.Pack(w, src, filetar.PackOptions{Name: name, Follow: c.follow})
		}
	}
	stream := c.client.Machines.PutFiles(ctx)
	// Where sending fails, the answer tells why.
	_ = stream.Send(&atollv1.PutFilesRequest{Kind: &atollv1.PutFilesRequest_Start{
		Start: &atollv1.PutFilesStart{Machine: dst.machine, Path: dir, KeepOwners: c.archive},
	}})
	show := c.progress()
	defer show.close()
	sending := &sender{send: func(b []byte) error {
		return stream.Send(&atollv1.PutFilesRequest{Kind: &atollv1.PutFilesRequest_Data{Data: b}})
	}}
	w := bufio.NewWriterSize(show.writer(sending), archiveChunk)
	written := make(chan error, 1)
	go func() { written <- errors.Join(write(w), w.Flush()) }() // cannot be waited for: a read of standard input may have no end
	select {
	case err = <-written:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err != nil && !sending.failed {
		cancel() // the machine must not take what it has for the whole
		return err
	}
	_, err = stream.CloseAndReceive()
	return err
}

// sender tells a fault of sending from one of what is to be sent.
type sender struct {
	send   func([]byte) error
	failed bool
}

func (s *sender) Write(b []byte) (int, error) {
	if err := s.send(b); err != nil {
		s.failed = true
		return 0, err
	}
	return len(b), nil
}

// plain writes an archive without its compression.
func plain(r io.Reader, w io.Writer) error {
	in := bufio.NewReaderSize(r, 64<<10)
	kind, err := compression.Detect(in)
	if err != nil {
		return fmt.Errorf("reading standard input: %w", err)
	}
	content, err := kind.Open(in)
	if err != nil {
		return fmt.Errorf("reading standard input: %w", err)
	}
	_, err = io.Copy(w, content)
	return err
}

func (c *copying) stat(ctx context.Context, at copyEnd) (*atollv1.StatFileResponse, error) {
	res, err := c.client.Machines.StatFile(ctx, connect.NewRequest(&atollv1.StatFileRequest{Machine: at.machine, Path: at.path}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// The kinds of files in st_mode.
const (
	modeKind = 0o170000
	modeDir  = 0o040000
	modeReg  = 0o100000
)

func isDirectory(st *atollv1.StatFileResponse) bool { return st.GetMode()&modeKind == modeDir }

func (c *copying) remoteTarget(ctx context.Context, dst copyEnd) (copyTarget, error) {
	path := dst.path
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	t := copyTarget{path: path}
	stat, err := c.stat(ctx, copyEnd{dst.machine, path})
	if err == nil && stat.GetLinkTarget() != "" {
		t.path = stat.GetLinkTarget()
		stat, err = c.stat(ctx, copyEnd{dst.machine, t.path})
	}
	if errdefs.IsNotFound(err) {
		// A machine that is not there is not found either.
		_, err := c.client.Machines.Get(ctx, connect.NewRequest(&atollv1.GetMachineRequest{Machine: dst.machine}))
		return t, err
	}
	if err != nil {
		return t, err
	}
	t.exists, t.isDir = true, isDirectory(stat)
	if kind := stat.GetMode() & modeKind; kind != modeDir && kind != modeReg {
		return t, fmt.Errorf("%s is neither a directory nor a regular file: %w", dst, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

// localTarget follows links, the last of which need not lead to anything.
func localTarget(dst string) (copyTarget, error) {
	t := copyTarget{path: dst}
	fi, err := os.Stat(dst)
	switch {
	case err == nil && !fi.IsDir():
		if t.path, err = filepath.EvalSymlinks(dst); err != nil {
			return t, err
		}
	case errors.Is(err, fs.ErrNotExist):
		const most = 40 // as the kernel
		for range most {
			link, err := os.Readlink(strings.TrimRight(t.path, "/"))
			if err != nil {
				return t, nil
			}
			if !filepath.IsAbs(link) {
				link = filepath.Join(filepath.Dir(t.path), link)
			}
			t.path = link
		}
		return t, nil
	case err != nil:
		return t, err
	}
	t.exists, t.isDir = true, fi.IsDir()
	if !t.isDir && !fi.Mode().IsRegular() {
		return t, fmt.Errorf("%s is neither a directory nor a regular file: %w", dst, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

func (c *copying) localSource(src string) (copySource, error) {
	stat := os.Lstat
	if c.follow {
		stat = os.Stat
	}
	fi, err := stat(src)
	if err != nil {
		return copySource{}, err
	}
	abs, err := filepath.Abs(src)
	if err != nil {
		return copySource{}, err
	}
	if src == "." || strings.HasSuffix(src, "/.") {
		abs += "/."
	}
	return copySource{isDir: fi.IsDir(), base: filetar.Base(abs)}, nil
}

// messages reads the data of a stream's messages.
type messages struct {
	next func() ([]byte, error)
	rest []byte
}

func (m *messages) Read(p []byte) (n int, err error) {
	for len(m.rest) == 0 {
		if m.rest, err = m.next(); err != nil {
			return 0, err
		}
	}
	n = copy(p, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}

// progressAfter is how long a copy may take without saying anything.
const progressAfter = time.Second

// copyProgress shows how much has been copied, on a terminal, when it takes long.
type copyProgress struct {
	show  *ui.Progress
	began time.Time
	bytes int64
}

func (c *copying) progress() *copyProgress {
	p := &copyProgress{began: time.Now()}
	if _, terminal := ui.Terminal(c.Stderr); terminal && !c.quiet {
		p.show = ui.NewProgress(c.Stderr)
	}
	return p
}

func (p *copyProgress) add(n int) {
	p.bytes += int64(n)
	if p.show != nil && time.Since(p.began) > progressAfter {
		p.show.Update(ui.Transfer{ID: "copying", Done: p.bytes})
	}
}

func (p *copyProgress) close() {
	if p.show != nil && time.Since(p.began) > progressAfter {
		p.show.Close()
	}
}

func (p *copyProgress) reader(r io.Reader) io.Reader { return io.TeeReader(r, counter(p.add)) }

func (p *copyProgress) writer(w io.Writer) io.Writer { return io.MultiWriter(w, counter(p.add)) }

type counter func(int)

func (c counter) Write(b []byte) (int, error) { c(len(b)); return len(b), nil }
