package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

const hello = `{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":["oob"]}}` + "\n"

// serve plays QEMU: it greets, accepts the capabilities and answers every later command with what answer says.
func serve(conn net.Conn, answer func(command, id string) string) {
	defer conn.Close()
	io.WriteString(conn, hello)
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		var m struct {
			Execute string
			ID      json.RawMessage
		}
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			return
		}
		text := fmt.Sprintf(`{"return":{},"id":%s}`, m.ID)
		if m.Execute != "qmp_capabilities" {
			text = answer(m.Execute, string(m.ID))
		}
		if text == "" {
			return
		}
		io.WriteString(conn, text+"\n")
	}
}

func dial(t *testing.T, answer func(command, id string) string) *Client {
	t.Helper()
	ours, theirs := net.Pipe()
	go serve(theirs, answer)
	c, err := New(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestExecute(t *testing.T) {
	c := dial(t, func(command, id string) string {
		return "not JSON\n" + `{"return":{"status":"another's"},"id":"stranger"}` + "\n" +
			`{"event":"STOP","data":{"n":1}}` + "\n" + fmt.Sprintf(`{"return":{"status":%q},"id":%s}`, command, id)
	})
	var out struct{ Status string }
	if err := c.Execute(t.Context(), "query-status", map[string]any{"a": 1}, &out); err != nil {
		t.Fatal(err)
	}
	if out.Status != "query-status" {
		t.Errorf("status %q", out.Status)
	}
	if e := <-c.Events(); e.Name != "STOP" || string(e.Data) != `{"n":1}` {
		t.Errorf("event %s %s", e.Name, e.Data)
	}
}

func TestRefusal(t *testing.T) {
	c := dial(t, func(_, id string) string {
		return `{"error":{"class":"CommandNotFound","desc":"no such thing"},"id":` + id + `}`
	})
	err := c.Execute(t.Context(), "nonsense", nil, nil)
	var refusal *Error
	if !errors.As(err, &refusal) || refusal.Class != "CommandNotFound" {
		t.Fatalf("error %v", err)
	}
}

func TestEnd(t *testing.T) {
	c := dial(t, func(string, string) string { return "" })
	for range 2 { // while waiting, and afterwards
		if err := c.Execute(t.Context(), "stop", nil, nil); !errdefs.IsUnavailable(err) {
			t.Fatalf("error %v", err)
		}
	}
	if _, open := <-c.Events(); open {
		t.Error("events are still open")
	}
}

func TestLongLine(t *testing.T) {
	c := dial(t, func(_, id string) string { return strings.Repeat("x", maxLine+1) })
	if err := c.Execute(t.Context(), "stop", nil, nil); !errors.Is(err, bufio.ErrTooLong) {
		t.Fatalf("error %v", err)
	}
}

func TestCancelled(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, ours); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("error %v", err)
	}
}

func FuzzReplies(f *testing.F) {
	f.Add([]byte(`{"return":{},"id":1}` + "\n" + `{"event":"SHUTDOWN","data":{"guest":true}}`))
	f.Add([]byte(`{"error":{"class":"x"},"id":1}`))
	f.Add([]byte(`{"return":null,"error":null,"id":{},"event":7}`))
	f.Add([]byte("\n\n[]\n\"\"\n{}\n\x00"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		ours, theirs := net.Pipe()
		go func() {
			defer theirs.Close()
			go io.Copy(io.Discard, theirs)
			io.WriteString(theirs, hello)
			theirs.Write(stream)
		}()
		// Whatever comes, New returns and the client can be closed.
		if c, err := New(t.Context(), ours); err == nil {
			c.Close()
		}
	})
}
