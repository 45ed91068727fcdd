// Package ui is how the command line looks: tables, formats, progress, errors. Results are written to the writer that the caller
// gives; nothing here talks to the daemon. Imported by cli only.
package ui

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/term"

	"github.com/atollvm/atoll/internal/hint"
)

// Terminal returns the descriptor of a reader or writer that is a terminal.
func Terminal(stream any) (fd int, ok bool) {
	f, ok := stream.(interface{ Fd() uintptr })
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	return int(f.Fd()), true
}

// Error prints err, and its hint where it has one. An error made by errors.Join is printed part by part.
func Error(w io.Writer, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok && isJoin(err, joined.Unwrap()) {
		for _, e := range joined.Unwrap() {
			Error(w, e)
		}
		return
	}
	fmt.Fprintf(w, "Error: %s\n", strings.TrimRight(err.Error(), "\n"))
	if h := hint.Of(err); h != "" {
		fmt.Fprintf(w, "Hint: %s\n", h)
	}
}

// isJoin tells errors.Join's list of equals from an error that has several causes in one sentence.
func isJoin(err error, parts []error) bool {
	texts := make([]string, len(parts))
	for i, p := range parts {
		texts[i] = p.Error()
	}
	return err.Error() == strings.Join(texts, "\n")
}

// Warnings prints each different text once.
func Warnings(w io.Writer, texts []string) {
	seen := map[string]bool{}
	for _, t := range texts {
		if !seen[t] {
			fmt.Fprintf(w, "Warning: %s\n", t)
		}
		seen[t] = true
	}
}

// Size is a number of bytes for people, in binary units.
func Size(n int64) string {
	return units.CustomSize("%.4g%s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"})
}

// Ago is how long before now t was, or nothing for no time.
func Ago(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(now.Sub(t)) + " ago"
}

// Short is an ID or digest as tables show it.
func Short(id string) string {
	if _, hex, found := strings.Cut(id, ":"); found {
		id = hex
	}
	return id[:min(12, len(id))]
}

// Ellipsis cuts s to at most n characters.
func Ellipsis(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}
