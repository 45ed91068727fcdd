package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
)

// ownKernel imports the kernel of the fixture, which has everything built in.
func (b *bench) ownKernel() (name string, remove func(), err error) {
	own := os.Getenv("ATOLL_TEST_OWN_KERNEL")
	if own == "" {
		return "", nil, errors.New("ATOLL_TEST_OWN_KERNEL is not set: test/fixture prints it")
	}
	if _, err := b.cli("kernel", "import", own, "bench-own"); err != nil {
		return "", nil, err
	}
	return "bench-own", func() { b.cli("kernel", "rm", "bench-own") }, nil
}

// throughput: bytes through exec, against the same machine's port with a program at its end that has no protocol.
func (b *bench) throughput(rounds int) error {
	kernel, remove, err := b.ownKernel()
	if err != nil {
		return err
	}
	defer remove()
	if _, err := b.cli("run", "-d", "--name", "bench-stream", "--kernel", kernel, "busybox", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-stream")
	_, argv, err := b.running("bench-stream")
	if err != nil {
		return err
	}
	raw, stop, err := bootRaw(argv)
	if err != nil {
		return err
	}
	defer stop()
	size := b.mib << 20
	var speeds [6][]float64 // to the guest and from it: ours, raw with a process, raw
	for range rounds {
		for i, do := range []func() (time.Duration, error){
			func() (time.Duration, error) { return b.toGuest("bench-stream", size) },
			func() (time.Duration, error) { return rawTo(raw, 'R', size) },
			func() (time.Duration, error) { return rawTo(raw, 'r', size) },
			func() (time.Duration, error) { return b.fromGuest("bench-stream", size) },
			func() (time.Duration, error) { return rawFrom(raw, 'W', size) },
			func() (time.Duration, error) { return rawFrom(raw, 'w', size) },
		} {
			took, err := do()
			if err != nil {
				return err
			}
			speeds[i] = append(speeds[i], float64(size)/took.Seconds()/1e6)
		}
	}
	var mid [6]float64
	for i, s := range speeds {
		slices.Sort(s)
		mid[i] = s[len(s)/2]
	}
	b.row("## Streams\n\n%d MiB through `exec` by the API, to `dd of=/dev/null` in the guest and from `dd if=/dev/zero` there, timed from the command's start to its", b.mib)
	b.row("exit. Against it a guest of the same QEMU options and kernel whose init moves the bytes over the virtio-serial port with no protocol: between")
	b.row("the port and a process that does what `dd` does, by a pipe as with exec; and by itself, with no process. Median of %d rounds, turn by turn.\n", rounds)
	b.row("| | exec | raw port and a process | **exec ÷ that** (≥ 0.7) | raw port alone | exec ÷ that |\n|---|---|---|---|---|---|")
	b.row("| to the guest | %.0f MB/s | %.0f MB/s | **%.2f** | %.0f MB/s | %.2f |", mid[0], mid[1], mid[0]/mid[1], mid[2], mid[0]/mid[2])
	b.row("| from the guest | %.0f MB/s | %.0f MB/s | **%.2f** | %.0f MB/s | %.2f |\n", mid[3], mid[4], mid[3]/mid[4], mid[5], mid[3]/mid[5])
	return nil
}

// bootRaw boots a guest like that of argv with rawport as its init, and returns its port.
func bootRaw(argv []string) (net.Conn, func(), error) {
	dir, err := os.MkdirTemp("", "raw")
	if err != nil {
		return nil, nil, err
	}
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/init", "./test/bench/rawport")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("building rawport: %w\n%s", err, out)
	}
	init, err := os.ReadFile(dir + "/init")
	if err != nil {
		return nil, nil, err
	}
	var cpio bytes.Buffer
	entry := func(name string, mode int, data []byte) {
		fmt.Fprintf(&cpio, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		cpio.Write(make([]byte, -cpio.Len()&3))
		cpio.Write(data)
		cpio.Write(make([]byte, -cpio.Len()&3))
	}
	entry("dev", 0o40755, nil)
	entry("init", 0o100755, init)
	entry("TRAILER!!!", 0, nil)
	initramfs := filepath.Join(dir, "initramfs")
	if err := os.WriteFile(initramfs, cpio.Bytes(), 0o600); err != nil {
		return nil, nil, err
	}
	argv = slices.Clone(argv)
	for i, a := range argv {
		if a == "-initrd" {
			argv[i+1] = initramfs
		}
		if before, _, ok := strings.Cut(a, ",logfile="); ok {
			argv[i] = before
		}
		if strings.HasPrefix(a, "driver=raw,") && !strings.Contains(a, "read-only=on") {
			argv[i] += ",file.locking=off,read-only=on" // the machine has it
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	conn, stop, err := startQEMU(ctx, argv)
	if err != nil {
		cancel()
		return nil, nil, err
	}
	return conn, func() { conn.Close(); stop.now(); cancel(); os.RemoveAll(dir) }, nil
}

func order(kind byte, size int64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kind}, uint64(size))
}

func rawTo(c net.Conn, kind byte, size int64) (time.Duration, error) {
	began := time.Now()
	if _, err := c.Write(order(kind, size)); err != nil {
		return 0, err
	}
	if _, err := io.CopyN(onlyWriter{c}, noise(), size); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return time.Since(began), err
}

func rawFrom(c net.Conn, kind byte, size int64) (time.Duration, error) {
	began := time.Now()
	if _, err := c.Write(order(kind, size)); err != nil {
		return 0, err
	}
	_, err := io.CopyN(io.Discard, c, size)
	return time.Since(began), err
}

// onlyWriter hides ReadFrom, so that io.Copy has a buffer of its usual size.
type onlyWriter struct{ io.Writer }

// toGuest sends bytes to a command's stdin.
func (b *bench) toGuest(machine string, size int64) (time.Duration, error) {
	_, took, err := b.stream(machine, io.LimitReader(noise(), size), io.Discard, "dd", "of=/dev/null", "bs=64k")
	return took, err
}

func (b *bench) fromGuest(machine string, size int64) (time.Duration, error) {
	n, took, err := b.stream(machine, nil, io.Discard, "dd", "if=/dev/zero", "bs=64k", fmt.Sprintf("count=%d", size>>16))
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes of %d came", n, size)
	}
	return took, err
}

// noise is a mebibyte of random bytes over and over.
func noise() io.Reader {
	block := make([]byte, 1<<20)
	_, _ = rand.Read(block)
	return &repeated{block: block}
}

type repeated struct {
	block []byte
	at    int
}

func (r *repeated) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.at:])
	r.at = (r.at + n) % len(r.block)
	return n, nil
}

// stream runs a command by the API, with its input and output, and counts what it writes to stdout. took is from its start to its exit.
func (b *bench) stream(machine string, in io.Reader, out io.Writer, argv ...string) (n int64, took time.Duration, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := b.client.Machines.Exec(ctx)
	start := &atollv1.ExecStart{Machine: machine, Argv: argv, Stdin: in != nil}
	if err := s.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Start{Start: start}}); err != nil {
		return 0, 0, err
	}
	send := func() {
		buf := make([]byte, 64<<10) // as the CLI reads its stdin
		for {
			n, err := in.Read(buf)
			if n > 0 && s.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_Stdin{Stdin: buf[:n]}}) != nil {
				return
			}
			if err != nil {
				_ = s.Send(&atollv1.ExecRequest{Kind: &atollv1.ExecRequest_CloseStdin{CloseStdin: true}})
				return
			}
		}
	}
	var began time.Time
	for {
		res, err := s.Receive()
		if err != nil {
			return n, 0, err
		}
		switch k := res.GetKind().(type) {
		case *atollv1.ExecResponse_Started:
			began = time.Now()
			if in != nil {
				go send()
			}
		case *atollv1.ExecResponse_Stdout:
			n += int64(len(k.Stdout))
			if _, err := out.Write(k.Stdout); err != nil {
				return n, 0, err
			}
		case *atollv1.ExecResponse_Failure:
			return n, 0, errors.New(k.Failure)
		case *atollv1.ExecResponse_ExitCode:
			if k.ExitCode != 0 {
				return n, 0, fmt.Errorf("exec %s: exit code %d", argv[0], k.ExitCode)
			}
			return n, time.Since(began), nil
		}
	}
}

// gibibyte sends 1 GiB of random bytes through a command and back.
func (b *bench) gibibyte(int) error {
	if _, err := b.cli("run", "-d", "--name", "bench-gib", "busybox", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-gib")
	const size = 1 << 30
	block := make([]byte, 1<<20)
	_, _ = rand.Read(block)
	sent, got := sha256.New(), sha256.New()
	blocks := make([]io.Reader, 0, size/len(block))
	for range size / len(block) {
		blocks = append(blocks, bytes.NewReader(block))
	}
	n, took, err := b.stream("bench-gib", io.TeeReader(io.MultiReader(blocks...), sent), got, "cat")
	if err != nil {
		return err
	}
	if n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		return fmt.Errorf("1 GiB through cat: %d bytes came back, or others", n)
	}
	b.row("1 GiB through `exec -i cat` and back: %.1f s, %.0f MB/s each way at once; the SHA-256 of what came back is that of what was sent.\n", took.Seconds(), size/took.Seconds()/1e6)
	return nil
}

// manyExecs: a thousand commands one after another, then ten times a hundred at once, and what they leave.
func (b *bench) manyExecs(int) error {
	if _, err := b.cli("run", "-d", "--name", "bench-many", "busybox", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-many")
	for range 50 {
		if err := b.exec("bench-many", "true"); err != nil {
			return err
		}
	}
	before, err := b.footprint("bench-many")
	if err != nil {
		return err
	}
	began := time.Now()
	for range 1000 {
		if err := b.exec("bench-many", "true"); err != nil {
			return err
		}
	}
	row := time.Since(began)
	began = time.Now()
	for range 10 {
		failures := make(chan error, 100)
		for range cap(failures) {
			go func() { failures <- b.exec("bench-many", "true") }()
		}
		for range cap(failures) {
			if err := <-failures; err != nil {
				return err
			}
		}
	}
	atOnce := time.Since(began)
	time.Sleep(2 * time.Second) // the collectors of both ends
	after, err := b.footprint("bench-many")
	if err != nil {
		return err
	}
	b.row("1,000 commands one after another took %.1f s; then 10 times 100 at once, %.1f s. What they leave, agent and daemon:\n\n| | before | after |\n|---|---|---|", row.Seconds(), atOnce.Seconds())
	for i, name := range []string{"agent: descriptors", "agent: memory (KiB)", "guest: processes", "guest: control groups of commands", "daemon: descriptors", "daemon: memory (KiB)"} {
		b.row("| %s | %s | %s |", name, before[i], after[i])
	}
	b.row("")
	return nil
}

func (b *bench) footprint(machine string) ([]string, error) {
	out, err := b.cli("exec", machine, "sh", "-c",
		`ls /proc/1/fd | wc -l; grep VmRSS /proc/1/status | tr -dc 0-9; echo; ls -d /proc/[0-9]* | wc -l; ls /sys/fs/cgroup/atoll | grep -c ^exec-`)
	if err != nil {
		return nil, err
	}
	pid, err := b.cli("version", "--format", "{{.Server.PID}}")
	if err != nil {
		return nil, err
	}
	fds, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		return nil, err
	}
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return nil, err
	}
	_, rss, _ := strings.Cut(string(status), "VmRSS:")
	rss, _, _ = strings.Cut(strings.TrimSpace(rss), " ")
	return append(strings.Fields(out), fmt.Sprint(len(fds)), rss), nil
}

// ssh: exec against ssh into the same guest.
func (b *bench) ssh(int) error {
	if _, err := b.cli("base", "build", "debian:bookworm", "--package", "openssh-server", "-t", "bench-sshd"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ssh")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	key := dir + "/key"
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen: %w: %s", err, out)
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		return err
	}
	script := "mkdir -p -m 700 /run/sshd /root/.ssh; echo '" + strings.TrimSpace(string(public)) + "' >/root/.ssh/authorized_keys; exec /usr/sbin/sshd -D"
	if _, err := b.cli("run", "-d", "--name", "bench-ssh", "-p", "22", "bench-sshd", "sh", "-c", script); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-ssh")
	address, err := b.cli("port", "bench-ssh", "22")
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	options := []string{"-q", "-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-i", key, "-p", port, "root@127.0.0.1"}
	ssh := func(more ...string) func() error {
		return func() error {
			out, err := exec.Command("ssh", append(append(slices.Clone(more), options...), "true")...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("ssh: %w: %s", err, out)
			}
			return nil
		}
	}
	for deadline := time.Now().Add(time.Minute); ; { // until sshd listens
		if err := ssh()(); err == nil {
			break
		} else if time.Now().After(deadline) {
			return err
		}
	}
	control := "ControlPath=" + dir + "/control"
	if out, err := exec.Command("ssh", append([]string{"-M", "-N", "-f", "-o", control}, options...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh -M: %w: %s", err, out)
	}
	defer func() { exec.Command("ssh", append([]string{"-O", "exit", "-o", control}, options...)...).Run() }()
	var took [4][]time.Duration
	for range 30 {
		for i, do := range []func() error{
			func() error { _, err := b.cli("exec", "bench-ssh", "true"); return err }, ssh(),
			func() error { return b.exec("bench-ssh", "true") }, ssh("-o", control),
		} {
			began := time.Now()
			if err := do(); err != nil {
				return err
			}
			took[i] = append(took[i], time.Since(began))
		}
	}
	p50 := func(i int) time.Duration { return quantile(took[i], .5) }
	b.row("## exec against ssh\n\n`true` in one guest with Debian's OpenSSH server, 30 times, turn by turn, p50. The second row has both connected before.\n")
	b.row("| exec | ssh | **exec ÷ ssh** |\n|---|---|---|")
	b.row("| `atoll exec`: %s | `ssh`: %s | **%.2f** (≤ 0.2) |", ms(p50(0)), ms(p50(1)), ratio(p50(0), p50(1)))
	b.row("| API: %s | `ssh` by a ControlMaster: %s | %.2f |\n", ms(p50(2)), ms(p50(3)), ratio(p50(2), p50(3)))
	return nil
}

// agentBoot: what the agent takes of a boot, step by step.
func (b *bench) agentBoot(rounds int) error {
	kernel, remove, err := b.ownKernel()
	if err != nil {
		return err
	}
	defer remove()
	if _, err := b.cli("run", "-d", "--name", "bench-agent", "--kernel", kernel, "busybox", "sleep", "3600"); err != nil {
		return err
	}
	defer b.cli("rm", "-f", "bench-agent")
	m, argv, err := b.running("bench-agent")
	if err != nil {
		return err
	}
	memory, err := b.cli("exec", "bench-agent", "sh", "-c", "grep VmRSS /proc/1/status | tr -dc 0-9")
	if err != nil {
		return err
	}
	if _, err := b.cli("kill", "bench-agent"); err != nil {
		return err
	}
	steps := map[string][]time.Duration{}
	var names []string
	var whole, waiting []time.Duration
	for range rounds {
		boot, err := agentSteps(argv, configOf(m))
		if err != nil {
			return err
		}
		names = names[:0]
		for i, s := range boot {
			if i == 0 {
				waiting = append(waiting, s.at)
				continue
			}
			names = append(names, boot[i-1].name)
			steps[boot[i-1].name] = append(steps[boot[i-1].name], s.at-boot[i-1].at)
		}
		whole = append(whole, boot[len(boot)-1].at)
	}
	b.row("## The agent\n\nFrom the start of the agent, the kernel's init, to the entrypoint's exec, own kernel; by the guest's clock. %d rounds.\n\n| | median | fastest |\n|---|---|---|", rounds)
	b.row("| its start, the channel, the configuration's way | %s | %s |", ms(quantile(waiting, .5)), ms(slices.Min(waiting)))
	for _, n := range names {
		b.row("| %s | %s | %s |", n, ms(quantile(steps[n], .5)), ms(slices.Min(steps[n])))
	}
	b.row("| **agent's share of the boot** (≤ 60 ms) | **%s** | %s |\n\nResident memory of an idle agent: %s KiB (≤ 12 MiB).\n", ms(quantile(whole, .5)), ms(slices.Min(whole)), memory)
	return nil
}

type bootStep struct {
	name string
	at   time.Duration // since the agent's start
}

// agentSteps boots once and returns when each step of the configuration began; the last one is the end.
func agentSteps(argv []string, c *agentv1.Config) ([]bootStep, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	conn, stop, err := startQEMU(ctx, argv)
	if err != nil {
		return nil, err
	}
	defer stop.now()
	session, err := transport.Connect(ctx, conn, transport.NewToken())
	if err != nil {
		return nil, err
	}
	defer session.Close()
	s, err := session.Open(ctx)
	if err != nil {
		return nil, err
	}
	c.UnixNanos = time.Now().UnixNano()
	if err := transport.WriteMsg(s, &agentv1.Request{Kind: &agentv1.Request_Configure{Configure: c}}); err != nil {
		return nil, err
	}
	var steps []bootStep
	for {
		p := &agentv1.Progress{}
		if err := transport.ReadMsg(s, p); err != nil {
			return nil, err
		}
		if p.GetError() != "" {
			return nil, fmt.Errorf("configuring the guest: %s: %s", p.GetStep(), p.GetError())
		}
		steps = append(steps, bootStep{p.GetStep(), time.Duration(p.GetUptimeNanos())})
		if p.GetDone() {
			break
		}
	}
	h, err := session.Open(ctx)
	if err != nil {
		return nil, err
	}
	reply := &agentv1.HelloReply{}
	if err := errors.Join(transport.WriteMsg(h, &agentv1.Request{Kind: &agentv1.Request_Hello{Hello: &agentv1.Hello{Protocol: transport.Protocol}}}), transport.ReadMsg(h, reply)); err != nil {
		return nil, err
	}
	for i := range steps {
		steps[i].at -= time.Duration(reply.GetStartUptimeNanos())
	}
	return steps, nil
}
