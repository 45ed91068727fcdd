package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

func newLogsCmd(e *environment) *cobra.Command {
	var follow, timestamps, boot, provisioning bool
	var tail, since, until string
	cmd := &cobra.Command{
		Use:   "logs [OPTIONS] MACHINE",
		Short: "Show what a machine's entrypoint has written",
		Long: `Show what a machine's entrypoint has written, also after it has stopped: its
stdout on stdout and its stderr on stderr. --boot shows the serial console
instead, with what the kernel and the agent say; --provisioning what user-data
and the package manager wrote when the machine was set up.

--follow goes on until the machine stops; over a restart of the machine, and
over one of the daemon.`,
		Example: `  atoll logs -f --since 10m web
  atoll logs --since 2026-01-15T12:00:00 --until 2026-01-15T13:00:00 web
  atoll logs --boot -n 20 web
  atoll logs --provisioning web`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeMachines(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &atollv1.LogsRequest{Machine: args[0], Follow: follow, Boot: boot, Provisioning: provisioning}
			if provisioning && (follow || boot || timestamps || since != "" || until != "") {
				return usagef("--provisioning goes with --tail only")
			}
			if boot && (timestamps || since != "" || until != "") {
				return usagef("--boot goes with --follow and --tail only: the console has no times")
			}
			var err error
			if req.Tail, req.TailAll, err = parseTail(tail); err != nil {
				return err
			}
			if req.Since, err = parseTime("since", since, e.now()); err != nil {
				return err
			}
			if req.Until, err = parseTime("until", until, e.now()); err != nil {
				return err
			}
			return e.logs(cmd.Context(), req, timestamps)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on until the machine stops")
	f.StringVarP(&tail, "tail", "n", "all", "only the last `N` lines")
	f.BoolVarP(&timestamps, "timestamps", "t", false, "begin each line with its time")
	f.StringVar(&since, "since", "", "only from then on: a time (2006-01-02T15:04:05Z), seconds since 1970, or a duration (10m)")
	f.StringVar(&until, "until", "", "only up to then, written as for --since")
	f.BoolVar(&boot, "boot", false, "the serial console instead of the entrypoint's output")
	f.BoolVar(&provisioning, "provisioning", false, "what was written when the machine was set up instead")
	return cmd
}

func (e *environment) logs(ctx context.Context, req *atollv1.LogsRequest, timestamps bool) error {
	stdout, stderr := &stamper{w: e.Stdout, on: timestamps}, &stamper{w: e.Stderr, on: timestamps}
	show := func(r *atollv1.LogsResponse) error {
		w := stdout
		if r.GetStream() == atollv1.Stream_STREAM_STDERR {
			w = stderr
		}
		if r.GetSeq() > 0 {
			req.AfterBoot, req.AfterSeq, req.TailAll = r.GetBoot(), r.GetSeq(), true
		}
		return w.write(clock(r.GetTime()), r.GetData())
	}
	for {
		c, err := e.connect(ctx)
		if err != nil {
			return err
		}
		stream, err := c.Machines.Logs(ctx, connect.NewRequest(req))
		if err == nil {
			err = each(stream, show)
		}
		if err == nil || !req.GetFollow() || req.GetBoot() || req.GetProvisioning() || !isBroken(err) && !errdefs.IsUnavailable(err) {
			return err
		}
		if err := e.awaitDaemon(ctx); err != nil {
			return err
		}
	}
}

// daemonAway is how long a command that follows waits for a daemon that has ended. It starts none: somebody may have ended that on purpose.
const daemonAway = time.Minute

func (e *environment) awaitDaemon(ctx context.Context) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	ui.Warnings(e.Stderr, []string{"the daemon has ended; going on when it runs again"})
	e.client.Close()
	e.client = nil
	ctx, cancel := context.WithTimeoutCause(ctx, daemonAway,
		hint.With(fmt.Errorf("%w, and was not started again for %s", errDisconnected, daemonAway), "any command starts it, such as atoll ps"))
	defer cancel()
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for listening(ctx, cfg.Host) != nil {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func parseTail(s string) (n int64, all bool, err error) {
	if s == "all" {
		return -1, true, nil
	}
	n, err = strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, false, usagef("--tail %q: want a number or all", s)
	}
	return n, n < 0, nil
}

// parseTime reads the value of --since or --until.
func parseTime(flag, s string, now time.Time) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return timestamppb.New(now.Add(-d)), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return timestamppb.New(t), nil
	}
	for _, layout := range []string{"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return timestamppb.New(t), nil
		}
	}
	if f, err := strconv.ParseFloat(s, 64); err == nil {
		return timestamppb.New(time.UnixMicro(int64(f * 1e6))), nil
	}
	return nil, usagef("--%s %q: want a time such as 2006-01-02T15:04:05Z, or a duration such as 10m", flag, s)
}

// stamper puts the time before each line.
type stamper struct {
	w    io.Writer
	on   bool
	open bool // the last line has not ended
}

func (s *stamper) write(at time.Time, data []byte) error {
	if !s.on {
		_, err := s.w.Write(data)
		return err
	}
	for line := range bytes.Lines(data) {
		if !s.open {
			// RFC3339Nano with all nine digits, so that lines stay aligned.
			if _, err := fmt.Fprint(s.w, at.UTC().Format("2006-01-02T15:04:05.000000000Z07:00 ")); err != nil {
				return err
			}
		}
		if _, err := s.w.Write(line); err != nil {
			return err
		}
		s.open = !bytes.HasSuffix(line, []byte("\n"))
	}
	return nil
}

// each hands the messages of a stream to do until the stream or do ends it.
func each[T any](stream *connect.ServerStreamForClient[T], do func(*T) error) error {
	defer stream.Close()
	for stream.Receive() {
		if err := do(stream.Msg()); err != nil {
			return err
		}
	}
	return stream.Err()
}
