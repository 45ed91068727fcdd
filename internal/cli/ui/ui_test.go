package ui

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
)

type row struct {
	ID    string `json:"id"`
	Count int    `json:"count"`
}

var (
	columns = []Column[row]{
		{"ID", func(r row) string { return r.ID }},
		{"COUNT", func(r row) string { return fmt.Sprint(r.Count) }},
	}
	rows = []row{{"a&b", 1}, {"longer than its title", 22}}
)

func TestFormats(t *testing.T) {
	list := func(format string, rows []row) func(io.Writer) error {
		return func(w io.Writer) error { return List(w, format, columns, rows) }
	}
	tests := []struct {
		name  string
		print func(io.Writer) error
		want  string
	}{
		{"table", list("table", rows), "ID                      COUNT\na&b                     1\nlonger than its title   22\n"},
		{"empty table", list("", nil), "ID   COUNT\n"},
		{"template", list(`{{.ID}}\t{{.Count}}`, rows), "a&b\t1\nlonger than its title\t22\n"},
		{"functions", list(`{{json .}} {{upper .ID}}`, rows[:1]), "{\"id\":\"a&b\",\"count\":1} A&B\n"},
		{"json", list("json", rows[:1]), "[\n    {\n        \"id\": \"a&b\",\n        \"count\": 1\n    }\n]\n"},
		{"no json", list("json", nil), "[]\n"},
		{"inspect", func(w io.Writer) error { return Inspect(w, "", rows[:1]) }, "[\n    {\n        \"id\": \"a&b\",\n        \"count\": 1\n    }\n]\n"},
		{"json lines", func(w io.Writer) error { return Each(w, "json", rows) }, "{\"id\":\"a&b\",\"count\":1}\n{\"id\":\"longer than its title\",\"count\":22}\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b strings.Builder
			if err := tt.print(&b); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, b.String()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestBadFormats(t *testing.T) {
	for _, format := range []string{"yaml", "{{.ID", "{{.Nope}}"} {
		err := List(io.Discard, format, columns, rows)
		if !errdefs.IsInvalidArgument(err) || hint.Of(err) == "" {
			t.Errorf("%s: %v, hint %q", format, err, hint.Of(err))
		}
		if got := CheckFormat(format); (got == nil) != (format == "{{.Nope}}") {
			t.Errorf("CheckFormat(%s) = %v", format, got)
		}
	}
}

func TestError(t *testing.T) {
	a := hint.With(errors.New("starting machine \"a\": no KVM"), "load it")
	sentence := fmt.Errorf("removing: %w: %w", errors.New("b"), errdefs.ErrNotFound)
	tests := []struct {
		err  error
		want string
	}{
		{a, "Error: starting machine \"a\": no KVM\nHint: load it\n"},
		{fmt.Errorf("outer: %w", a), "Error: outer: starting machine \"a\": no KVM\nHint: load it\n"},
		{sentence, "Error: removing: b: not found\n"},
		{errors.Join(a, sentence), "Error: starting machine \"a\": no KVM\nHint: load it\nError: removing: b: not found\n"},
	}
	for _, tt := range tests {
		var b strings.Builder
		Error(&b, tt.err)
		if d := cmp.Diff(tt.want, b.String()); d != "" {
			t.Error(d)
		}
	}
}

func TestSizes(t *testing.T) {
	for n, want := range map[int64]string{0: "0B", 1023: "1023B", 512 << 20: "512MiB", 3 << 29: "1.5GiB"} {
		if got := Size(n); got != want {
			t.Errorf("Size(%d) = %s, want %s", n, got, want)
		}
	}
	if got := Short("sha256:0123456789abcdef"); got != "0123456789ab" {
		t.Errorf("Short = %s", got)
	}
	if got := Ellipsis("abcdef", 4); got != "abc…" {
		t.Errorf("Ellipsis = %s", got)
	}
}

func TestProgressPlain(t *testing.T) {
	var b strings.Builder
	p := NewProgress(&b)
	p.Update(Transfer{"sha256:0123456789abcdef", "downloading", 0, 2048})
	p.Update(Transfer{"sha256:0123456789abcdef", "downloading", 1024, 2048})
	p.Update(Transfer{"root disk", "converting", 0, 0})
	p.Line("a tool speaks")
	p.Update(Transfer{"sha256:0123456789abcdef", "done", 2048, 2048})
	p.Close()
	want := "0123456789ab: downloading (2KiB)\nroot disk: converting\na tool speaks\n0123456789ab: done (2KiB)\n"
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
}

func TestProgressBars(t *testing.T) {
	var b strings.Builder
	now := time.Unix(0, 0)
	p := NewProgress(&b)
	p.bars, p.fd, p.now = true, -1, func() time.Time { return now }
	p.Update(Transfer{"sha256:0123456789abcdef", "downloading", 0, 2048})
	p.Update(Transfer{"sha256:0123456789abcdef", "downloading", 512, 2048}) // too soon to be drawn
	now = now.Add(redraw)
	p.Update(Transfer{"sha256:0123456789abcdef", "downloading", 1024, 2048})
	p.Line("a tool speaks")
	p.Close()
	want := "0123456789ab   downloading  [                        ] 0B / 2KiB\n" +
		"\x1b[1A\x1b[J0123456789ab   downloading  [============            ] 1KiB / 2KiB\n" +
		"\x1b[1A\x1b[Ja tool speaks\n0123456789ab   downloading  [============            ] 1KiB / 2KiB\n" +
		"\x1b[1A\x1b[J0123456789ab   downloading  [============            ] 1KiB / 2KiB\n"
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
}
