package host

import (
	"bytes"
	"context"
	"io"
	"net"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
)

// framed are messages as the agent sends them.
func framed(messages ...transport.Message) []byte {
	var b bytes.Buffer
	for _, m := range messages {
		_ = transport.WriteMsg(&b, m)
	}
	return b.Bytes()
}

// FuzzGuest has a guest answer every kind of request with these bytes. Whatever they are, each call ends by itself or with its context, what it
// says is printable and short, and nothing larger than a chunk is handed on. Goroutines make its coverage differ from run to run, which Go takes a
// minute each to minimise, showing 0 executions: fuzz with -fuzzminimizetime=1x.
func FuzzGuest(f *testing.F) {
	for _, b := range [][]byte{
		nil, {0xff, 0xff, 0xff, 0xff}, {0, 0, 0, 2, 0xff, 0xff}, make([]byte, 5000),
		framed(&agentv1.HelloReply{Protocol: 1, AgentVersion: "\x1b[2J\x00"}),
		framed(&agentv1.Progress{Step: "x", UptimeNanos: -1}, &agentv1.Progress{Error: "\x1b]0;x\a\u202e", Failure: 99}),
		framed(&agentv1.Output{Seq: 7, Data: []byte("x")}, &agentv1.Output{Seq: 3}, &agentv1.Output{Seq: 1<<64 - 1, Eof: true}),
		framed(started, exitWith(-1<<31)),
		framed(&agentv1.ModuleWanted{Id: 1, Name: "../../etc/passwd"}),
		framed(&agentv1.Event{Seq: 9, Kind: &agentv1.Event_GoingDown{GoingDown: &agentv1.GoingDown{Reason: 77, Detail: "\x1b["}}}),
	} {
		for kind := range byte(8) {
			f.Add(kind, b)
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, answer []byte) {
		h, g := net.Pipe()
		server, err := transport.Server(g)
		if err != nil {
			t.Fatal(err)
		}
		session, err := transport.Client(h)
		if err != nil {
			t.Fatal(err)
		}
		c := New(session)
		defer server.Close()
		defer c.Close()
		go func() {
			s, err := server.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, s)
			s.Write(answer)
			s.Close()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		check := func(data []byte) {
			if len(data) > maxChunk {
				t.Errorf("%d bytes in one piece", len(data))
			}
		}
		switch kind % 8 {
		case 0:
			_, err = c.Hello(ctx)
		case 1:
			err = c.ConfigureWith(ctx, &agentv1.Config{}, nil, Configuring{Step: func(s string) { checkPrintable(t, s) }, Output: check})
		case 2:
			last := uint64(0)
			err = c.Output(ctx, 0, func(o *agentv1.Output) error {
				check(o.GetData())
				if o.GetSeq() <= last {
					t.Errorf("record %d after %d", o.GetSeq(), last)
				}
				last = o.GetSeq()
				return nil
			})
		case 3:
			err = c.Watch(ctx, func(*agentv1.Event) bool { return true })
		case 4:
			var x *Exec
			if x, err = c.Exec(ctx, &agentv1.Exec{}); err == nil {
				for err == nil {
					var o *agentv1.ExecOutput
					if o, err = x.Recv(); err == nil {
						check(o.GetStdout())
						check(o.GetStderr())
					}
				}
				x.Close()
			}
		case 5:
			err = c.Signal(ctx, "TERM")
		case 6:
			err = c.Modules(ctx, func(name string, _ []string) ([]Module, error) {
				if len(name) > maxModuleName {
					t.Errorf("a name of %d bytes", len(name))
				}
				return []Module{{Name: "m", Data: []byte("x")}}, nil
			})
		case 7:
			err = c.Shutdown(ctx, "", 0)
		}
		if ctx.Err() != nil {
			t.Error("the call did not end by itself")
		}
		if err != nil {
			checkPrintable(t, err.Error())
		}
	})
}

func checkPrintable(t *testing.T, s string) {
	if len(s) > 3000 {
		t.Errorf("%d bytes of words", len(s))
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			t.Errorf("control character %#x in %q", r, s)
		}
	}
}
