// Package progress prints a build's progress as Docker does. It knows nothing of how a build is run: what it gets is BuildKit's
// SolveStatus as JSON, one value per message. Imported by the CLI, on every platform. A Printer is used by one goroutine.
package progress

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress/progressui"
)

// Printer draws statuses on a writer.
type Printer struct {
	w        io.Writer
	raw      bool
	quiet    bool
	warnings []*client.VertexWarning
	statuses chan *client.SolveStatus
	done     chan error
}

// NewPrinter returns a printer for mode: auto (tty when w is a terminal, else plain), plain, tty, quiet or rawjson. The warnings of a
// build come at its end in all of them but quiet and rawjson, which has them as they come.
func NewPrinter(w io.Writer, mode string) (*Printer, error) {
	p := &Printer{w: w, raw: mode == string(progressui.RawJSONMode), quiet: mode == string(progressui.QuietMode), statuses: make(chan *client.SolveStatus), done: make(chan error, 1)}
	display, err := newDisplay(w, progressui.DisplayMode(mode))
	if err != nil {
		return nil, fmt.Errorf("progress mode %q: %v: %w", mode, err, errdefs.ErrInvalidArgument)
	}
	go func() {
		_, err := display.UpdateFrom(context.Background(), p.statuses)
		p.done <- err
	}()
	return p, nil
}

func newDisplay(w io.Writer, mode progressui.DisplayMode) (progressui.Display, error) {
	switch mode {
	case progressui.AutoMode:
		if d, err := progressui.NewDisplay(w, progressui.TtyMode); err == nil {
			return d, nil
		}
		mode = progressui.PlainMode
		fallthrough
	case progressui.PlainMode:
		w = &onceWriter{w: w}
	}
	return progressui.NewDisplay(w, mode)
}

// Write shows one status.
func (p *Printer) Write(statusJSON []byte) error {
	var s client.SolveStatus
	if err := json.Unmarshal(statusJSON, &s); err != nil {
		return fmt.Errorf("reading a build status: %w", err)
	}
	if !p.raw {
		p.warnings = append(p.warnings, s.Warnings...)
		s.Warnings = nil
	}
	p.statuses <- &s
	return nil
}

// Close draws what is left and waits for it. Nothing may be written afterwards.
func (p *Printer) Close() error {
	close(p.statuses)
	if err := <-p.done; err != nil {
		return err
	}
	if p.quiet {
		return nil
	}
	return p.printWarnings()
}

func (p *Printer) printWarnings() error {
	var text strings.Builder
	seen := map[string]bool{}
	for _, w := range p.warnings {
		// BuildKit's own text begins with the rule's name and ends with the line.
		line := string(w.Short)
		if seen[line] {
			continue
		}
		seen[line] = true
		fmt.Fprintf(&text, " - %s\n", line)
		if w.URL != "" {
			fmt.Fprintf(&text, "   %s\n", w.URL)
		}
	}
	if len(seen) == 0 {
		return nil
	}
	plural := "s"
	if len(seen) == 1 {
		plural = ""
	}
	_, err := fmt.Fprintf(p.w, "\n %d warning%s found:\n%s", len(seen), plural, text.String())
	return err
}

// onceWriter leaves out the block between two lines of dashes in which the plain display repeats, at its end, the output of steps that
// failed: it has been shown as it came. The display writes each of these lines by one call, and no other line is only dashes.
type onceWriter struct {
	w       io.Writer
	leaving bool
}

func (o *onceWriter) Write(p []byte) (int, error) {
	if string(p) == "------\n" {
		o.leaving = !o.leaving
		return len(p), nil
	}
	if o.leaving {
		return len(p), nil
	}
	return o.w.Write(p)
}
