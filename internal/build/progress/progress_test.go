package progress

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

func TestModes(t *testing.T) {
	begin := time.Now()
	end := begin.Add(time.Second)
	step := digest.FromString("step")
	status, err := json.Marshal(client.SolveStatus{
		Vertexes: []*client.Vertex{{Digest: step, Name: "[1/1] RUN echo hello", Started: &begin, Completed: &end}},
		Logs:     []*client.VertexLog{{Vertex: step, Stream: 1, Data: []byte("hello\n"), Timestamp: begin}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[string]string{
		"auto":    "hello",
		"plain":   "[1/1] RUN echo hello",
		"rawjson": step.String(),
		"quiet":   "",
	} {
		t.Run(mode, func(t *testing.T) {
			var out bytes.Buffer
			p, err := NewPrinter(&out, mode)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Write(status); err != nil {
				t.Fatal(err)
			}
			if err := p.Write([]byte("{")); err == nil {
				t.Error("broken JSON was taken")
			}
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			if got := out.String(); !strings.Contains(got, want) || want == "" && got != "" {
				t.Errorf("got %q, want %q in it", got, want)
			}
		})
	}
	for _, mode := range []string{"tty", "fancy"} { // a buffer is no terminal
		if _, err := NewPrinter(&bytes.Buffer{}, mode); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v, want an invalid argument", mode, err)
		}
	}
}

// Output of a step that failed comes once in plain mode; warnings come once, at the end, in all modes but rawjson.
func TestFailureAndWarnings(t *testing.T) {
	begin := time.Now()
	end := begin.Add(time.Second)
	step := digest.FromString("step")
	status, err := json.Marshal(client.SolveStatus{
		Vertexes: []*client.Vertex{{Digest: step, Name: "[1/1] RUN false", Started: &begin, Completed: &end, Error: "exit code: 1"}},
		Logs:     []*client.VertexLog{{Vertex: step, Stream: 1, Data: []byte("words\n"), Timestamp: begin}},
		Warnings: []*client.VertexWarning{{Vertex: step, Short: []byte("Rule: mend it (line 3)"), URL: "https://rule"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for mode, words := range map[string]int{"plain": 1, "auto": 1, "quiet": 0} {
		var out bytes.Buffer
		p, err := NewPrinter(&out, mode)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Write(status); err != nil {
			t.Fatal(err)
		}
		if err := p.Write(status); err != nil { // a warning that is told twice is one
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		got := out.String()
		if n := strings.Count(got, "words"); n < words || mode == "quiet" && n > 0 || strings.Contains(got, "------") {
			t.Errorf("%s: output %d times:\n%s", mode, n, got)
		}
		if mode == "quiet" {
			if got != "" {
				t.Errorf("quiet: %q", got)
			}
			continue
		}
		if !strings.Contains(got, "1 warning found:\n - Rule: mend it (line 3)\n   https://rule\n") || strings.Count(got, "mend it") != 1 {
			t.Errorf("%s: warnings:\n%s", mode, got)
		}
	}
}
