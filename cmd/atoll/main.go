// Command atoll is the one binary: the CLI, the daemon that it starts, and the daemon's helper processes.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/atollvm/atoll/internal/cli"
)

// Set by the linker; see the Makefile.
var (
	version = "dev"
	commit  = ""
)

func main() {
	exe, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error: finding the path of this program:", err)
		os.Exit(1)
	}
	os.Exit(cli.Main(context.Background(), os.Args[1:], cli.Env{
		Stdin:     os.Stdin,
		Stdout:    os.Stdout,
		Stderr:    os.Stderr,
		LookupEnv: os.LookupEnv,
		Version:   cli.Version{Version: version, Commit: commit},
		DaemonCmd: []string{exe, "daemon"},
		Extra:     hostCommands(exe),
	}))
}
