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
