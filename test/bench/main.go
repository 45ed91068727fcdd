// Command bench measures Atoll against its floor: ratios of medians, taken turn by turn in one run, since machines are noisy. It writes
// docs/benchmarks.md. `make bench` calls it; it uses a home of its own, made from the tests' fixture.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/agent/transport"
)

type bench struct {
	atoll  string
	home   string
	client *client.Client
	out    *strings.Builder
	mib    int64 // of each measurement of streams
}

func main() {
	atoll := flag.String("atoll", "bin/atoll", "the binary to measure")
	out := flag.String("out", "", "the file to write; empty: stdout only")
	home := flag.String("home", "", "an ATOLL_HOME with a kernel and the images busybox and debian:bookworm")
	rounds := flag.Int("n", 9, "rounds of each measurement that boots a machine")
	only := flag.String("only", "", "measure only this: boots, kernels, builds, disks, agent, execs, many, ssh, streams, gib, or filesystems, which is measured only then")
	mib := flag.Int64("mib", 64, "mebibytes of each measurement of streams")
	flag.Parse()
	if err := run(*atoll, *home, *out, *rounds, *mib, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(atoll, home, out string, rounds int, mib int64, only string) error {
	path, err := filepath.Abs(atoll)
	if err != nil {
		return err
	}
	b := &bench{atoll: path, home: home, mib: mib, out: &strings.Builder{}}
	if _, err := b.cli("version"); err != nil {
		return err
	}
	if b.client, err = client.New("unix://" + filepath.Join(home, "atoll.sock")); err != nil {
		return err
	}
	measures := []struct {
		name string
		do   func(int) error
	}{{"boots", b.boots}, {"kernels", b.kernels}, {"builds", b.builds}, {"disks", b.rootDisks}, {"agent", b.agentBoot}, {"execs", b.execs}, {"many", b.manyExecs},
		{"ssh", b.ssh}, {"streams", b.throughput}, {"gib", b.gibibyte}, {"filesystems", b.fileSystems}}
	for _, m := range measures {
		if m.name != only && (only != "" || m.name == "filesystems") {
			continue
		}
		if err := m.do(rounds); err != nil {
			return err
		}
	}
	fmt.Print(b.out.String())
	if out == "" {
		return nil
	}
	return os.WriteFile(out, []byte(header()+b.out.String()), 0o644)
}

func header() string {
	cpu := ""
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	return fmt.Sprintf("# Benchmarks\n\nWritten by `make bench` on %s. Ratios count; times are of that one machine (%s, %d CPUs) and run.\n\n",
		time.Now().UTC().Format(time.DateOnly), cpu, cpus())
}

func cpus() int {
	out, _ := exec.Command("nproc").Output()
	n := 0
	fmt.Sscan(string(out), &n)
	return n
}

func (b *bench) row(format string, args ...any) { fmt.Fprintf(b.out, format+"\n", args...) }

func (b *bench) command(args ...string) *exec.Cmd {
	cmd := exec.Command(b.atoll, args...)
	cmd.Env = append(os.Environ(), "ATOLL_HOME="+b.home)
	return cmd
}

func (b *bench) cli(args ...string) (string, error) {
	out, err := b.command(args...).Output()
	if err != nil {
		return "", fmt.Errorf("atoll %s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

func quantile(d []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[int(math.Ceil(q*float64(len(s))))-1]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }

// running returns a running machine and its VMM's command line.
func (b *bench) running(name string) (*atollv1.Machine, []string, error) {
	got, err := b.client.Machines.Get(context.Background(), connect.NewRequest(&atollv1.GetMachineRequest{Machine: name}))
	if err != nil {
		return nil, nil, err
	}
	argv, err := b.argv(got.Msg.GetMachine())
	return got.Msg.GetMachine(), argv, err
}

// boots: `atoll run` of a cached image to the first byte of its output, against the same QEMU options, kernel, initramfs and guest
// configuration started by hand.
func (b *bench) boots(rounds int) error {
	// One machine gives the options, while it runs, and the disks to start by hand.
	if _, err := b.cli("run", "-d", "--name", "bench-floor", "busybox", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-floor")
	m, argv, err := b.running("bench-floor")
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"kill", "bench-floor"}, {"create", "--name", "bench-own", "busybox", "true"}} {
		if _, err := b.cli(args...); err != nil {
			return err
		}
	}
	defer b.cli("rm", "-f", "bench-own")
	var runs, floors, own []time.Duration
	for range rounds {
		f, err := b.floor(m, argv)
		if err != nil {
			return err
		}
		r, err := b.firstOutput()
		if err != nil {
			return err
		}
		floors, runs = append(floors, f), append(runs, r)
		o, err := b.beforeExec()
		if err != nil {
			return err
		}
		own = append(own, o)
	}
	b.row("## Starting a machine\n\n`atoll run --rm busybox echo x`, image cached, until the first byte of the output; the floor is the same QEMU options, kernel, initramfs and")
	b.row("guest configuration started by hand. %d rounds, turn by turn.\n\n| | median | fastest |\n|---|---|---|", rounds)
	b.row("| floor | %s | %s |\n| `atoll run` | %s | %s |", ms(quantile(floors, .5)), ms(slices.Min(floors)), ms(quantile(runs, .5)), ms(slices.Min(runs)))
	b.row("| **run ÷ floor** (≤ 1.15) | **%.3f** | %.3f |", ratio(quantile(runs, .5), quantile(floors, .5)), ratio(slices.Min(runs), slices.Min(floors)))
	b.row("| **daemon's work before the VMM's exec** (≤ 15 ms) | **%s** | %s |\n", ms(quantile(own, .5)), ms(slices.Min(own)))
	return nil
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// kernels: the same run on our own kernel and on Debian's, turn by turn.
func (b *bench) kernels(rounds int) error {
	own := os.Getenv("ATOLL_TEST_OWN_KERNEL")
	if own == "" {
		return errors.New("ATOLL_TEST_OWN_KERNEL is not set: test/fixture prints it")
	}
	debian, err := b.cli("kernel", "inspect", "--format", "{{.Name}}")
	if err != nil {
		return err
	}
	if _, err := b.cli("kernel", "import", own, "bench-own"); err != nil {
		return err
	}
	defer b.cli("kernel", "rm", "bench-own")
	var slow, fast []time.Duration
	for range rounds {
		d, err := b.firstOutput("--kernel", debian)
		if err != nil {
			return err
		}
		o, err := b.firstOutput("--kernel", "bench-own")
		if err != nil {
			return err
		}
		slow, fast = append(slow, d), append(fast, o)
	}
	b.row("## Kernels\n\n`atoll run --rm busybox echo x`, image cached, until the first byte of the output, on the kernel of `atoll kernel build` and on that of")
	b.row("`atoll kernel pull`. %d rounds, turn by turn.\n\n| | median | fastest |\n|---|---|---|", rounds)
	b.row("| Debian's cloud kernel | %s | %s |\n| our own | %s | %s |", ms(quantile(slow, .5)), ms(slices.Min(slow)), ms(quantile(fast, .5)), ms(slices.Min(fast)))
	b.row("| **own ÷ Debian's** | **%.2f** | %.2f |\n", ratio(quantile(fast, .5), quantile(slow, .5)), ratio(slices.Min(fast), slices.Min(slow)))
	return nil
}

func (b *bench) firstOutput(options ...string) (time.Duration, error) {
	cmd := b.command(append(append([]string{"run", "--rm"}, options...), "busybox", "echo", "x")...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	_, err = bufio.NewReader(stdout).ReadByte()
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("run: no output: %w", err)
	}
	return took, cmd.Wait()
}

// beforeExec adds up the steps of a start that precede the VMM's process, the record's write included.
func (b *bench) beforeExec() (time.Duration, error) {
	ctx := context.Background()
	if _, err := b.client.Machines.Start(ctx, connect.NewRequest(&atollv1.StartMachineRequest{Machine: "bench-own"})); err != nil {
		return 0, err
	}
	if _, err := b.client.Machines.Wait(ctx, connect.NewRequest(&atollv1.WaitMachineRequest{Machine: "bench-own"})); err != nil {
		return 0, err
	}
	m, err := b.client.Machines.Get(ctx, connect.NewRequest(&atollv1.GetMachineRequest{Machine: "bench-own"}))
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, s := range m.Msg.GetMachine().GetSteps() {
		sum += s.GetTook().AsDuration()
		if s.GetName() == "vmm" { // includes the exec itself
			break
		}
	}
	return sum, nil
}

func (b *bench) floor(m *atollv1.Machine, argv []string) (time.Duration, error) {
	var took time.Duration
	began := time.Now()
	err := b.byHand(argv, configOf(m), func(int, *agentv1.Output) error {
		took = time.Since(began)
		return io.EOF
	})
	if took == 0 {
		return 0, fmt.Errorf("floor: no output: %w", err)
	}
	return took, nil
}

// byHand starts QEMU with these words and configures the guest; output gets QEMU's process ID and
// what the entrypoint writes, until it returns an error.
func (b *bench) byHand(argv []string, c *agentv1.Config, output func(int, *agentv1.Output) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, stop, err := startQEMU(ctx, argv)
	if err != nil {
		return err
	}
	pid := stop.pid
	defer stop.now()
	session, err := transport.Connect(ctx, conn, transport.NewToken())
	if err != nil {
		return err
	}
	agent := host.New(session)
	defer agent.Close()
	if err := agent.Configure(ctx, c, func(string) {}); err != nil {
		return err
	}
	return agent.Output(ctx, 0, func(o *agentv1.Output) error { return output(pid, o) })
}

// qemu is a QEMU that was started by hand.
type qemu struct {
	pid int
	now func() // ends it
}

// startQEMU starts QEMU with these words and connects to the agent's port.
func startQEMU(ctx context.Context, argv []string) (net.Conn, qemu, error) {
	const first = 3 // QMP's, the console's and the agent's sockets are inherited from here on
	sockets := make([]*os.File, 3)
	paths := make([]string, len(sockets))
	port := -1
	for _, a := range argv {
		if _, err := fmt.Sscanf(a, "socket,id=agent,fd=%d,", &port); err == nil {
			break
		}
	}
	if port -= first; port < 0 || port >= len(sockets) {
		return nil, qemu{}, fmt.Errorf("the agent's socket is number %d of QEMU's", port)
	}
	dir, err := os.MkdirTemp("", "floor")
	if err != nil {
		return nil, qemu{}, err
	}
	defer os.RemoveAll(dir)
	for i := range sockets {
		paths[i] = filepath.Join(dir, fmt.Sprint(i))
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: paths[i]})
		if err != nil {
			return nil, qemu{}, err
		}
		l.SetUnlinkOnClose(false)
		if sockets[i], err = l.File(); err != nil {
			return nil, qemu{}, err
		}
		l.Close()
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.ExtraFiles, cmd.Stderr = sockets, os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, qemu{}, err
	}
	q := qemu{cmd.Process.Pid, func() { cmd.Process.Kill(); cmd.Wait() }}
	for _, s := range sockets {
		s.Close()
	}
	conn, err := net.Dial("unix", paths[port])
	if err != nil {
		q.now()
		return nil, qemu{}, err
	}
	return conn, q, nil
}

// argv is how the driver started the machine, as it keeps it beside the console; the NIC's socket gets a place of its own.
func (b *bench) argv(m *atollv1.Machine) ([]string, error) {
	data, err := os.ReadFile(filepath.Join(filepath.Dir(m.GetVmm().GetConsole()), "argv.json"))
	if err != nil {
		return nil, err
	}
	var argv []string
	if err := json.Unmarshal(data, &argv); err != nil {
		return nil, err
	}
	for i, a := range argv {
		if strings.HasPrefix(a, "dgram,") {
			argv[i] = strings.ReplaceAll(a, ".vmm", ".floor")
		}
	}
	return argv, nil
}

func configOf(m *atollv1.Machine) *agentv1.Config {
	return &agentv1.Config{
		MachineId: m.GetId(), Hostname: m.GetSpec().GetHostname(), UnixNanos: time.Now().UnixNano(), Entropy: make([]byte, 64),
		Root: &agentv1.Root{
			Disks:   []*agentv1.RootDisk{{Device: "/dev/vda", Type: "erofs", HasRoot: true}}, // busybox has one
			Scratch: "/dev/vdb", ScratchType: "ext4",
		},
		DnsServers: []string{"10.215.0.1"},
		Interfaces: []*agentv1.Interface{{Mac: m.GetNetwork().GetMac(), Address: m.GetNetwork().GetAddress() + "/16", Gateway: "10.215.0.1", Mtu: 65520}},
		Process:    &agentv1.Process{Argv: []string{"echo", "x"}, Env: []string{"PATH=/bin"}, WorkingDir: "/"},
	}
}

// builds: a build with nothing changed, against BuildKit's own share of it.
func (b *bench) builds(int) error {
	dir, err := os.MkdirTemp("", "bench-build")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM busybox\nCOPY Dockerfile /\nRUN echo x >/x\n"), 0o644); err != nil {
		return err
	}
	var whole, solve []time.Duration
	for i := range 12 {
		began := time.Now()
		res, err := b.buildOnce(&atollv1.BuildStart{ContextDir: dir, Tags: []string{"bench-build"}})
		if err != nil {
			return err
		}
		if i > 1 {
			whole, solve = append(whole, time.Since(began)), append(solve, res.GetSolve().AsDuration())
		}
	}
	b.row("## Building\n\nA build with nothing changed: two instructions after `FROM busybox`. 10 rounds.\n\n| | median |\n|---|---|")
	b.row("| BuildKit's own solve | %s |\n| `Build` call | %s |\n| **build ÷ solve** (≤ 1.2) | **%.2f** |\n", ms(quantile(solve, .5)), ms(quantile(whole, .5)), ratio(quantile(whole, .5), quantile(solve, .5)))
	return nil
}

func (b *bench) buildOnce(start *atollv1.BuildStart) (*atollv1.BuildResult, error) {
	stream := b.client.Build.Build(context.Background())
	defer stream.CloseResponse()
	if err := stream.Send(&atollv1.BuildRequest{Kind: &atollv1.BuildRequest_Start{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	for {
		r, err := stream.Receive()
		if err != nil {
			return nil, err
		}
		if res := r.GetResult(); res != nil {
			return res, nil
		}
	}
}

// execs: round trips of exec /bin/true through the API and through the CLI.
func (b *bench) execs(int) error {
	if _, err := b.cli("run", "-d", "--name", "bench-exec", "busybox", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-exec")
	var api, cli []time.Duration
	for i := range 210 {
		began := time.Now()
		if err := b.exec("bench-exec", "/bin/true"); err != nil {
			return err
		}
		if i >= 10 {
			api = append(api, time.Since(began))
		}
	}
	for range 30 {
		began := time.Now()
		if _, err := b.cli("exec", "bench-exec", "/bin/true"); err != nil {
			return err
		}
		cli = append(cli, time.Since(began))
	}
	b.row("## exec\n\nRound trip of `/bin/true` in a running machine; the API 200 times, the CLI 30 times.\n\n| | p50 | p99 |\n|---|---|---|")
	b.row("| API | %s | %s |\n| `atoll exec` | %s | %s |", ms(quantile(api, .5)), ms(quantile(api, .99)), ms(quantile(cli, .5)), ms(quantile(cli, .99)))
	b.row("")
	return nil
}

func (b *bench) exec(machine string, argv ...string) error {
	stream := b.client.Machines.Exec(context.Background())
	err := stream.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Start{Start: &atollv1.ExecStart{Machine: machine, Argv: argv}}})
	if err != nil {
		return err
	}
	defer stream.CloseResponse()
	if err := stream.CloseRequest(); err != nil {
		return err
	}
	for {
		res, err := stream.Receive()
		if err != nil {
			return err
		}
		if c, ok := res.GetKind().(*atollv1.ExecResponse_ExitCode); ok {
			if c.ExitCode != 0 {
				return fmt.Errorf("exec: exit code %d", c.ExitCode)
			}
			return nil
		}
	}
}
