package machine

import (
	"context"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/containerd/errdefs"
)

// deaf is a guest whose agent answers no more once it is told to, until its channel is opened anew: as QEMU leaves the channel of an agent
// that was killed and has started again within a second.
func deaf(t *testing.T) *Machines {
	silence := &atomic.Bool{}
	speaks := func(silence *atomic.Bool) func(net.Conn) {
		return started(func(s net.Conn, req *agentv1.Request) {
			switch {
			case silence.Load():
			case req.GetHello() != nil:
				_ = transport.WriteMsg(s, &agentv1.HelloReply{Protocol: transport.Protocol})
			case req.GetExec() != nil:
				_ = transport.WriteMsg(s, &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Started_{Started: &agentv1.ExecOutput_Started{Pid: 7}}})
			}
			io.Copy(io.Discard, s)
		})
	}
	g := &guests{runs: map[string]*guest{}, guest: speaks(silence)}
	ms := openWith(t, t.TempDir(), g)
	create(t, ms, "deaf")
	if _, _, err := ms.Start(t.Context(), "deaf"); err != nil {
		t.Fatal(err)
	}
	silence.Store(true)
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, i := range g.runs {
		i.behave = speaks(&atomic.Bool{})
	}
	return ms
}

func answers(t *testing.T, ms *Machines) {
	t.Helper()
	within(t, 5*time.Second, "the next command", func() {
		x, err := ms.Exec(t.Context(), "deaf", Process{Argv: []string{"x"}})
		if err != nil {
			t.Error(err)
			return
		}
		x.Close()
	})
}

func TestClockThatCannotBeReadOpensTheChannelAnew(t *testing.T) {
	t.Parallel()
	ms := deaf(t)
	e, err := ms.find("deaf")
	if err != nil {
		t.Fatal(err)
	}
	e.mu.Lock()
	r := e.run
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	ms.syncClock(ctx, e, r)
	time.Sleep(100 * time.Millisecond)
	answers(t, ms)
}

func TestCommandThatDoesNotStartOpensTheChannelAnew(t *testing.T) {
	t.Parallel()
	ms := deaf(t)
	within(t, execPatience+greetTimeout+5*time.Second, "the command", func() {
		if _, err := ms.Exec(t.Context(), "deaf", Process{Argv: []string{"x"}}); !errdefs.IsUnavailable(err) {
			t.Errorf("got %v", err)
		}
	})
	time.Sleep(100 * time.Millisecond)
	answers(t, ms)
}
