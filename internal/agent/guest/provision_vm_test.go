package guest_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"google.golang.org/protobuf/proto"
)

func TestVMProvision(t *testing.T) {
	v := bootVM(t)
	v.connect()
	data := bytes.Repeat([]byte("0123456789abcde\n"), 40<<10)
	c := v.config("sh", "-c", "echo $LANG; cat /run/secrets/key; stat -c '%a %U' /etc/big; sleep 1000")
	c.Root.ReadOnly = true
	c.Provision = &agentv1.Provision{
		First: true, Locale: "C.UTF-8",
		Users: []*agentv1.User{{Name: "ann", SshAuthorizedKeys: []string{"key"}}},
		Files: []*agentv1.File{{Node: &agentv1.Node{Path: "/etc/big", User: &agentv1.Owner{Name: "ann"}, Mode: proto.Uint32(0o640)},
			Contents: []*agentv1.Piece{{Kind: &agentv1.Piece_Streamed{Streamed: uint64(len(data))}}}}},
		Secrets: []*agentv1.Secret{{Name: "key", Data: []byte("s$ecret\n")}},
		Commands: []*agentv1.Command{
			{Name: "early", Early: true, Script: []byte("ip -o -4 addr show dev eth0 | grep -c inet; ls /etc/big 2>/dev/null; cut -d: -f3 /proc/self/cgroup | sed 's/[0-9]*$//'")},
			{Name: "late", Script: []byte("#!/bin/sh\nip -o -4 addr show dev eth0 | grep -c inet; cat; id -u; echo words >&2; (sleep 777; echo late) &\n"), Argv: []string{"x"}},
			{Name: "fails", Argv: []string{"sh", "-c", "exit 3"}, IgnoreFailure: true},
		},
	}
	var steps []string
	var said strings.Builder
	tell := host.Configuring{Step: func(s string) { steps = append(steps, s) }, Output: func(p []byte) { said.Write(p) }}
	contents := []host.Content{{Size: int64(len(data)), Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }}}
	if err := v.client.ConfigureWith(t.Context(), c, contents, tell); err != nil {
		t.Fatalf("%v, after %q, which said %q", err, steps, said.String())
	}
	if got, want := said.String(), "0\n/atoll/provision-\n1\n0\nwords\nfails: exit code 3\n"; got != want {
		t.Errorf("commands said %q, want %q", got, want)
	}
	if got := strings.Join(steps, "|"); !strings.Contains(got, "hostname|provisioning: command early|provisioning: users|provisioning: files|provisioning: locale|network|") ||
		!strings.Contains(got, "provisioning: secrets|provisioning: command late|provisioning: command fails|read-only root|entrypoint") {
		t.Errorf("steps %s", got)
	}
	out, _, _ := v.exec(sh("cmp -s /etc/big - && echo same; echo $LANG; ls -d /run/atoll 2>/dev/null; ps -o args | grep -c 'sleep [7]77'"), data)
	if out != "same\nC.UTF-8\n1\n" {
		t.Errorf("exec said %q", out)
	}
	v.follow(v.client, 0, true)
	for !strings.Contains(v.stdout(), "ann\n") && t.Context().Err() == nil {
		<-time.After(20 * time.Millisecond)
	}
	if got := v.stdout(); got != "C.UTF-8\ns$ecret\n640 ann\n" {
		t.Errorf("the entrypoint said %q", got)
	}
}

func TestVMProvisionFails(t *testing.T) {
	v := bootVM(t)
	v.connect()
	c := v.config("true")
	c.Provision = &agentv1.Provision{First: true, Commands: []*agentv1.Command{{Name: "user-data", Script: []byte("echo out; exit 9")}}}
	err := v.client.Configure(t.Context(), c, func(string) {})
	var f *host.Failure
	if !errors.As(err, &f) || f.ExitCode == nil || *f.ExitCode != 9 || f.Step != "provisioning: command user-data" || f.Message != "user-data: exit code 9" {
		t.Errorf("got %v, %+v", err, f)
	}
}
