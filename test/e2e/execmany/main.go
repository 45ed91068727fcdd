// Command execmany MACHINE N M runs true N times one after another, then M times at once, by the daemon's API.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "execmany:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: execmany MACHINE N M")
	}
	row, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	atOnce, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	c, err := client.New("unix://" + filepath.Join(os.Getenv("ATOLL_HOME"), "atoll.sock"))
	if err != nil {
		return err
	}
	for i := range row {
		if err := once(c, args[0]); err != nil {
			return fmt.Errorf("command %d: %w", i, err)
		}
	}
	ended := make(chan error, atOnce)
	for range atOnce {
		go func() { ended <- once(c, args[0]) }()
	}
	for range atOnce {
		err = errors.Join(err, <-ended)
	}
	return err
}

func once(c *client.Client, machine string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := c.Machines.Exec(ctx)
	start := &atollv1.ExecStart{Machine: machine, Argv: []string{"true"}}
	if err := s.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Start{Start: start}}); err != nil {
		return err
	}
	for {
		res, err := s.Receive()
		if err != nil {
			return err
		}
		if x, ok := res.GetKind().(*atollv1.ExecResponse_ExitCode); ok {
			if x.ExitCode != 0 {
				return fmt.Errorf("exit code %d", x.ExitCode)
			}
			return nil
		}
	}
}
