package cli

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/hint"
)

func newAttachCmd(e *environment) *cobra.Command {
	var noStdin bool
	var who presence
	cmd := &cobra.Command{
		Use:   "attach [OPTIONS] MACHINE",
		Short: "Join the terminal or streams of a machine's entrypoint",
		Long: `Join the terminal or the streams of a running machine's entrypoint. What it
wrote before is in "atoll logs". Several may be attached at once. Signals go to
the entrypoint; the exit code is its own. At a terminal ctrl-p ctrl-q leaves the
machine, which runs on.`,
		Example:           `  atoll attach web`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeMachines(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			var err error
			if who.keys, err = parseDetachKeys(who.keyNames); err != nil {
				return err
			}
			c, err := e.connect(ctx)
			if err != nil {
				return err
			}
			res, err := c.Machines.Get(ctx, connect.NewRequest(&atollv1.GetMachineRequest{Machine: args[0]}))
			if err != nil {
				return err
			}
			m := res.Msg.GetMachine()
			if !live(m) {
				return hint.With(fmt.Errorf("attaching to machine %q: it is %s: %w", args[0], stateName(m.GetState()), errdefs.ErrFailedPrecondition),
					"atoll start %s", args[0])
			}
			stdin := m.GetSpec().GetStdin() && !noStdin
			if err := e.checkTerminal(stdin, m.GetSpec().GetTty()); err != nil {
				return err
			}
			a, err := e.openAttach(ctx, c, m.GetId(), stdin, m.GetSpec().GetTty())
			if err != nil {
				return err
			}
			defer a.close()
			a.take(who)
			return runsOn(m, a.wait(ctx))
		},
	}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not send standard input")
	addSigProxy(cmd, &who.sigProxy)
	addDetachKeys(cmd, &who.keyNames)
	return cmd
}

func addSigProxy(cmd *cobra.Command, on *bool) {
	cmd.Flags().BoolVar(on, "sig-proxy", true, "without a terminal, send signals such as that of Ctrl-C to the entrypoint; else they end this command only")
}

// runsOn tells that a daemon which went has not taken its machine along.
func runsOn(m *atollv1.Machine, err error) error {
	if errors.Is(err, errDisconnected) || errdefs.IsUnavailable(err) {
		return hint.With(fmt.Errorf("machine %q runs on: %w", m.GetSpec().GetName(), err), "atoll attach %s", m.GetSpec().GetName())
	}
	return err
}

// attachment is an open Attach stream whose output is being copied.
type attachment struct {
	session
	close  context.CancelFunc
	result chan outcome
}

// take has somebody take part in the way asked for.
func (a *attachment) take(who presence) {
	a.keys = who.keys
	if !who.sigProxy {
		a.signal = nil
	}
}

// openAttach joins the machine's entrypoint; when it returns, nothing that the entrypoint writes is missed.
func (e *environment) openAttach(ctx context.Context, c *client.Client, machine string, stdin, tty bool) (*attachment, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream := c.Machines.Attach(ctx)
	a := &attachment{close: cancel, result: make(chan outcome, 1)}
	a.session = session{
		env: e, stdin: stdin, tty: tty,
		// Not by the stream, where it would wait behind input that the guest does not read.
		signal: func(name string) error {
			_, err := c.Machines.Kill(ctx, connect.NewRequest(&atollv1.KillMachineRequest{Machine: machine, Signal: name}))
			return err
		},
		transmit: func(in input) error {
			switch {
			case in.close:
				return stream.Send(&atollv1.AttachRequest{Kind: &atollv1.AttachRequest_CloseStdin{CloseStdin: true}})
			case in.size != nil:
				return stream.Send(&atollv1.AttachRequest{Kind: &atollv1.AttachRequest_Resize{Resize: in.size}})
			}
			return stream.Send(&atollv1.AttachRequest{Kind: &atollv1.AttachRequest_Stdin{Stdin: in.data}})
		},
	}
	start := &atollv1.AttachStart{Machine: machine, Stdin: stdin}
	if tty {
		start.Size = e.terminalSize()
	}
	// Where sending fails, receiving tells why.
	_ = stream.Send(&atollv1.AttachRequest{Kind: &atollv1.AttachRequest_Start{Start: start}})
	if _, err := receive(stream.Receive); err != nil { // attached
		cancel()
		return nil, fmt.Errorf("attaching to machine %q: %w", machine, err)
	}
	go func() { a.result <- a.copyOutput(stream) }()
	return a, nil
}

func (a *attachment) copyOutput(stream *connect.BidiStreamForClient[atollv1.AttachRequest, atollv1.AttachResponse]) outcome {
	for {
		m, err := receive(stream.Receive)
		if err != nil {
			return outcome{err: err}
		}
		switch k := m.GetKind().(type) {
		case *atollv1.AttachResponse_Stdout:
			_, err = a.env.Stdout.Write(k.Stdout)
		case *atollv1.AttachResponse_Stderr:
			_, err = a.env.Stderr.Write(k.Stderr)
		case *atollv1.AttachResponse_Exit:
			o := outcome{code: int(k.Exit.GetExitCode())}
			if text := k.Exit.GetError(); text != "" {
				o.err = fmt.Errorf("%s", text)
			}
			return o
		}
		if err != nil {
			return outcome{err: fmt.Errorf("writing output: %w", err)}
		}
	}
}

// wait lets the user work until the entrypoint ends; the error carries its exit code.
func (a *attachment) wait(ctx context.Context) error {
	o := a.interact(ctx, a.result)
	switch {
	case o.err == nil && o.code == 0:
		return nil
	case o.code != 0:
		return &exitError{o.code, o.err}
	}
	return o.err
}
