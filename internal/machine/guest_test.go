package machine

import (
	"strings"
	"testing"
	"time"

	"github.com/atollvm/atoll/internal/diskimage"
	"github.com/atollvm/atoll/internal/health"
	"github.com/atollvm/atoll/internal/network"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestValidateGuestGathersEveryFault(t *testing.T) {
	s := Spec{
		Name: "m", Image: "i", Network: NoNetwork, PublishAll: true,
		Tmpfs: []Tmpfs{{Path: "rel"}, {Path: "/"}, {Path: "/a", Options: "remount"}, {Path: "/b", Options: "zize=1"}, {Path: "/d", Options: "size=x"}, {Path: "/e", Options: "mode=9"}, {Path: "/proc/"}, {Path: "/sys/fs/cgroup"},
			{Path: "/c"}, {Path: "/c/"}},
		Ulimits: []Ulimit{{Name: "files", Soft: 1, Hard: 1}, {Name: "core", Soft: 2, Hard: 1}, {Name: "nproc", Soft: -2, Hard: -1}, {Name: "cpu", Soft: 1, Hard: 1}, {Name: "cpu", Soft: 1, Hard: 1}},
		Sysctls: map[string]string{"plain": "1", "net/../../x": "1", "a.b": "", "a.c": "1\n2"},
		AddHosts: []HostEntry{{Address: "10.0.0.1"}, {Address: "10.0.0.1", Names: []string{"a\nb"}}, {Address: "nowhere", Names: []string{"n"}},
			{Address: HostGateway, Names: []string{"h"}}},
		DNS: []string{"ns.example.org"}, DNSSearch: []string{"a b"}, DNSOptions: []string{"x\ny"},
		Health:     health.Check{Test: []string{"CMD"}, Interval: 1},
		KernelArgs: []string{"ok=1 rdinit=/bin/sh", "virtio-mmio.device=1", "x\ny", `a="b`, strings.Repeat("a", maxKernelArgs)},
	}.withDefaults()
	err := s.validate()
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("class: %v", err)
	}
	faults := strings.Split(err.Error(), "\n")
	for _, part := range []string{
		`tmpfs "rel"`, `tmpfs "/"`, `tmpfs /a: option "remount"`, `tmpfs /b: invalid tmpfs option "zize"`, `tmpfs /d: option size="x"`, `tmpfs /e: option mode="9"`, `tmpfs /proc/: it is the kernel's`,
		`tmpfs /sys/fs/cgroup: it is the kernel's`, `tmpfs /c/ is asked for twice`,
		`ulimit files=1:1`, `ulimit core=2:1`, `ulimit nproc=-2:-1`, `ulimit cpu is asked for twice`,
		`sysctl "plain"`, `sysctl "net/../../x"`, `sysctl a.b: value ""`, `sysctl a.c: value "1\n2"`,
		`without a name`, `the name "a\nb"`, `address "nowhere"`, `host-gateway of a machine without a network`,
		`DNS server "ns.example.org"`, `DNS search domain "a b"`, `DNS option "x\ny"`, `ports cannot be published without`,
		`health check "CMD"`, `health interval of 1ns`,
		`"rdinit=/bin/sh" would break`, `"virtio-mmio.device=1" would break`, `kernel argument "x\ny"`, `a quote is open`, `there is room for`,
	} {
		found := 0
		for _, f := range faults {
			if strings.Contains(f, part) {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%q is there %d times in:\n%v", part, found, err)
		}
	}
	if len(faults) != 32 {
		t.Errorf("%d faults:\n%v", len(faults), err)
	}
}

func TestValidateGuestTakesWhatDockerTakes(t *testing.T) {
	s := Spec{
		Name: "m", Image: "i", PublishAll: true,
		Tmpfs:    []Tmpfs{{Path: "/run", Options: "rw,exec,suid,size=64m,mode=1770,uid=5,gid=6"}, {Path: "/dev/shm"}},
		Ulimits:  []Ulimit{{Name: "nofile", Soft: 1, Hard: -1}, {Name: "core", Soft: -1, Hard: -1}},
		Sysctls:  map[string]string{"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/forwarding": "1", "kernel.core_pattern": "|/bin/x %p", "net.ipv4.ping_group_range": "0 2000"},
		AddHosts: []HostEntry{{Address: "::1", Names: []string{"a_b.example.org", "x-1"}}, {Address: HostGateway, Names: []string{"h"}}},
		DNS:      []string{"10.0.0.1", "2001:db8::1"}, DNSSearch: []string{".", "example.org", "svc.cluster.local."}, DNSOptions: []string{"ndots:2", "use-vc"},
		Health:     health.Check{Test: []string{"CMD-SHELL", "a | b"}, Interval: time.Second},
		KernelArgs: []string{"loglevel=7", `dyndbg="file a.c +p" nokaslr`},
	}.withDefaults()
	if err := s.validate(); err != nil {
		t.Error(err)
	}
}

func TestKernelArgsOfADisksOwnSystem(t *testing.T) {
	if faults := kernelArgsFaults([]string{"root=/dev/vda2 init=/bin/sh rootflags=x"}, true); faults != nil {
		t.Error(faults)
	}
	if faults := kernelArgsFaults([]string{"panic=0 reboot=a"}, true); len(faults) != 2 {
		t.Error(faults)
	}
}

func TestTmpfsOptions(t *testing.T) {
	for given, want := range map[string]string{
		"":                      "noexec,nosuid,nodev",
		"size=1m,exec,mode=700": "nosuid,nodev,size=1m,exec,mode=700",
		"rw,ro,suid":            "noexec,nodev,ro,suid",
	} {
		if got, err := tmpfsOptions(given); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", given, got, err, want)
		}
	}
}

func TestPublishedPorts(t *testing.T) {
	m := Machine{
		Spec:  Spec{PublishAll: true, Ports: []network.PortMapping{{HostPort: 8080, GuestPort: 80, Protocol: "tcp"}}},
		Image: Image{ExposedPorts: []string{"53/udp", "80/tcp", "80/udp", "8000-8001"}},
	}
	want := []network.PortMapping{
		{HostPort: 8080, GuestPort: 80, Protocol: "tcp"}, {GuestPort: 53, Protocol: "udp"}, {GuestPort: 80, Protocol: "udp"},
		{GuestPort: 8000, Protocol: "tcp"}, {GuestPort: 8001, Protocol: "tcp"},
	}
	same := cmp.Comparer(func(a, b network.PortMapping) bool { return a == b })
	if d := cmp.Diff(want, m.ports(), same); d != "" {
		t.Error(d)
	}
	m.Spec.PublishAll = false
	if d := cmp.Diff(want[:1], m.ports(), same); d != "" {
		t.Error(d)
	}
	if err := checkExposed(Spec{PublishAll: true}, Image{ExposedPorts: []string{"132/sctp"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("SCTP: %v", err)
	}
}

func TestVolumes(t *testing.T) {
	got := volumes(Image{Volumes: []string{"/var/lib/x", "data", "../../etc", "/", "/var", "/data/"}})
	if d := cmp.Diff([]string{"/data", "/etc", "/var", "/var/lib/x"}, got); d != "" {
		t.Error(d)
	}
}

func TestFilters(t *testing.T) {
	now := time.Now()
	mk := func(name string, at time.Duration, change func(*Machine)) *entry {
		m := Machine{ID: ID(strings.Repeat(name, 32)), Spec: Spec{Name: "the-" + name, Network: "default", Labels: map[string]string{"of": name, "all": ""}},
			State: Running, Created: now.Add(at), Image: Image{Reference: "team/" + name, Digest: "sha256:0123456789", ExposedPorts: []string{"80/tcp"}}}
		change(&m)
		return &entry{m: m}
	}
	all := []*entry{
		mk("a", 0, func(m *Machine) { m.Health = &health.State{Status: health.Healthy} }),
		mk("b", 1, func(m *Machine) { m.State, m.ExitCode = Stopped, 3 }),
		mk("c", 2, func(m *Machine) { m.Ports = []network.PortMapping{{HostPort: 1, GuestPort: 53, Protocol: "udp"}} }),
	}
	ms := &Machines{byID: map[ID]*entry{}, byName: map[string]*entry{}}
	for _, e := range all {
		ms.byID[e.m.ID], ms.byName[e.m.Spec.Name] = e, e
	}
	for filters, want := range map[string]string{
		"":                                 "abc",
		"name=the-":                        "abc",
		"name=^the-[ab]$":                  "ab",
		"name=a$ name=c$":                  "ac",
		"label=all":                        "abc",
		"label=of=b":                       "b",
		"label=all label=of=c":             "c",
		"label=of=a label=of=b":            "",
		"id=aaaa":                          "a",
		"status=running":                   "ac",
		"status=exited status=running":     "abc",
		"exited=3":                         "b",
		"exited=0":                         "",
		"health=healthy":                   "a",
		"health=none":                      "bc",
		"ancestor=team/a":                  "a",
		"ancestor=docker.io/team/b:latest": "b",
		"ancestor=team/b:other":            "",
		"ancestor=sha256:0123":             "abc",
		"before=the-b":                     "a",
		"since=the-b":                      "c",
		"expose=80":                        "abc",
		"expose=80/udp":                    "",
		"publish=53/udp":                   "c",
		"publish=53":                       "c",
		"network=other":                    "",
		"status=running health=healthy":    "a",
	} {
		f, err := ms.ParseFilters(strings.Fields(filters))
		if err != nil {
			t.Errorf("%s: %v", filters, err)
			continue
		}
		got := ""
		for _, e := range all {
			if f.Keeps(&e.m) {
				got += string(e.m.ID[:1])
			}
		}
		if got != want {
			t.Errorf("%s: %q, want %q", filters, got, want)
		}
		if all := strings.Contains(filters, "status") || strings.Contains(filters, "exited"); f.All != all {
			t.Errorf("%s: all is %v", filters, f.All)
		}
	}
	for _, bad := range []string{"x", "x=y", "name=(", "status=dead", "health=well", "exited=x", "publish=x", "label"} {
		if _, err := ms.ParseFilters([]string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	for _, filter := range []string{"ancestor=x", "ancestor=sha256:0123", "ancestor="} {
		f, err := ms.ParseFilters([]string{filter})
		if err != nil || f.Keeps(&Machine{Spec: Spec{Disk: "/x.img"}, Disk: &diskimage.Image{}}) {
			t.Errorf("%s: a machine of a disk image is chosen (%v)", filter, err)
		}
	}
	if _, err := ms.ParseFilters([]string{"before=nobody"}); !errdefs.IsNotFound(err) {
		t.Errorf("before=nobody: %v", err)
	}
}

func FuzzGuest(f *testing.F) {
	f.Add("size=1m", "loglevel=3", "80/tcp", "name=x")
	f.Fuzz(func(t *testing.T, options, args, exposed, filter string) {
		if o, err := tmpfsOptions(options); err == nil && !strings.Contains(o, "suid") {
			t.Errorf("%q: %q says nothing of suid", options, o)
		}
		if kernelArgsFaults([]string{args}, false) == nil && strings.ContainsAny(args, "\n\x00") {
			t.Errorf("%q is taken", args)
		}
		_, _ = exposedPorts([]string{exposed})
		_, _ = (&Machines{}).ParseFilters([]string{filter})
		for _, v := range volumes(Image{Volumes: []string{options}}) {
			if !strings.HasPrefix(v, "/") || v == "/" || strings.Contains(v+"/", "/../") {
				t.Errorf("%q becomes %q", options, v)
			}
		}
	})
}
