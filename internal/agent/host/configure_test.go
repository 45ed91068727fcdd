package host

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/containerd/errdefs"
)

func contentOf(data string) Content {
	return Content{int64(len(data)), func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(data)), nil }}
}

func TestConfigureSendsContents(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 20<<10)
	got := make(chan []string, 1)
	c := guestWith(t, func(s net.Conn, req *agentv1.Request) {
		transport.WriteMsg(s, &agentv1.Progress{Step: "files"})
		var contents []string
		for len(contents) < 3 {
			var b bytes.Buffer
			for end := false; !end; {
				piece := &agentv1.Content{}
				if transport.ReadMsg(s, piece) != nil {
					return
				}
				b.Write(piece.GetData())
				end = piece.GetEnd()
			}
			contents = append(contents, b.String())
		}
		got <- contents
		transport.WriteMsg(s, &agentv1.Progress{Output: []byte("written\n")})
		transport.WriteMsg(s, &agentv1.Progress{Done: true})
	})
	var steps, output []string
	err := c.ConfigureWith(t.Context(), &agentv1.Config{}, []Content{contentOf(large), contentOf(""), contentOf("x")}, Configuring{
		Step: func(s string) { steps = append(steps, s) }, Output: func(b []byte) { output = append(output, string(b)) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if c := <-got; c[0] != large || c[1] != "" || c[2] != "x" {
		t.Errorf("the guest got %d, %q and %q", len(c[0]), c[1], c[2])
	}
	if strings.Join(steps, " ") != "files" || strings.Join(output, " ") != "written\n" {
		t.Errorf("steps %q, output %q", steps, output)
	}
}

func TestConfigureContentsFail(t *testing.T) {
	c := guestWith(t, func(s net.Conn, req *agentv1.Request) { io.Copy(io.Discard, s) })
	broken := Content{10, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("short")), nil }}
	err := c.ConfigureWith(t.Context(), &agentv1.Config{}, []Content{broken}, Configuring{Step: func(string) {}, Output: func([]byte) {}})
	if err == nil || !strings.Contains(err.Error(), "5 bytes early") {
		t.Errorf("a file that became shorter: %v", err)
	}
	// A guest that fails does not take the rest, and nobody waits for it.
	c = guestWith(t, func(s net.Conn, req *agentv1.Request) {
		code := int32(3)
		transport.WriteMsg(s, &agentv1.Progress{Step: "files", Error: "no room", ExitCode: &code})
		time.Sleep(100 * time.Millisecond)
	})
	endless := Content{1 << 40, func() (io.ReadCloser, error) { return io.NopCloser(zeros{}), nil }}
	err = c.ConfigureWith(t.Context(), &agentv1.Config{}, []Content{endless}, Configuring{Step: func(string) {}, Output: func([]byte) {}})
	if f := (*Failure)(nil); !errors.As(err, &f) || f.Step != "files" || f.ExitCode == nil || *f.ExitCode != 3 {
		t.Errorf("a failing guest: %v", err)
	}
	c = guestWith(t, func(s net.Conn, req *agentv1.Request) {
		transport.WriteMsg(s, &agentv1.Progress{Output: make([]byte, maxChunk+1)})
		io.Copy(io.Discard, s)
	})
	if err := c.Configure(t.Context(), &agentv1.Config{}, func(string) {}); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("long output: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A guest whose clock is 7 s ahead is corrected by that much, however long the messages take.
func TestSyncTime(t *testing.T) {
	ahead := 7 * time.Second
	corrected := make(chan time.Duration, 1)
	c := guestWith(t, func(s net.Conn, req *agentv1.Request) {
		r := req.GetSyncTime()
		time.Sleep(50 * time.Millisecond) // on its way
		reply := &agentv1.SyncTimeReply{OffsetNanos: time.Now().Add(ahead).UnixNano() - r.GetUnixNanos()}
		time.Sleep(50 * time.Millisecond)
		if by := r.GetCorrectNanos(); by != 0 {
			corrected <- time.Duration(by)
		}
		transport.WriteMsg(s, reply)
	})
	got, err := c.SyncTime(t.Context(), 20*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if (got-ahead).Abs() > 40*time.Millisecond || (<-corrected+got).Abs() != 0 {
		t.Errorf("ahead by %v, want %v", got, ahead)
	}
	ahead = 30 * time.Millisecond // less than the doubt
	if _, err := c.SyncTime(t.Context(), 20*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	select {
	case by := <-corrected:
		t.Errorf("corrected by %v, which nobody can know", by)
	default:
	}
}
