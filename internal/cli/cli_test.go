package cli

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

func TestCreateFlags(t *testing.T) {
	envFile := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(envFile, []byte("# comment\nFILE=1\nBOTH=file\nHERE\nABSENT\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args string
		want *atollv1.MachineSpec
	}{
		{"hello", &atollv1.MachineSpec{}},
		{"hello ls -l --rm -it", &atollv1.MachineSpec{Command: []string{"ls", "-l", "--rm", "-it"}}},
		{"-it --rm --name web hello", &atollv1.MachineSpec{Name: "web", Stdin: true, Tty: true, Remove: true}},
		{"-e A=b=c -e HERE -e ABSENT -e EMPTY= hello", &atollv1.MachineSpec{Env: []string{"A=b=c", "HERE=from here", "EMPTY="}}},
		{"-e BOTH=flag --env-file " + envFile + " hello", &atollv1.MachineSpec{Env: []string{"FILE=1", "BOTH=file", "HERE=from here", "BOTH=flag"}}},
		{"--cpus 2 -m 512M --disk-size 2G hello", &atollv1.MachineSpec{Cpus: 2, MemoryBytes: 512 << 20, DiskBytes: 2 << 30}},
		{"--memory 1M hello", &atollv1.MachineSpec{MemoryBytes: 1 << 20}},
		{"--entrypoint= hello", &atollv1.MachineSpec{SetEntrypoint: true}},
		{"--entrypoint sh hello -c x", &atollv1.MachineSpec{SetEntrypoint: true, Entrypoint: []string{"sh"}, Command: []string{"-c", "x"}}},
		{"--hostname h -w /srv -u 1000:100 hello", &atollv1.MachineSpec{Hostname: "h", WorkingDir: "/srv", User: "1000:100"}},
		{"-l a=b --label c hello", &atollv1.MachineSpec{Labels: map[string]string{"a": "b", "c": ""}}},
		{"--network none --kernel k --vmm qemu --platform linux/arm64 hello", &atollv1.MachineSpec{Network: "none", Kernel: "k", Vmm: "qemu", Platform: "linux/arm64"}},
		{"--stop-signal INT --stop-timeout 30 hello", &atollv1.MachineSpec{StopSignal: "INT", StopTimeout: durationpb.New(30 * time.Second)}},
		{"--stop-timeout 1m30s hello", &atollv1.MachineSpec{StopTimeout: durationpb.New(90 * time.Second)}},
		{"-p 8080:80 -p 53/udp -p 0.0.0.0:443:443 hello", &atollv1.MachineSpec{Ports: []*atollv1.PortMapping{
			{HostPort: 8080, GuestPort: 80, Protocol: "tcp"},
			{GuestPort: 53, Protocol: "udp"},
			{HostAddress: "0.0.0.0", HostPort: 443, GuestPort: 443, Protocol: "tcp"},
		}}},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			a := newAtoll(t)
			a.env["HERE"] = "from here"
			id := strings.TrimSpace(a.ok(append([]string{"create"}, strings.Fields(tt.args)...)...))
			m, err := a.fake.find(id)
			if err != nil {
				t.Fatal(err)
			}
			if tt.want.Image = "hello"; tt.want.Name == "" {
				tt.want.Name = m.Spec.Name
			}
			if d := gocmp.Diff(tt.want, m.Spec, protocmp.Transform()); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestExitCodes holds what each way to end looks like from outside.
func TestExitCodes(t *testing.T) {
	tests := []struct {
		name  string
		args  string
		stdin string
		code  int
		out   string
		err   string // the first line of stderr that is no warning
	}{
		{name: "run", args: "run --rm hello echo a b", out: "a b\n"},
		{name: "run with stderr", args: "run hello warn w", err: "w"},
		{name: "run with a guest's code", args: "run hello exit 7", code: 7},
		{name: "run with stdin", args: "run -i hello cat", stdin: "some input", out: "some input"},
		{name: "run, not found", args: "run hello nope", code: 127, err: `Error: starting machine "made_up_0": entrypoint: nope: no such file`},
		{name: "run, not executable", args: "run -d hello locked", code: 126, err: `Error: starting machine "made_up_0": entrypoint: locked: permission denied`},
		{name: "run, failed otherwise", args: "run --name broken hello nope", code: 125, err: `Error: starting machine "broken": entrypoint: nope: no such file`},
		{name: "run, no image", args: "run --pull never absent", code: 125, err: `Error: image "absent": not found`},
		{name: "run, image nowhere", args: "run nowhere", code: 125, err: `Image nowhere is not here; pulling it`},
		{name: "run, connection lost", args: "run --name m hello exit lost", code: 125, err: `Error: machine "m" runs on: the daemon ended the connection`},
		{name: "run -it without a terminal", args: "run -it hello cat", code: 125, err: "Error: the input device is not a TTY"},
		{name: "run -t without input", args: "run -t hello echo x", out: "x\n"},
		{name: "run, bad flag", args: "run --nope hello", code: 2, err: "Error: unknown flag: --nope"},
		{name: "run, no image named", args: "run", code: 2, err: "Error: requires at least 1 arg(s), only received 0"},
		{name: "run, bad port", args: "run -p x hello", code: 2, err: `Error: port "x": guest port "x" is not a number from 0 to 65535: invalid argument`},
		{name: "run, bad size", args: "run -m lots hello", code: 2, err: `Error: invalid argument "lots" for "-m, --memory" flag: invalid size: 'lots'`},
		{name: "run, bad pull", args: "run --pull sometimes hello", code: 2, err: `Error: --pull "sometimes": want always, missing or never`},
		{name: "exec", args: "exec up echo $HOME 'x'", out: "$HOME 'x'\n"},
		{name: "exec keeps flags of the command", args: "exec up echo -i --all", out: "-i --all\n"},
		{name: "exec with stdin", args: "exec -i up cat", stdin: strings.Repeat("much ", 20000), out: strings.Repeat("much ", 20000)},
		{name: "exec with a guest's code", args: "exec up exit 3", code: 3},
		{name: "exec, not found", args: "exec up nope", code: 127, err: "Error: nope: no such file"},
		{name: "exec, not executable", args: "exec up locked", code: 126, err: "Error: locked: permission denied"},
		{name: "exec detached", args: "exec -d up sleep"},
		{name: "exec, not running", args: "exec down true", code: 125, err: `Error: machine "down" is not running: failed precondition`},
		{name: "exec, no such machine", args: "exec ghost true", code: 125, err: `Error: machine "ghost": not found`},
		{name: "exec, no command", args: "exec up", code: 2, err: "Error: requires at least 2 arg(s), only received 1"},
		{name: "attach, not running", args: "attach down", code: 1, err: `Error: attaching to machine "down": it is created: failed precondition`},
		{name: "unknown command", args: "strat", code: 2, err: `Error: unknown command "strat" for "atoll"; did you mean start?`},
		{name: "unknown subcommand", args: "image pul", code: 2, err: `Error: unknown command "pul" for "atoll image"; did you mean pull or push?`},
		{name: "too many arguments", args: "ps x", code: 2, err: `Error: unknown command "x" for "atoll ps"`},
		{name: "https", args: "--host https://x ps", code: 1, err: `Error: daemon address "https://x": https is not supported yet: not implemented`},
		{name: "chosen host that is not there", args: "--host unix:///nowhere/s ps", code: 1, err: "Error: connecting to the daemon at unix:///nowhere/s: dial unix /nowhere/s: connect: no such file or directory: unavailable"},
		{name: "bad format", args: "ps --format yaml", code: 2, err: `Error: format "yaml": want table, json or a Go template: invalid argument`},
		{name: "logs, bad tail", args: "logs -n some up", code: 2, err: `Error: --tail "some": want a number or all`},
		{name: "build error", args: "build --target broken .", code: 1, err: "Error: building: Dockerfile:3"},
		{name: "build without a context", args: "build", code: 2, err: "Error: accepts 1 arg(s), received 0"},
		{name: "build, no directory", args: "build /nowhere", code: 1, err: `Error: build context "/nowhere": no such directory: not found`},
		{name: "build from a file", args: "build main.go", code: 1, err: `Error: build context "main.go": not a directory: invalid argument`},
		{name: "port", args: "port up 81", code: 1, err: `Error: machine "up": port 81/tcp is not published: not found`},
		{name: "wait", args: "wait up down", out: "0\n0\n"},
		{name: "several, one fails", args: "stop up ghost down", code: 1, out: "up\ndown\n", err: `Error: machine "ghost": not found`},
		{name: "rm refuses what runs", args: "rm up", code: 1, err: `Error: machine "up" runs: failed precondition`},
		{name: "rm", args: "rm -f up down", out: "up\ndown\n"},
		{name: "kill", args: "kill -s HUP up", out: "up\n"},
		{name: "rmi, one fails", args: "rmi ghost hello", code: 1, out: "Untagged: hello\nDeleted: sha256:ab\n", err: `Error: image "ghost": not found`},
		{name: "tag, not implemented by this daemon", args: "tag a b", code: 1, err: "Error: atoll.v1.ImageService.Tag is not implemented"},
		{name: "base build", args: "base build --mirror http://m debian:bookworm", out: "sha256:ba5e\n", err: "I: installing http://m"},
		{name: "kernel pull", args: "kernel pull", out: "debian-6.1\n"},
		{name: "kernel build", args: "kernel build --version 6.1 --arch arm64 -j 3 -t mine --config /etc/hostname-that-is-not-there", code: 1, err: "Error: reading the file of --config: open /etc/hostname-that-is-not-there: no such file or directory"},
		{name: "kernel build, all defaults", args: "kernel build", out: "atoll-6.1.2\n", err: `debian  ""  0`},
		{name: "kernel build from a directory", args: "kernel build -j 3 --arch arm64 --version 6.1 -t mine --source /usr/../src/linux", out: "mine\n", err: `/src/linux 6.1 "" arm64 3`},
		{name: "kernel rm, one fails", args: "kernel rm a ghost b", code: 1, out: "a\nb\n", err: `Error: kernel "ghost": not found`},
		{name: "kernel set-default", args: "kernel set-default a", out: "a\n"},
		{name: "version flag", args: "--version", out: "atoll v0\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := newAtoll(t)
			a.ok("run", "-d", "--name", "up", "-p", "8080:80", "hello", "sleep")
			a.ok("create", "--name", "down", "hello", "sleep")
			// Names made up by the fake count from 0.
			if strings.Contains(tt.err, "made_up_0") {
				a = newAtoll(t)
			}
			a.in = tt.stdin
			r := a.run(strings.Fields(tt.args)...)
			if r.code != tt.code {
				t.Errorf("exit code %d, want %d", r.code, tt.code)
			}
			if d := gocmp.Diff(tt.out, r.out); d != "" {
				t.Errorf("stdout: %s", d)
			}
			if got := firstLine(r.errOut); got != tt.err {
				t.Errorf("stderr: %q, want first %q", r.errOut, tt.err)
			}
			if usage := strings.Contains(r.errOut, "\nUsage: atoll"); usage != (tt.code == 2) {
				t.Errorf("usage shown: %v\n%s", usage, r.errOut)
			}
		})
	}
}

func firstLine(s string) string {
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, "Warning: ") {
			return strings.TrimSuffix(line, "\n")
		}
	}
	return ""
}

func TestRunOutput(t *testing.T) {
	a := newAtoll(t)
	r := a.run("run", "-d", "hello", "sleep")
	if len(r.out) != 33 || r.code != 0 {
		t.Errorf("run -d printed %q, exit code %d; want the whole ID", r.out, r.code)
	}
	if r.errOut != "Warning: no KVM: emulated\n" {
		t.Errorf("warnings: %q; want one, though create and start both gave it", r.errOut)
	}
}

func TestRunPulls(t *testing.T) {
	tests := []struct {
		args  string
		pulls int
	}{
		{"hello", 0}, {"--pull always hello", 1}, {"other", 1}, {"--pull never hello", 0},
	}
	for _, tt := range tests {
		a := newAtoll(t)
		r := a.run(append(append([]string{"run", "--platform", "linux/amd64"}, strings.Fields(tt.args)...), "echo", "x")...)
		if r.code != 0 || len(a.fake.pulled) != tt.pulls {
			t.Errorf("%s: exit code %d, %d pulls, want %d\n%s", tt.args, r.code, len(a.fake.pulled), tt.pulls, r.errOut)
		}
		if tt.pulls > 0 && (a.fake.pulled[0].Platform != "linux/amd64" || !strings.Contains(r.errOut, "efefefefefef: done (1KiB)\n")) {
			t.Errorf("%s: %v\n%s", tt.args, a.fake.pulled[0], r.errOut)
		}
	}
}

// TestRunDiscards: a machine that was to be removed when it stops, and that never ran, is removed.
func TestRunDiscards(t *testing.T) {
	a := newAtoll(t)
	if r := a.run("run", "--rm", "hello", "nope"); r.code != 127 || !strings.Contains(r.errOut, "\nHint: look at atoll logs --boot\n") {
		t.Errorf("exit code %d: %s", r.code, r.errOut)
	}
	if n := len(a.fake.machines); n != 0 {
		t.Errorf("%d machines are left", n)
	}
	a.run("run", "hello", "nope")
	if n := len(a.fake.machines); n != 1 {
		t.Errorf("without --rm %d machines are left, want 1", n)
	}
}

func TestSignals(t *testing.T) {
	inGuest := []string{"sleeping", "Warning"} // the warning is printed when the start is done
	tests := []struct {
		args   string
		signal syscall.Signal
		when   []string // is on stdout or stderr when the signal comes
		code   int
		out    string
	}{
		{"run hello sleep", syscall.SIGINT, inGuest, 130, "sleeping\ngot INT\n"},
		{"run hello sleep", syscall.SIGTERM, inGuest, 143, "sleeping\ngot TERM\n"},
		{"run hello sleep", syscall.SIGUSR1, inGuest, 138, "sleeping\ngot USR1\n"},
		{"exec up sleep", syscall.SIGINT, inGuest[:1], 130, "sleeping\ngot INT\n"},
		{"pull slow", syscall.SIGINT, []string{"slow: downloading"}, 130, ""},
		{"run slow", syscall.SIGTERM, []string{"slow: downloading"}, 143, ""},
	}
	for _, tt := range tests {
		t.Run(tt.args+" "+tt.signal.String(), func(t *testing.T) {
			a := newAtoll(t)
			a.ok("run", "-d", "--name", "up", "hello", "sleep")
			var out, errOut syncBuffer
			code := make(chan int)
			go func() { code <- Main(t.Context(), strings.Fields(tt.args), a.environment(&out, &errOut)) }()
			waitFor(t, func() bool {
				for _, part := range tt.when {
					if !strings.Contains(out.String()+errOut.String(), part) {
						return false
					}
				}
				return true
			})
			if err := syscall.Kill(os.Getpid(), tt.signal); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-code:
				if got != tt.code || out.String() != tt.out {
					t.Errorf("exit code %d, want %d; stdout %q, want %q; stderr %q", got, tt.code, out.String(), tt.out, errOut.String())
				}
			case <-time.After(5 * time.Second):
				t.Fatalf("did not end; stdout %q, stderr %q", out.String(), errOut.String())
			}
		})
	}
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("waited for too long")
		}
	}
}

func TestOutputs(t *testing.T) {
	a := newAtoll(t)
	id := strings.TrimSpace(a.ok("run", "-d", "--name", "web", "-p", "8080:80", "-p", "[::1]:53:53/udp", "-e", "SECRET=s3", "-l", "b=2", "-l", "a=1", "hello", "sleep", "a b"))
	a.ok("create", "--name", "db", "hello", "sleep")
	tests := []struct {
		args []string
		want string
	}{
		{[]string{"ps", "-q"}, id[:12] + "\n"},
		{[]string{"ps", "-q", "--no-trunc"}, id + "\n"},
		{[]string{"ps", "-a", "--format", "{{.Names}}|{{.State}}|{{.Command}}|{{.Ports}}|{{.Labels}}"},
			"db|created|sleep||\nweb|running|sleep \"a b\"|127.0.0.1:8080->80/tcp, [::1]:53->53/udp|a=1,b=2\n"},
		{[]string{"inspect", "--format", "{{.ID}} {{.Spec.Env}} {{.Network.Address}} {{json .Ports}}", "web"},
			id + ` [SECRET=s3] 10.0.0.2/24 [{"hostAddress":"127.0.0.1","hostPort":8080,"guestPort":80,"protocol":"tcp"},{"hostAddress":"::1","hostPort":53,"guestPort":53,"protocol":"udp"}]` + "\n"},
		{[]string{"port", "web"}, "80/tcp -> 127.0.0.1:8080\n53/udp -> [::1]:53\n"},
		{[]string{"port", "web", "53/udp"}, "[::1]:53\n"},
		{[]string{"images"}, "REPOSITORY   TAG      IMAGE ID       CREATED   SIZE\nhello        latest   abababababab             3MiB\nhello        1.0      abababababab             3MiB\n"},
		{[]string{"image", "ls", "-q"}, "abababababab\n"},
		{[]string{"image", "inspect", "--format", "{{json .Config.Cmd}} {{.Config.Healthcheck.Test}} {{.OS}}", "hello"}, `["serve","--all"] [NONE] linux` + "\n"},
		{[]string{"kernel", "ls", "-q"}, "debian-6.1\n"},
		{[]string{"base", "ls"}, "NAME              IMAGE ID   BUILT     SIZE   DESCRIPTION\ndebian:bookworm              not yet          Debian 12\n"},
		{[]string{"logs", "web"}, "one\ntwo\n"},
		{[]string{"logs", "-t", "web"}, "2026-01-02T03:04:05.000000000Z one\n2026-01-02T03:04:05.000000000Z two\n"},
		{[]string{"version", "--format", "{{.Client.Version}} {{.Server.Version}} {{.Server.PID}}"}, "v0 v1 42\n"},
		{[]string{"build", "-q", "."}, "sha256:beef\n"},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			if d := gocmp.Diff(tt.want, a.ok(tt.args...)); d != "" {
				t.Error(d)
			}
		})
	}
	if j := a.ok("ps", "-a", "--format", "json"); strings.Contains(j, "s3") || !strings.HasPrefix(j, "[\n") {
		t.Errorf("ps --format json: %s", j)
	}
	r := a.run("inspect", "ghost", "web")
	if r.code != 1 || !strings.Contains(r.out, `"name": "web"`) || r.errOut != "Error: machine \"ghost\": not found\nHint: atoll ps -a lists them\n" {
		t.Errorf("inspect ghost web: %d\n%s\n%s", r.code, r.out, r.errOut)
	}
}

func TestPsTable(t *testing.T) {
	at := func(ago time.Duration) *timestamppb.Timestamp { return timestamppb.New(epoch.Add(-ago)) }
	tests := []struct {
		machine *atollv1.Machine
		want    string
	}{
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_CREATED}, "Created"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_STARTING}, "Starting"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_RUNNING, StartedAt: at(5 * time.Minute)}, "Up 5 minutes"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_PAUSED, StartedAt: at(5 * time.Minute)}, "Up 5 minutes (Paused)"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_STOPPED, ExitCode: 3, Reason: "exited", FinishedAt: at(2 * time.Hour)}, "Exited (3) 2 hours ago"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_STOPPED, ExitCode: 137, Reason: "vmm-died", FinishedAt: at(2 * time.Second)}, "Exited (137) 2 seconds ago, vmm-died"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_FAILED, FailedStep: "kernel", FinishedAt: at(2 * time.Second)}, "Failed (kernel) 2 seconds ago"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_RUNNING, StartedAt: at(time.Hour), Health: &atollv1.HealthStatus{Status: "starting"}},
			"Up About an hour (health: starting)"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_RUNNING, StartedAt: at(time.Hour), Health: &atollv1.HealthStatus{Status: "healthy"}},
			"Up About an hour (healthy)"},
		{&atollv1.Machine{State: atollv1.MachineState_MACHINE_STATE_STOPPED, Reason: "exited", FinishedAt: at(time.Hour), Health: &atollv1.HealthStatus{Status: "unhealthy"}},
			"Exited (0) About an hour ago"},
	}
	for _, tt := range tests {
		if got := status(tt.machine, epoch); got != tt.want {
			t.Errorf("status = %q, want %q", got, tt.want)
		}
	}
	a := newAtoll(t)
	a.ok("run", "-d", "--name", "web", "-p", "8080:80", "hello", "sleep", "for quite a long time")
	lines := strings.Split(a.ok("ps"), "\n")
	if got := strings.Join(strings.Fields(lines[0]), " "); got != "MACHINE ID IMAGE COMMAND CREATED STATUS PORTS NAMES" {
		t.Errorf("columns: %s", got)
	}
	for _, part := range []string{"127.0.0.1:8080->80/tcp   web", "…\"   "} {
		if !strings.Contains(lines[1], part) {
			t.Errorf("%q is not in %q", part, lines[1])
		}
	}
}

func TestRequests(t *testing.T) {
	a := newAtoll(t)
	a.env["HERE"] = "from here"
	a.ok("run", "-d", "--name", "up", "hello", "sleep")
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}

	a.ok("build", "-t", "a:1", "-t", "b", "-f", "../cli/main.go", "--target", "x", "--build-arg", "A=1", "--build-arg", "HERE", "--build-arg", "ABSENT", "--label", "l=2", "--no-cache", "--pull", "--progress", "plain", "ui")
	want := &atollv1.BuildStart{
		ContextDir: filepath.Join(cwd, "ui"), Dockerfile: filepath.Join(cwd, "main.go"), Tags: []string{"a:1", "b"}, Target: "x",
		BuildArgs: map[string]string{"A": "1", "HERE": "from here"}, Labels: map[string]string{"l": "2"}, NoCache: true, Pull: true,
	}
	if d := gocmp.Diff(want, a.fake.built, protocmp.Transform()); d != "" {
		t.Errorf("build: %s", d)
	}

	a.ok("exec", "-u", "1000", "-w", "/srv", "-e", "HERE", "-t", "up", "echo", "-n", "")
	if d := gocmp.Diff(&atollv1.ExecStart{Machine: "up", Argv: []string{"echo", "-n", ""}, Env: []string{"HERE=from here"}, User: "1000", WorkingDir: "/srv", Tty: true}, a.fake.execed, protocmp.Transform()); d != "" {
		t.Errorf("exec: %s", d)
	}

	for _, tt := range []struct {
		args string
		want *atollv1.LogsRequest
	}{
		{"logs up", &atollv1.LogsRequest{Machine: "up", Tail: -1, TailAll: true}},
		{"logs -f -n 3 up", &atollv1.LogsRequest{Machine: "up", Follow: true, Tail: 3}},
		{"logs --boot --tail 0 up", &atollv1.LogsRequest{Machine: "up", Boot: true}},
		{"logs --tail 0 --since 2026-01-02T03:04:05Z up", &atollv1.LogsRequest{Machine: "up", Since: timestamppb.New(epoch)}},
	} {
		a.ok(strings.Fields(tt.args)...)
		if d := gocmp.Diff(tt.want, a.fake.logs, protocmp.Transform()); d != "" {
			t.Errorf("%s: %s", tt.args, d)
		}
	}

	for _, args := range []string{"logs --boot -t up", "logs --boot --since 1m up", "logs --boot --until 1m up", "logs --provisioning --until 1m up"} {
		if r := a.run(strings.Fields(args)...); r.code != 2 || !strings.Contains(r.errOut, "only") {
			t.Errorf("%s: %+v", args, r)
		}
	}

	a.ok("restart", "-t", "3", "up")
	a.ok("stop", "up")
	wantStops := []*atollv1.StopMachineRequest{{Machine: "up", Timeout: durationpb.New(3 * time.Second)}, {Machine: "up"}}
	if d := gocmp.Diff(wantStops, a.fake.stopped, protocmp.Transform()); d != "" {
		t.Errorf("stop: %s", d)
	}

	r := a.run("events", "--filter", "type=machine", "--since", "1767323045", "--format", "json")
	if d := gocmp.Diff(&atollv1.EventsRequest{Filters: []string{"type=machine"}, Since: timestamppb.New(epoch)}, a.fake.events, protocmp.Transform()); d != "" {
		t.Errorf("events: %s", d)
	}
	line := `{"seq":1,"time":"2026-01-02T03:04:05Z","type":"machine","action":"start","id":"abc","attributes":{"image":"hello","name":"web"}}` + "\n"
	if r.code != 1 || r.out != line || r.errOut != "Error: bus closed\n" {
		t.Errorf("events: %+v", r)
	}
	a.fake.eventsEnd = connect.NewError(connect.CodeCanceled, context.Canceled) // as of a daemon that ends
	if r := a.run("events"); !strings.HasSuffix(r.out, " machine start abc (image=hello, name=web)\n") || r.code != 1 || r.errOut != "Error: the daemon ended the connection\n" {
		t.Errorf("events: %+v", r)
	}
}

func TestDoctor(t *testing.T) {
	a := newAtoll(t)
	a.fake.checks = []*atollv1.Check{
		{Name: "kvm", Level: atollv1.Check_LEVEL_WARN, Message: "no /dev/kvm: emulated", Hint: "modprobe kvm"},
		{Name: "qemu", Level: atollv1.Check_LEVEL_OK, Message: "7.2"},
	}
	want := "warn  kvm   no /dev/kvm: emulated\n      Hint: modprobe kvm\nok    qemu  7.2\n"
	if r := a.run("doctor"); r.code != 0 || r.out != want {
		t.Errorf("%+v, want %q", r, want)
	}
	a.fake.checks = []*atollv1.Check{{Name: "qemu", Level: atollv1.Check_LEVEL_FAIL, Message: "missing", Hint: "apt-get install qemu-system-x86"}}
	if r := a.run("doctor"); r.code != 1 || r.out != "FAIL  qemu  missing\n      Hint: apt-get install qemu-system-x86\n" || r.errOut != "" {
		t.Errorf("%+v", r)
	}
	a.env["ATOLL_HOST"] = "unix:///nowhere/s"
	if r := a.run("doctor"); r.code != 1 || !strings.HasPrefix(r.out, "FAIL  daemon  connecting to the daemon") {
		t.Errorf("%+v", r)
	}
	if r := a.run("version"); r.code != 1 || !strings.HasPrefix(r.out, "Client:\n Version:    v0\n") {
		t.Errorf("%+v", r)
	}
}

func TestCompletion(t *testing.T) {
	a := newAtoll(t)
	a.ok("create", "--name", "web", "hello")
	for args, want := range map[string]string{
		"stop":         "web",
		"run":          "hello:1.0",
		"run --pull":   "missing",
		"ps --format":  "json",
		"logs --boot ": "web",
	} {
		out := a.ok(append(append([]string{"__complete"}, strings.Fields(args)...), "")...)
		if !strings.Contains(out, want+"\n") {
			t.Errorf("%s: %q lacks %q", args, out, want)
		}
	}
	if out := a.ok("completion", "bash"); !strings.Contains(out, "__start_atoll") {
		t.Error("no completion script for bash")
	}
}

// TestHelp holds that every command explains itself with an example.
func TestHelp(t *testing.T) {
	root := newRootCmd(&environment{})
	cmds := root.Commands()
	for len(cmds) > 0 {
		c := cmds[0]
		cmds = append(cmds[1:], c.Commands()...)
		if c.Short == "" || !strings.Contains(c.Example, "  atoll ") {
			t.Errorf("%s: short %q, example %q", c.CommandPath(), c.Short, c.Example)
		}
		for line := range strings.Lines(c.Long) {
			if len(line) > 81 && strings.Count(c.Long, "\n") > 0 {
				t.Errorf("%s: a line of help is longer than 80: %s", c.CommandPath(), line)
			}
		}
	}
}
