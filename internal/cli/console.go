package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/cli/ui"
)

const defaultEscape = "^]"

func newConsoleCmd(e *environment) *cobra.Command {
	escape := defaultEscape
	cmd := &cobra.Command{
		Use:   "console [OPTIONS] MACHINE",
		Short: "Join a machine's serial console",
		Long: `Join the serial console of a running machine, as with a cable: the last lines
that its kernel and its system wrote there, and what follows. What is typed
goes to the console as it is, Ctrl-C too; Ctrl-] leaves. Without a terminal,
standard input is typed, and its end does not leave.

A machine of a disk image usually asks for a login there, and so does an image
that runs its own init with a getty on ttyS0. Other images read nothing from
it: use "atoll exec -it" for a shell and "atoll attach" for the entrypoint.
Several may watch; of those that type, the first keeps others from it until it
leaves. All output is also in "atoll logs --boot".`,
		Example:           `  atoll console debian`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeMachines(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := parseEscape(escape)
			if err != nil {
				return err
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			return e.console(cmd.Context(), c, args[0], key)
		},
	}
	cmd.Flags().StringVar(&escape, "escape", escape, "`KEY` that leaves a terminal: a character, ^ and one for Ctrl, or none")
	return cmd
}

// parseEscape returns the byte that leaves, or 0 for none.
func parseEscape(text string) (byte, error) {
	switch {
	case text == "none":
		return 0, nil
	case len(text) == 1 && text[0] < 0x7f:
		return text[0], nil
	case len(text) == 2 && text[0] == '^':
		if c := strings.ToUpper(text[1:])[0]; c > '@' && c <= '_' {
			return c & 0x1f, nil
		}
	}
	return 0, usagef("--escape %q: want a character such as ~, or ^ and a letter or one of [ \\ ] ^ _, or none", text)
}

// console carries bytes between the terminal, or the streams, and the machine's console until the machine stops or the user leaves.
func (e *environment) console(ctx context.Context, c *client.Client, machine string, escape byte) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := c.Machines.Console(ctx)
	// Where sending fails, receiving tells why.
	_ = stream.Send(&atollv1.ConsoleRequest{Kind: &atollv1.ConsoleRequest_Start{Start: &atollv1.ConsoleStart{Machine: machine}}})
	if _, err := receive(stream.Receive); err != nil { // joined
		return err
	}
	if fd, ok := ui.Terminal(e.Stdin); ok {
		if escape != 0 {
			fmt.Fprintf(e.Stderr, "The serial console of %s; %s leaves it\n", machine, keyName(escape))
		}
		old, err := term.MakeRaw(fd)
		if err != nil {
			return fmt.Errorf("putting the terminal in raw mode: %w", err)
		}
		defer func() {
			_ = term.Restore(fd, old)
			fmt.Fprintln(e.Stderr)
		}()
	} else {
		escape = 0
	}
	left, over := make(chan struct{}), make(chan error, 1)
	go func() { // cannot be waited for: a read of a terminal has no end
		if typeInto(e.Stdin, escape, func(p []byte) error {
			return stream.Send(&atollv1.ConsoleRequest{Kind: &atollv1.ConsoleRequest_Input{Input: p}})
		}) {
			close(left)
		}
	}()
	go func() { over <- e.showConsole(stream) }()
	select {
	case err := <-over:
		if err != nil {
			return err
		}
		fmt.Fprintf(e.Stderr, "\r\nMachine %s has stopped\r\n", machine)
		return nil
	case <-left:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *environment) showConsole(stream *connect.BidiStreamForClient[atollv1.ConsoleRequest, atollv1.ConsoleResponse]) error {
	for {
		m, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if isBroken(err) {
			return errDisconnected
		}
		if err != nil {
			return err
		}
		if _, err := e.Stdout.Write(m.GetOutput()); err != nil {
			return fmt.Errorf("writing output: %w", err)
		}
	}
}

// typeInto sends what is read until there is no more, and says whether the escape key ended it.
func typeInto(in io.Reader, escape byte, send func([]byte) error) (left bool) {
	buf := make([]byte, 4<<10)
	for {
		n, err := in.Read(buf)
		p := buf[:n]
		if escape != 0 {
			if at := bytes.IndexByte(p, escape); at >= 0 {
				p, left = p[:at], true
			}
		}
		if len(p) > 0 && send(bytes.Clone(p)) != nil {
			return left
		}
		if left || err != nil {
			return left
		}
	}
}

func keyName(key byte) string {
	if key < ' ' {
		return "Ctrl-" + string(rune(key|'@'))
	}
	return string(rune(key))
}
