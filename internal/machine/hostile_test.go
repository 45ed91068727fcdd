package machine

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/state"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// parts are the rooms around this one, with nothing in them.
type parts struct{}

func (parts) Find(context.Context, string, string) (Image, error) {
	return Image{Digest: digest.FromString("x"), Cmd: []string{"x"}}, nil
}
func (parts) Hold() func() { return func() {} }
func (parts) Root(context.Context, digest.Digest) ([]RootDisk, error) {
	return []RootDisk{{Path: "/x"}}, nil
}
func (parts) Verify(context.Context, digest.Digest) error { return nil }
func (parts) Scratch(path string, _ int64) error          { return os.WriteFile(path, nil, 0o600) }

// guests is a VMM driver whose guests are functions on the other end of a socket, by their machines' IDs.
type guests struct {
	mu    sync.Mutex
	guest func(net.Conn) // of the next machine
	runs  map[string]*guest
}

func (g *guests) Name() string { return "fake" }
func (g *guests) Probe(context.Context) (vmm.Capabilities, error) {
	return vmm.Capabilities{Accelerator: "none"}, nil
}
func (g *guests) Start(_ context.Context, s vmm.Spec) (vmm.Instance, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := &guest{behave: g.guest, done: make(chan struct{})}
	g.runs[s.ID] = i
	return i, nil
}
func (g *guests) Recover(_ context.Context, s vmm.Spec) (vmm.Instance, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := g.runs[s.ID]; i != nil {
		i.behave = g.guest
		return i, nil
	}
	return nil, errdefs.ErrNotFound
}

type guest struct {
	behave func(net.Conn)
	done   chan struct{}
	once   sync.Once
}

func (i *guest) PID() int            { return 1 }
func (i *guest) Accelerator() string { return "none" }
func (i *guest) DialAgent(context.Context) (net.Conn, error) {
	h, g := net.Pipe()
	go func() {
		<-i.done
		g.Close()
	}()
	go i.behave(g)
	return h, nil
}
func (i *guest) Done() <-chan struct{} { return i.done }
func (i *guest) Exit() vmm.Exit        { return vmm.Exit{Reason: vmm.ReasonDied} }
func (i *guest) Kill(context.Context) error {
	i.once.Do(func() { close(i.done) })
	return nil
}
func (i *guest) Close() error { return nil }

type noModules struct{ parts }

func (noModules) Boot(context.Context, string, ...string) (vmm.Kernel, string, error) {
	return vmm.Kernel{}, "k", nil
}
func (noModules) Modules(string) KernelModules { return nil }

type noNetworks struct{}

func (noNetworks) Get(string) (network.Network, network.Driver, error) {
	return network.Network{}, nil, errdefs.ErrNotFound
}
func (noNetworks) List() []network.Network { return nil }
func (noNetworks) Lease(string, string) (network.Lease, error) {
	return network.Lease{}, errdefs.ErrNotFound
}
func (noNetworks) Release(string) error { return nil }

func openWith(t *testing.T, dir string, g *guests) *Machines {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	db, err := state.Open(filepath.Join(dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	ms, err := Open(Options{Dir: filepath.Join(dir, "m"), Host: "h", BootID: "b", DB: db, Drivers: map[string]vmm.Driver{"auto": g, "fake": g},
		Images: parts{}, Disks: parts{}, Kernels: noModules{}, Events: event.New(), Networks: noNetworks{}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ms.Close()
		db.Close()
	})
	return ms
}

// agentThat is a guest that opens sessions as the agent does and answers each request as it likes.
func agentThat(do func(net.Conn, *agentv1.Request)) func(net.Conn) {
	return func(c net.Conn) {
		_ = transport.Serve(c, func(s *transport.Session) {
			go func() {
				for {
					stream, err := s.Accept()
					if err != nil {
						return
					}
					go func() {
						defer stream.Close()
						req := &agentv1.Request{}
						if transport.ReadMsg(stream, req) == nil {
							do(stream, req)
						}
					}()
				}
			}()
		})
	}
}

// started answers what a start asks, and leaves the rest to then.
func started(then func(net.Conn, *agentv1.Request)) func(net.Conn) {
	return agentThat(func(s net.Conn, req *agentv1.Request) {
		if req.GetConfigure() != nil {
			_ = transport.WriteMsg(s, &agentv1.Progress{Done: true})
			return
		}
		then(s, req)
	})
}

func create(t *testing.T, ms *Machines, name string) {
	t.Helper()
	grace := time.Second
	if _, _, err := ms.Create(t.Context(), Spec{Name: name, Image: "x", Network: NoNetwork, StopTimeout: grace}); err != nil {
		t.Fatal(err)
	}
}

func within(t *testing.T, limit time.Duration, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("%s takes longer than %v", what, limit)
	}
}

// TestHostileGuests: none of them keeps a machine from being stopped and removed, nor another from running.
func TestHostileGuests(t *testing.T) {
	t.Parallel()
	silent := func(s net.Conn, _ *agentv1.Request) { io.Copy(io.Discard, s) }
	for name, tc := range map[string]struct {
		guest func(net.Conn)
		runs  bool
		says  string // of the failed start
	}{
		"garbage":       {func(c net.Conn) { go io.Copy(io.Discard, c); io.Copy(c, endless{0xff}) }, false, "sends other data"},
		"hangs up":      {func(c net.Conn) { c.Close() }, false, ""},
		"endless steps": {agentThat(func(s net.Conn, _ *agentv1.Request) { repeat(s, &agentv1.Progress{Step: "x"}) }), false, "steps"},
		"step of a MB": {agentThat(func(s net.Conn, _ *agentv1.Request) {
			repeat(s, &agentv1.Progress{Step: strings.Repeat("\x1b[2J", 1<<17)})
		}), false, "steps"},
		"silent then":      {started(silent), true, ""},
		"falling records":  {started(func(s net.Conn, req *agentv1.Request) { fall(s, req) }), true, ""},
		"endless output":   {started(func(s net.Conn, req *agentv1.Request) { flood(s, req) }), true, ""},
		"breaks streams":   {started(func(net.Conn, *agentv1.Request) {}), true, ""},
		"no going down":    {started(func(s net.Conn, req *agentv1.Request) { promise(s, req) }), true, ""},
		"escapes in words": {started(func(s net.Conn, req *agentv1.Request) { escape(s, req) }), true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := &guests{guest: tc.guest, runs: map[string]*guest{}}
			dir := t.TempDir()
			ms := openWith(t, dir, g)
			create(t, ms, "bad")
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, _, err := ms.Start(ctx, "bad")
			if (err == nil) != tc.runs || err != nil && (!strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "\x1b") || len(err.Error()) > 4000) {
				t.Fatalf("start: %.500v", err)
			}
			if tc.runs {
				g.mu.Lock()
				g.guest = started(silent)
				g.mu.Unlock()
				within(t, 5*time.Second, "another machine's start", func() {
					create(t, ms, "good")
					if _, _, err := ms.Start(t.Context(), "good"); err != nil {
						t.Error(err)
					}
				})
				time.Sleep(300 * time.Millisecond) // of flood
				within(t, 10*time.Second, "stop", func() {
					if _, err := ms.Stop(t.Context(), "bad", nil); err != nil {
						t.Error(err)
					}
				})
				m, err := ms.Get("bad")
				if err != nil || m.State.Alive() || m.ExitCode < 0 || m.ExitCode > 255 || strings.Contains(m.Error, "\x1b") || len(m.Error) > 2000 {
					t.Errorf("%+v, %v", m, err)
				}
			}
			var size int64
			_ = filepath.Walk(dir, func(_ string, st os.FileInfo, err error) error {
				if err == nil && st.Mode().IsRegular() {
					size += st.Size()
				}
				return nil
			})
			if size > 2*DefaultLogMaxFiles*DefaultLogMaxBytes {
				t.Errorf("%d bytes of files", size)
			}
			within(t, 5*time.Second, "rm", func() {
				if _, err := ms.Remove(t.Context(), "bad", true); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

type endless struct{ b byte }

func (e endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = e.b
	}
	return len(p), nil
}

func repeat(s net.Conn, p *agentv1.Progress) {
	for transport.WriteMsg(s, p) == nil {
	}
}

func fall(s net.Conn, req *agentv1.Request) {
	if req.GetOutput() != nil {
		for seq := uint64(1000); seq > 990 && transport.WriteMsg(s, &agentv1.Output{Seq: seq, Data: []byte("x")}) == nil; seq-- {
		}
	}
	io.Copy(io.Discard, s)
}

func flood(s net.Conn, req *agentv1.Request) {
	go io.Copy(io.Discard, s)
	for seq := req.GetOutput().GetAfter() + 1; req.GetOutput() != nil && transport.WriteMsg(s, &agentv1.Output{Seq: seq, Data: make([]byte, 60<<10)}) == nil; seq++ {
	}
}

// promise says that it goes down and does not.
func promise(s net.Conn, req *agentv1.Request) {
	if req.GetShutdown() != nil {
		_ = transport.WriteMsg(s, &agentv1.ShutdownReply{})
	}
	io.Copy(io.Discard, s)
}

func escape(s net.Conn, req *agentv1.Request) {
	if req.GetWatch() != nil {
		for i := range uint64(1000) {
			_ = transport.WriteMsg(s, &agentv1.Event{Seq: i, Kind: &agentv1.Event_Started{Started: &agentv1.EntrypointStarted{Pid: 1<<32 - 1}}})
		}
	}
	if req.GetShutdown() != nil {
		_ = transport.WriteMsg(s, &agentv1.ShutdownReply{Error: strings.Repeat("\x1b]0;owned\a", 10000)})
	}
	io.Copy(io.Discard, s)
}

func TestAnAgentOfAnotherVersionIsServedOrRefused(t *testing.T) {
	t.Parallel()
	for version, refused := range map[uint32]string{0: "oldest", 1: "", transport.Protocol: "", 99: "newer"} {
		g := &guests{runs: map[string]*guest{}}
		dir := t.TempDir()
		speaks := started(func(s net.Conn, req *agentv1.Request) {
			switch {
			case req.GetHello() != nil:
				_ = transport.WriteMsg(s, &agentv1.HelloReply{Protocol: version})
			case req.GetExec() != nil:
				_ = transport.WriteMsg(s, &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Started_{Started: &agentv1.ExecOutput_Started{Pid: 7}}})
			default:
				io.Copy(io.Discard, s)
			}
		})
		g.guest = speaks
		ms := openWith(t, dir, g)
		create(t, ms, "old")
		if _, _, err := ms.Start(t.Context(), "old"); err != nil {
			t.Fatal(err)
		}
		// The daemon is upgraded: another one takes the machine back.
		ms.Close()
		ms.DB.Close()
		ms = openWith(t, dir, g)
		ms.Recover(t.Context())
		x, err := ms.Exec(t.Context(), "old", Process{Argv: []string{"x"}})
		switch {
		case refused == "" && err != nil:
			t.Errorf("version %d: %v", version, err)
		case refused != "" && (!errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), refused) || !strings.Contains(hint.Of(err), "atoll restart old")):
			t.Errorf("version %d: %v, hint %q", version, err, hint.Of(err))
		}
		if err == nil {
			x.Close()
		}
		within(t, 5*time.Second, "rm", func() {
			if _, err := ms.Remove(t.Context(), "old", true); err != nil {
				t.Error(err)
			}
		})
	}
}
