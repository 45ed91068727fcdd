package cli

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

const referenceFile = "../../docs/reference/cli.md"

// TestReference holds docs/reference/cli.md to the commands' own help; UPDATE=1 writes it anew.
func TestReference(t *testing.T) {
	var b bytes.Buffer
	b.WriteString("# atoll: the commands\n\nMade from the commands' help by `UPDATE=1 go test ./internal/cli -run TestReference`.\n")
	describe(&b, newRootCmd(&environment{}))
	if os.Getenv("UPDATE") != "" {
		if err := os.MkdirAll("../../docs/reference", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(referenceFile, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Errorf("%s is not what the commands say; write it with UPDATE=1", referenceFile)
	}
}

func describe(b *bytes.Buffer, cmd *cobra.Command) {
	if cmd.Hidden || cmd.Name() == "help" || cmd.Name() == "completion" {
		return
	}
	cmd.InitDefaultHelpFlag()
	text := cmd.Long
	if text == "" {
		text = cmd.Short + "."
	}
	fmt.Fprintf(b, "\n## %s\n\n%s\n\n```\n%s\n```\n", cmd.CommandPath(), text, cmd.UseLine())
	if cmd.Example != "" {
		fmt.Fprintf(b, "\nExample:\n\n```\n%s\n```\n", strings.TrimRight(cmd.Example, "\n"))
	}
	if flags := cmd.LocalFlags().FlagUsages(); strings.TrimSpace(flags) != "" && cmd.Runnable() {
		fmt.Fprintf(b, "\n```\n%s```\n", flags)
	}
	for _, c := range cmd.Commands() {
		describe(b, c)
	}
}
