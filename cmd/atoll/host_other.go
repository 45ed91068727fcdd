//go:build !linux

package main

import "github.com/spf13/cobra"

// hostCommands: machines run on Linux hosts only; elsewhere atoll is a client.
func hostCommands(string) []*cobra.Command { return nil }
