package ui

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// Column is one column of a table.
type Column[T any] struct {
	Title string
	Cell  func(T) string
}

// List prints rows in the format asked for: "" or table, json (one array), or a Go template that is applied to each row.
func List[T any](w io.Writer, format string, columns []Column[T], rows []T) error {
	switch format {
	case "", "table":
		return table(w, columns, rows)
	case "json":
		return Array(w, rows)
	}
	return Each(w, format, rows)
}

// Array prints rows as one JSON array; none is [], not null.
func Array[T any](w io.Writer, rows []T) error {
	if rows == nil {
		rows = []T{}
	}
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(rows)
}

// Inspect prints rows as a JSON array, which is the default, or by a Go template.
func Inspect[T any](w io.Writer, format string, rows []T) error {
	if format == "" || format == "json" {
		return Array(w, rows)
	}
	return Each(w, format, rows)
}

// Each prints each row on a line of its own: json, or a Go template.
func Each[T any](w io.Writer, format string, rows []T) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		for _, r := range rows {
			if err := e.Encode(r); err != nil {
				return err
			}
		}
		return nil
	}
	t, err := parse(format)
	if err != nil {
		return err
	}
	for _, r := range rows {
		var line strings.Builder
		if err := t.Execute(&line, r); err != nil {
			return badFormat(format, err)
		}
		if _, err := fmt.Fprintln(w, line.String()); err != nil {
			return err
		}
	}
	return nil
}

// CheckFormat refuses a format that could not print anything, before there is work done whose result nobody would see.
func CheckFormat(format string) error {
	switch format {
	case "", "table", "json":
		return nil
	}
	_, err := parse(format)
	return err
}

func parse(format string) (*template.Template, error) {
	if !strings.Contains(format, "{{") {
		return nil, badFormat(format, fmt.Errorf("want table, json or a Go template"))
	}
	// As Docker: a shell hands over \t and \n as two characters.
	t, err := template.New("format").Funcs(functions).Parse(strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(format))
	if err != nil {
		return nil, badFormat(format, err)
	}
	return t, nil
}

func badFormat(format string, err error) error {
	return hint.With(fmt.Errorf("format %q: %w: %w", format, err, errdefs.ErrInvalidArgument), "--format json shows all fields; in a template their names begin with a capital")
}

// functions are those of Docker's templates.
var functions = template.FuncMap{
	"json": func(v any) (string, error) {
		var b strings.Builder
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		err := e.Encode(v)
		return strings.TrimSuffix(b.String(), "\n"), err
	},
	"join":  strings.Join,
	"split": strings.Split,
	"lower": strings.ToLower,
	"upper": strings.ToUpper,
}

func table[T any](w io.Writer, columns []Column[T], rows []T) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	line := make([]string, len(columns))
	for i, c := range columns {
		line[i] = c.Title
	}
	fmt.Fprintln(tw, strings.Join(line, "\t"))
	for _, r := range rows {
		for i, c := range columns {
			line[i] = c.Cell(r)
		}
		fmt.Fprintln(tw, strings.Join(line, "\t"))
	}
	return tw.Flush()
}
