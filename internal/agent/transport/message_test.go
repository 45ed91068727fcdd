package transport

import (
	"bytes"
	"strings"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"google.golang.org/protobuf/proto"
)

// What the generated code writes is what protobuf reads, and the other way round: agents and hosts of other builds have either.
func TestMessageIsProtobuf(t *testing.T) {
	code := int32(-7)
	for _, m := range []Message{
		&agentv1.Progress{Step: "root", UptimeNanos: -1, ExitCode: &code, Output: []byte{0, 0xff}},
		&agentv1.Request{Kind: &agentv1.Request_Configure{Configure: &agentv1.Config{
			Hostname: "web-ü", Entropy: make([]byte, 64), Sysctls: map[string]string{"a.b": "1"},
			Root:      &agentv1.Root{Disks: []*agentv1.RootDisk{{Device: "/dev/vda", HasRoot: true}, {Verity: &agentv1.Verity{}}}},
			Process:   &agentv1.Process{Argv: []string{"", "x"}, Rlimits: []*agentv1.Rlimit{{Name: "nofile", Hard: 1<<64 - 1}}},
			Provision: &agentv1.Provision{Locale: "de_DE.UTF-8"},
		}}},
		&agentv1.Request{Kind: &agentv1.Request_Hello{Hello: &agentv1.Hello{}}},
		&agentv1.WatchRequest{},
	} {
		var frame bytes.Buffer
		if err := WriteMsg(&frame, m); err != nil {
			t.Fatal(err)
		}
		theirs := m.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(frame.Bytes()[4:], theirs); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(m, theirs) {
			t.Errorf("protobuf reads %v\nof %v", theirs, m)
		}
		ours := m.ProtoReflect().New().Interface().(Message)
		if err := ReadMsg(&frame, ours); err != nil || !proto.Equal(m, ours) {
			t.Errorf("read %v, %v\nof %v", ours, err, m)
		}
	}
}

func TestReadStrangerRefusesWhatIsNoText(t *testing.T) {
	var frame bytes.Buffer
	if err := WriteMsg(&frame, &agentv1.Progress{Step: "\xff"}); err != nil {
		t.Fatal(err)
	}
	if err := ReadStranger(&frame, &agentv1.Progress{}); err == nil || !strings.Contains(err.Error(), "UTF-8") {
		t.Errorf("a step that is no text: %v", err)
	}
}
