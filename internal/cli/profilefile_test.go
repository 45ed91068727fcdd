package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func TestProfileSpec(t *testing.T) {
	e := &environment{Env: Env{LookupEnv: func(k string) (string, bool) { return "here", k == "TAKEN" }}}
	got, err := e.profileSpec([]byte(`
# what a web server gets
memory: 2G
cpus: 2
publish: ["8080:80"]
env: {MODE: "pro$duction", TAKEN: "x=y"}
label:
  - a=1
  - b
verity: true
stop-timeout: 3
`))
	if err != nil {
		t.Fatal(err)
	}
	want := &atollv1.MachineSpec{
		MemoryBytes: 2 << 30, Cpus: 2, Ports: []*atollv1.PortMapping{{HostPort: 8080, GuestPort: 80, Protocol: "tcp"}},
		Env: []string{"MODE=pro$duction", "TAKEN=x=y"}, Labels: map[string]string{"a": "1", "b": ""}, Verity: true, StopTimeout: got.GetStopTimeout(),
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" || got.GetStopTimeout().GetSeconds() != 3 {
		t.Error(d, got.GetStopTimeout())
	}
	if got, err := e.profileSpec(nil); err != nil || got.GetCpus() != 0 {
		t.Errorf("an empty profile: %v, %v", got, err)
	}
}

func TestProfileFaults(t *testing.T) {
	e := &environment{}
	for text, wants := range map[string][]string{
		"memory: 1G\nmemmory: 2G\nname: web\ncpus: [1, 2]": {`line 2: unknown setting "memmory"`, "line 3: name is a machine's own", "line 4: cpus takes one value"},
		"memory: lots":         {"line 1: ", "memory"},
		"cpus:":                {"line 1: cpus: no value"},
		"cpus: 1\ncpus: 2":     {"line 2: cpus is there twice"},
		"- a":                  {"line 1: a profile is a mapping"},
		"env: {a: {b: c}}":     {"line 1: want a single value"},
		"env: [\n":             {"line "},
		"profile: [a]":         {"a machine's own"},
		"publish: [\"x:y:z\"]": {"x:y:z"},
	} {
		_, err := e.profileSpec([]byte(text))
		for _, want := range wants {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v; want %q", text, err, want)
			}
		}
	}
}

func TestRunTakesFlagsFromTheEnvironment(t *testing.T) {
	values := map[string]string{"ATOLL_RUN_MEMORY": "1G", "ATOLL_RUN_CPUS": "3", "ATOLL_RUN_NAME": "no", "ATOLL_RUN_STOP_SIGNAL": "INT"}
	e := &environment{Env: Env{LookupEnv: func(k string) (string, bool) { v, ok := values[k]; return v, ok }}}
	cmd := newRunCmd(e)
	if err := cmd.ParseFlags([]string{"--cpus", "2"}); err != nil {
		t.Fatal(err)
	}
	if err := e.setFromEnvironment(cmd); err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[string]string{"memory": "1GiB", "cpus": "2", "name": "", "stop-signal": "INT"} {
		if got := cmd.Flags().Lookup(flag).Value.String(); got != want {
			t.Errorf("--%s is %q, want %q", flag, got, want)
		}
	}
	values["ATOLL_RUN_MEMORY"] = "lots"
	if err := e.setFromEnvironment(newRunCmd(e)); err == nil || !strings.Contains(err.Error(), "ATOLL_RUN_MEMORY") {
		t.Errorf("a wrong value: %v", err)
	}
}
