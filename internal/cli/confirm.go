package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
)

// confirm asks before something is lost. No answer is no.
func (e *environment) confirm(what string) bool {
	fmt.Fprintf(e.Stderr, "WARNING! %s\nAre you sure you want to continue? [y/N] ", what)
	answer, err := bufio.NewReader(io.LimitReader(e.Stdin, 100)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return false
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return true
	}
	fmt.Fprintln(e.Stderr, "nothing was removed")
	return false
}
