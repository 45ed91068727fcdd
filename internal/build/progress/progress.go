// Package progress prints a build's progress as Docker does. It knows nothing of how a build is run: what it gets is BuildKit's
// SolveStatus as JSON, one value per message. Imported by the CLI, on every platform. A Printer is used by one goroutine.
package progress

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress/progressui"
)

// Printer draws statuses on a writer.
type Printer struct {
	statuses chan *client.SolveStatus
	done     chan error
}

// NewPrinter returns a printer for mode: auto (tty when w is a terminal, else plain), plain, tty, quiet or rawjson.
func NewPrinter(w io.Writer, mode string) (*Printer, error) {
	display, err := progressui.NewDisplay(w, progressui.DisplayMode(mode))
	if err != nil {
		return nil, fmt.Errorf("progress mode %q: %v: %w", mode, err, errdefs.ErrInvalidArgument)
	}
	p := &Printer{statuses: make(chan *client.SolveStatus), done: make(chan error, 1)}
	go func() {
		_, err := display.UpdateFrom(context.Background(), p.statuses)
		p.done <- err
	}()
	return p, nil
}

// Write shows one status.
func (p *Printer) Write(statusJSON []byte) error {
	var s client.SolveStatus
	if err := json.Unmarshal(statusJSON, &s); err != nil {
		return fmt.Errorf("reading a build status: %w", err)
	}
	p.statuses <- &s
	return nil
}

// Close draws what is left and waits for it. Nothing may be written afterwards.
func (p *Printer) Close() error {
	close(p.statuses)
	return <-p.done
}
