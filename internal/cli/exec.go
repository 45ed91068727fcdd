package cli

import (
	"context"
	"errors"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func newExecCmd(e *environment) *cobra.Command {
	start := &atollv1.ExecStart{}
	var env, envFiles []string
	var keys string
	cmd := &cobra.Command{
		Use:   "exec [OPTIONS] MACHINE COMMAND [ARG...]",
		Short: "Run a command in a running machine",
		Long: `Run a command in a running machine, word for word: no shell looks at it.

Its environment is the machine's, with what --env-file and --env add. At a
terminal ctrl-p ctrl-q leaves the command, which runs on.

The exit code is the command's own, 128+n when signal n ended it; 126 when it
could not be executed, 127 when it was not found, 125 when Atoll failed.`,
		Example: `  atoll exec web uname -r
  atoll exec -it web sh
  echo hello | atoll exec -i web tee /tmp/greeting`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: e.completeMachines(1),
		RunE: guestCode(func(cmd *cobra.Command, args []string) error {
			if err := e.checkTerminal(start.Stdin && !start.Detach, start.Tty); err != nil {
				return err
			}
			detachKeys, err := parseDetachKeys(keys)
			if err != nil {
				return err
			}
			if start.Env, err = e.allEnviron(envFiles, env); err != nil {
				return err
			}
			start.Machine, start.Argv = args[0], args[1:]
			return e.exec(cmd.Context(), start, detachKeys)
		}),
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&start.Stdin, "interactive", "i", false, "send standard input")
	f.BoolVarP(&start.Tty, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&start.Detach, "detach", "d", false, "do not wait for the command")
	f.StringVarP(&start.User, "user", "u", "", "user and group: `NAME|UID[:GROUP|GID]`")
	f.StringVarP(&start.WorkingDir, "workdir", "w", "", "working directory")
	f.StringArrayVarP(&env, "env", "e", nil, "set an environment variable: `KEY=VALUE`, or KEY to take it from here")
	f.StringArrayVar(&envFiles, "env-file", nil, "read environment variables from a `FILE` of KEY=VALUE lines")
	addDetachKeys(cmd, &keys)
	return cmd
}

func (e *environment) exec(ctx context.Context, start *atollv1.ExecStart, detachKeys []byte) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := c.Machines.Exec(ctx)
	if start.Detach {
		start.Stdin = false
	}
	if start.Tty {
		start.Size = e.terminalSize()
	}
	// Where sending fails, receiving tells why.
	_ = stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Start{Start: start}})
	s := &session{env: e, stdin: start.Stdin, tty: start.Tty && !start.Detach, keys: detachKeys, transmit: func(in input) error {
		switch {
		case in.close:
			return stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_CloseStdin{CloseStdin: true}})
		case in.size != nil:
			return stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Resize{Resize: in.size}})
		case in.name != "":
			return stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Signal{Signal: in.name}})
		}
		return stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Stdin{Stdin: in.data}})
	}}
	s.signal = func(name string) error { return s.send(input{name: name}) }
	s.leave = func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		return stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Detach{Detach: true}})
	}
	result := make(chan outcome, 1)
	go func() { result <- e.copyExec(stream, start.Detach) }()
	o := s.interact(ctx, result)
	if o.code != 0 {
		return &exitError{o.code, o.err}
	}
	return o.err
}

func (e *environment) copyExec(stream *connect.BidiStreamForClient[atollv1.ExecRequest, atollv1.ExecResponse], detach bool) outcome {
	var failure error
	for {
		m, err := receive(stream.Receive)
		if err != nil {
			return outcome{err: err}
		}
		switch k := m.GetKind().(type) {
		case *atollv1.ExecResponse_Started:
			if detach {
				return outcome{}
			}
		case *atollv1.ExecResponse_Stdout:
			_, err = e.Stdout.Write(k.Stdout)
		case *atollv1.ExecResponse_Stderr:
			_, err = e.Stderr.Write(k.Stderr)
		case *atollv1.ExecResponse_Failure:
			failure = errors.New(k.Failure)
		case *atollv1.ExecResponse_ExitCode:
			return outcome{code: int(k.ExitCode), err: failure}
		}
		if err != nil {
			return outcome{err: err}
		}
	}
}

// guestCode gives what Atoll itself fails at the code 125, which no guest's command should have.
func guestCode(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		exit, usage := (*exitError)(nil), usageError{}
		if err == nil || errors.As(err, &exit) || errors.As(err, &usage) {
			return err
		}
		return &exitError{125, err}
	}
}
