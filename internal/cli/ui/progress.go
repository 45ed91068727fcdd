package ui

import (
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/term"
)

// Transfer is how far one blob or step has come.
type Transfer struct {
	ID     string
	Status string
	Done   int64
	Total  int64 // 0: not known
}

// Progress shows transfers: bars that are drawn anew on a terminal, one line for each change of status elsewhere.
// A nil one shows nothing. Not safe for concurrent use.
type Progress struct {
	w     io.Writer
	fd    int
	bars  bool
	now   func() time.Time
	order []string
	last  map[string]Transfer

	closed  bool
	drawn   int // lines on the terminal that the next drawing replaces
	drawnAt time.Time
}

// redraw is often enough to look alive, and seldom enough not to slow a fast pull.
const redraw = 100 * time.Millisecond

// NewProgress returns a Progress on w.
func NewProgress(w io.Writer) *Progress {
	fd, bars := Terminal(w)
	return &Progress{w: w, fd: fd, bars: bars, now: time.Now, last: map[string]Transfer{}}
}

// Update takes the newest state of a transfer.
func (p *Progress) Update(t Transfer) {
	if p == nil {
		return
	}
	before, known := p.last[t.ID]
	if !known {
		p.order = append(p.order, t.ID)
	}
	p.last[t.ID] = t
	changed := !known || before.Status != t.Status
	switch {
	case !p.bars && changed:
		fmt.Fprintln(p.w, plain(t))
	case p.bars && (changed || p.now().Sub(p.drawnAt) >= redraw):
		p.draw()
	}
}

// Line prints a line of a tool's output above what is drawn.
func (p *Progress) Line(text string) {
	if p == nil {
		return
	}
	p.clear()
	fmt.Fprintln(p.w, text)
	if p.bars {
		p.draw()
	}
}

// Close leaves the last state on the screen. It may be called again.
func (p *Progress) Close() {
	if p == nil || p.closed {
		return
	}
	p.closed = true
	if p.bars {
		p.draw()
	}
}

func (p *Progress) clear() {
	if p.drawn > 0 {
		fmt.Fprintf(p.w, "\x1b[%dA\x1b[J", p.drawn)
		p.drawn = 0
	}
}

func (p *Progress) draw() {
	width, height := 80, 24
	if w, h, err := term.GetSize(p.fd); err == nil && w > 0 && h > 0 {
		width, height = w, h
	}
	p.clear()
	// More lines than the screen has could not be drawn over: the newest are shown.
	ids := p.order[max(0, len(p.order)-(height-1)):]
	for _, id := range ids {
		fmt.Fprintln(p.w, Ellipsis(bar(p.last[id]), width-1))
	}
	p.drawn, p.drawnAt = len(ids), p.now()
}

func plain(t Transfer) string {
	s := name(t.ID) + ": " + t.Status
	if t.Total > 0 {
		s += " (" + Size(t.Total) + ")"
	}
	return s
}

func bar(t Transfer) string {
	s := fmt.Sprintf("%-14s %-12s", name(t.ID), t.Status)
	switch {
	case t.Total > 0 && t.Done < t.Total:
		const cells = 24
		full := int(max(t.Done, 0) * cells / t.Total)
		s += fmt.Sprintf(" [%s%s] %s / %s", strings.Repeat("=", full), strings.Repeat(" ", cells-full), Size(t.Done), Size(t.Total))
	case t.Total > 0:
		s += " " + Size(t.Total)
	case t.Done > 0:
		s += " " + Size(t.Done)
	}
	return strings.TrimRight(s, " ")
}

// name is a digest as tables show it; a step's name stays whole.
func name(id string) string {
	if strings.HasPrefix(id, "sha256:") || strings.HasPrefix(id, "sha512:") {
		return Short(id)
	}
	return id
}
