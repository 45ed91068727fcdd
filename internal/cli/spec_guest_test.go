package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func TestGuestFlags(t *testing.T) {
	labels := filepath.Join(t.TempDir(), "labels")
	if err := os.WriteFile(labels, []byte("# comment\nfile=1\nboth=file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		want *atollv1.MachineSpec
	}{
		{"--read-only", &atollv1.MachineSpec{ReadOnly: proto.Bool(true)}},
		{"--read-only=false", &atollv1.MachineSpec{ReadOnly: proto.Bool(false)}}, // over a profile's
		{"--tmpfs /a --tmpfs /b:size=1m,exec --shm-size 1M", &atollv1.MachineSpec{Tmpfs: []*atollv1.Tmpfs{
			{Path: "/a"}, {Path: "/b", Options: "size=1m,exec"}, {Path: "/dev/shm", Options: "size=1048576"},
		}}},
		{"--ulimit nofile=5 --ulimit core=0:-1", &atollv1.MachineSpec{Ulimits: []*atollv1.Ulimit{{Name: "nofile", Soft: 5, Hard: 5}, {Name: "core", Hard: -1}}}},
		{"--sysctl a.b=1=2", &atollv1.MachineSpec{Sysctls: map[string]string{"a.b": "1=2"}}},
		{"--add-host a:10.0.0.1 --add-host b=::1 --add-host c:[::2] --add-host d:host-gateway", &atollv1.MachineSpec{AddHosts: []*atollv1.HostEntry{
			{Address: "10.0.0.1", Names: []string{"a"}}, {Address: "::1", Names: []string{"b"}}, {Address: "::2", Names: []string{"c"}},
			{Address: "host-gateway", Names: []string{"d"}},
		}}},
		{"--dns 10.0.0.1 --dns ::1 --dns-search a.b --dns-option ndots:2", &atollv1.MachineSpec{Dns: []string{"10.0.0.1", "::1"}, DnsSearch: []string{"a.b"}, DnsOptions: []string{"ndots:2"}}},
		{"-P --kernel-args a=1 --kernel-args b", &atollv1.MachineSpec{PublishAll: true, KernelArgs: []string{"a=1", "b"}}},
		{"--label-file " + labels + " -l both=flag", &atollv1.MachineSpec{Labels: map[string]string{"file": "1", "both": "flag"}}},
		{"--health-cmd true --health-interval 1s --health-timeout 2s --health-retries 4 --health-start-period 5s --health-start-interval 6s", &atollv1.MachineSpec{
			HealthCheck: &atollv1.HealthCheck{Test: []string{"CMD-SHELL", "true"}, Interval: durationpb.New(time.Second), Timeout: durationpb.New(2 * time.Second),
				Retries: 4, StartPeriod: durationpb.New(5 * time.Second), StartInterval: durationpb.New(6 * time.Second)},
		}},
		{"--health-interval 1s", &atollv1.MachineSpec{HealthCheck: &atollv1.HealthCheck{Interval: durationpb.New(time.Second)}}},
		{"--no-healthcheck", &atollv1.MachineSpec{HealthCheck: &atollv1.HealthCheck{Test: []string{"NONE"}}}},
	} {
		t.Run(tt.args, func(t *testing.T) {
			a := newAtoll(t)
			args := append(append([]string{"create", "--name", "m"}, strings.Fields(tt.args)...), "hello")
			m, err := a.fake.find(strings.TrimSpace(a.ok(args...)))
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Image, tt.want.Name = "hello", "m"
			if d := gocmp.Diff(tt.want, m.Spec, protocmp.Transform()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestGuestFlagsGatherFaults(t *testing.T) {
	a := newAtoll(t)
	r := a.run("create", "--ulimit", "files=1", "--sysctl", "x", "--add-host", "x", "--add-host", "x:y", "--label-file", "/no/such/file",
		"--health-retries", "-1", "--health-interval", "-1s", "--no-healthcheck", "hello")
	for _, want := range []string{`--ulimit "files=1"`, `--sysctl "x"`, `--add-host "x"`, `"y" is neither`, "/no/such/file", "--health-retries -1", "--health-interval -1s", "exclude each other"} {
		if !strings.Contains(r.errOut, want) {
			t.Errorf("%s is missing in:\n%s", want, r.errOut)
		}
	}
	if r.code != 2 {
		t.Errorf("exit code %d", r.code)
	}
}
