package host

import (
	"net"
	"strings"
	"sync/atomic"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

func TestWhatAnOlderAgentDoesNotKnowIsRefusedByName(t *testing.T) {
	var asked atomic.Int32
	c := guestWith(t, func(s net.Conn, req *agentv1.Request) {
		switch req.GetKind().(type) {
		case *agentv1.Request_Hello:
			transport.WriteMsg(s, &agentv1.HelloReply{Protocol: 1})
		case *agentv1.Request_Configure:
			transport.WriteMsg(s, &agentv1.Progress{Done: true})
		case *agentv1.Request_Exec:
			transport.WriteMsg(s, started)
		default:
			asked.Add(1)
		}
	})
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	configure := func(config *agentv1.Config) *agentv1.Request {
		return &agentv1.Request{Kind: &agentv1.Request_Configure{Configure: config}}
	}
	limited := &agentv1.Process{Rlimits: []*agentv1.Rlimit{{Name: "nofile", Soft: 1}}}
	for what, req := range map[string]*agentv1.Request{
		"copying files":        {Kind: &agentv1.Request_PutFiles{}},
		"setting its clock":    {Kind: &agentv1.Request_SyncTime{}},
		"provisioning":         configure(&agentv1.Config{Provision: &agentv1.Provision{}}),
		"tmpfs mounts":         configure(&agentv1.Config{Tmpfs: []*agentv1.Tmpfs{{Path: "/x"}}}),
		"sysctls":              configure(&agentv1.Config{Sysctls: map[string]string{"a": "b"}}),
		"volumes of the image": configure(&agentv1.Config{Volumes: []string{"/v"}}),
		"NTP":                  configure(&agentv1.Config{NtpServers: []string{"n"}}),
		"DNS options":          configure(&agentv1.Config{DnsOptions: []string{"n"}}),
		"resource limits":      {Kind: &agentv1.Request_Exec{Exec: &agentv1.Exec{Process: limited}}},
	} {
		err := c.ask(t.Context(), req, &agentv1.FilesReply{})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "too old for "+what+":") || hint.Of(err) == "" {
			t.Errorf("%s: %v, hint %q", what, err, hint.Of(err))
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests reached the agent", n)
	}
	// What it does know works.
	if err := c.Configure(t.Context(), &agentv1.Config{Hostname: "x", Process: &agentv1.Process{}}, func(string) {}); err != nil {
		t.Error(err)
	}
	x, err := c.Exec(t.Context(), &agentv1.Exec{Process: &agentv1.Process{}})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if err := x.Detach(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "too old for detaching") {
		t.Errorf("detach: %v", err)
	}
}
