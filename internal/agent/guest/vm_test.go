package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/agent/transport"
)

// guestVM is a QEMU microvm under emulation with the agent in its initramfs and a busybox root.
type guestVM struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	gone   chan struct{}
	began  time.Time
	token  transport.Token
	client *host.Client
	conn   net.Conn

	mu     sync.Mutex // guards what follows
	events []*agentv1.Event
	out    map[agentv1.Stream]*bytes.Buffer
	eof    chan struct{}
}

const mac = "52:54:00:12:34:56"

// bootVM boots a VM; it says why when there is nothing to boot.
func bootVM(t *testing.T) *guestVM {
	t.Helper()
	kernel, modules := os.Getenv("ATOLL_TEST_KERNEL"), os.Getenv("ATOLL_TEST_MODULES")
	if kernel == "" || modules == "" {
		t.Skip("no guest kernel: set ATOLL_TEST_KERNEL to one and ATOLL_TEST_MODULES to a directory of its NN-name.ko (both are Debian's linux-image-cloud-amd64)")
	}
	v := &guestVM{t: t, dir: t.TempDir(), gone: make(chan struct{}), token: transport.NewToken(), eof: make(chan struct{}),
		out: map[agentv1.Stream]*bytes.Buffer{agentv1.Stream_STREAM_STDOUT: {}, agentv1.Stream_STREAM_STDERR: {}}}
	v.makeInitramfs(modules)
	v.makeDisks()
	v.start(kernel)
	return v
}

func (v *guestVM) path(name string) string { return filepath.Join(v.dir, name) }

func (v *guestVM) run(name string, args ...string) {
	v.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		v.t.Fatalf("%s %s: %v\n%s", name, args, err, out)
	}
}

// agentBinary is built once for all tests.
var agentBinary = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "atoll-agent-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/agent", "github.com/atollvm/atoll/cmd/atoll-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the agent: %w\n%s", err, out)
	}
	return os.ReadFile(dir + "/agent")
})

func (v *guestVM) makeInitramfs(modules string) {
	v.t.Helper()
	agent, err := agentBinary()
	if err != nil {
		v.t.Fatal(err)
	}
	var b bytes.Buffer
	ino := 0
	entry := func(name string, mode, rdev int, data []byte) {
		ino++
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", ino, mode, 0, 0, 1, 0, len(data), 0, 0, rdev>>8, rdev&0xff, len(name)+1, 0, name)
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	for _, d := range []string{"dev", "proc", "sys", "lib", "lib/modules", "lib/modules/atoll"} {
		entry(d, 0o40755, 0, nil)
	}
	entry("dev/console", 0o20600, 5<<8|1, nil)
	entry("init", 0o100755, 0, agent)
	files, err := filepath.Glob(modules + "/*.ko")
	if err != nil {
		v.t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			v.t.Fatal(err)
		}
		entry("lib/modules/atoll/"+filepath.Base(f), 0o100644, 0, data)
	}
	entry("TRAILER!!!", 0, 0, nil)
	if err := os.WriteFile(v.path("initramfs"), b.Bytes(), 0o644); err != nil {
		v.t.Fatal(err)
	}
}

func (v *guestVM) makeDisks() {
	v.t.Helper()
	root := v.path("root")
	for _, d := range []string{"bin", "etc", "home/app", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			v.t.Fatal(err)
		}
	}
	v.run("cp", "/bin/busybox", root+"/bin/busybox")
	v.run("/bin/busybox", "--install", "-s", root+"/bin")
	for _, f := range []struct {
		name, data string
		mode       os.FileMode
	}{
		{"etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n", 0o644},
		{"etc/group", "root:x:0:\napp:x:1000:\nextra:x:2000:app\nother:x:3000:\n", 0o644},
		{"bin/text", "not a program\n", 0o755},
		{"bin/noexec", "#!/bin/sh\n", 0o644},
		{"bin/lost", "#!/no/such/interpreter\n", 0o755},
	} {
		if err := os.WriteFile(filepath.Join(root, f.name), []byte(f.data), f.mode); err != nil {
			v.t.Fatal(err)
		}
	}
	// busybox's links lead to the host's path of it.
	links, _ := filepath.Glob(root + "/bin/*")
	for _, l := range links {
		if st, err := os.Lstat(l); err == nil && st.Mode()&os.ModeSymlink != 0 {
			os.Remove(l)
			os.Symlink("/bin/busybox", l)
		}
	}
	os.Symlink("/elsewhere/resolv.conf", root+"/etc/resolv.conf")
	v.run("mkfs.erofs", "--quiet", "--all-root", v.path("root.erofs"), root)
	v.run("truncate", "-s", "64M", v.path("scratch.ext4"))
	v.run("mkfs.ext4", "-q", "-O", "^has_journal", v.path("scratch.ext4"))
}

func (v *guestVM) start(kernel string) {
	v.t.Helper()
	khz := ""
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(info), "cpu MHz\t\t: "); ok {
			mhz, _, _ := strings.Cut(rest, "\n")
			khz = " tsc_early_khz=" + strings.Replace(mhz, ".", "", 1)
		}
	}
	v.cmd = exec.Command("qemu-system-x86_64", "-M", "microvm", "-accel", "tcg", "-cpu", "max,-erms,-fsrm", "-m", "256",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "file:"+v.path("console"),
		"-kernel", kernel, "-initrd", v.path("initramfs"),
		"-append", "console=ttyS0 reboot=t panic=-1 quiet no_timer_check nokaslr mitigations=off"+khz,
		"-drive", "if=none,id=d0,file="+v.path("root.erofs")+",format=raw,readonly=on,file.locking=off", "-device", "virtio-blk-device,drive=d0",
		"-drive", "if=none,id=d1,file="+v.path("scratch.ext4")+",format=raw", "-device", "virtio-blk-device,drive=d1",
		"-chardev", "socket,id=ag,path="+v.path("agent")+",server=on,wait=off", "-device", "virtio-serial-device,max_ports=2",
		"-device", "virtserialport,chardev=ag,name=atoll.agent",
		"-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-device,netdev=n0,mac="+mac)
	var words bytes.Buffer
	v.cmd.Stdout, v.cmd.Stderr = &words, &words
	v.began = time.Now()
	if err := v.cmd.Start(); err != nil {
		v.t.Fatal(err)
	}
	go func() {
		v.cmd.Wait()
		close(v.gone)
	}()
	v.t.Cleanup(func() {
		v.cmd.Process.Kill()
		<-v.gone
		if v.t.Failed() {
			console, _ := os.ReadFile(v.path("console"))
			v.t.Logf("QEMU: %s\nconsole:\n%s", words.Bytes(), console[max(0, len(console)-3000):])
		}
	})
}

// connect opens the channel, anew where there was one.
func (v *guestVM) connect() *host.Client {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), 60*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var err error
	for ; ctx.Err() == nil; <-tick.C {
		if v.conn, err = net.Dial("unix", v.path("agent")); err == nil {
			break
		}
	}
	if err != nil {
		v.t.Fatal(err)
	}
	s, err := transport.Connect(ctx, v.conn, v.token)
	if err != nil {
		v.t.Fatal(err)
	}
	v.client = host.New(s)
	v.t.Cleanup(func() { s.Close() })
	return v.client
}

// follow gathers output and events. The exit event is acknowledged when ack is set.
func (v *guestVM) follow(c *host.Client, after uint64, ack bool) {
	go c.Output(v.t.Context(), after, func(o *agentv1.Output) error {
		v.mu.Lock()
		defer v.mu.Unlock()
		if o.GetEof() {
			close(v.eof)
			return nil
		}
		v.out[o.GetStream()].Write(o.GetData())
		return nil
	})
	go c.Watch(v.t.Context(), func(e *agentv1.Event) bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.events = append(v.events, e)
		return ack
	})
}

func (v *guestVM) config(argv ...string) *agentv1.Config {
	return &agentv1.Config{
		Hostname: "box", UnixNanos: time.Now().UnixNano(), Entropy: []byte("some entropy"),
		DnsServers: []string{"10.0.2.3"}, DnsSearch: []string{"lan"},
		Hosts:      []*agentv1.HostEntry{{Address: "10.0.2.15", Names: []string{"box", "web"}}},
		Interfaces: []*agentv1.Interface{{Mac: mac, Address: "10.0.2.15/24", Gateway: "10.0.2.2", Mtu: 1400}},
		Root:       &agentv1.Root{Disks: []*agentv1.RootDisk{{Device: "/dev/vda", Type: "erofs", HasRoot: true}}, Scratch: "/dev/vdb", ScratchType: "ext4"},
		Process:    &agentv1.Process{Argv: argv, WorkingDir: "/"},
	}
}

func (v *guestVM) configure(c *agentv1.Config) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), 60*time.Second)
	defer cancel()
	if err := v.client.Configure(ctx, c, func(string) {}); err != nil {
		v.t.Fatal(err)
	}
}

func (v *guestVM) waitGone() {
	v.t.Helper()
	select {
	case <-v.gone:
	case <-time.After(30 * time.Second):
		v.t.Fatal("the VM runs on")
	}
}

// exec runs a command and returns what it wrote and its exit code.
func (v *guestVM) exec(p *agentv1.Process, stdin []byte) (stdout, stderr string, code int32) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), 60*time.Second)
	defer cancel()
	p.Stdin = stdin != nil
	x, err := v.client.Exec(ctx, &agentv1.Exec{Process: p})
	if err != nil {
		v.t.Fatalf("exec %q: %v", p.GetArgv(), err)
	}
	defer x.Close()
	if stdin != nil {
		go func() {
			x.Write(stdin)
			x.CloseStdin()
		}()
	}
	return v.drain(x)
}

// drain returns what a process writes and its exit code.
func (v *guestVM) drain(x *host.Exec) (stdout, stderr string, code int32) {
	v.t.Helper()
	var out, errs bytes.Buffer
	for {
		o, err := x.Recv()
		if err != nil {
			v.t.Fatalf("process %d: %v, so far %q %q", x.PID(), err, out.String(), errs.String())
		}
		out.Write(o.GetStdout())
		errs.Write(o.GetStderr())
		if e := o.GetExit(); e != nil {
			if _, err := x.Recv(); !errors.Is(err, io.EOF) {
				v.t.Errorf("after the exit: %v", err)
			}
			return out.String(), errs.String(), e.GetCode()
		}
	}
}

func sh(script string) *agentv1.Process { return &agentv1.Process{Argv: []string{"sh", "-c", script}} }

func TestVMExec(t *testing.T) {
	v := bootVM(t)
	c := v.connect()
	hello, err := c.Hello(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	toHello := time.Since(v.began)
	v.configure(v.config("sleep", "1000"))
	t.Logf("hello %v after exec(qemu), guest uptime at main %v, at hello %v, configured %v after exec(qemu)", toHello,
		time.Duration(hello.GetStartUptimeNanos()), time.Duration(hello.GetUptimeNanos()), time.Since(v.began))

	for _, tc := range []struct {
		name        string
		p           *agentv1.Process
		out, errOut string
		code        int32
	}{
		{"streams and code", sh("echo out; echo err >&2; exit 3"), "out\n", "err\n", 3},
		{"by signal", sh("kill -TERM $$"), "", "", 143},
		{"words stay words", &agentv1.Process{Argv: []string{"printf", "%s|", "a b", "$HOME", "", "-x"}}, "a b|$HOME||-x|", "", 0},
		{"root", sh("id -u; id -g; echo $HOME $PATH"), "0\n0\n/root /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n", "", 0},
		{"user by name", user("app", "id -u; id -g; id -G; echo $HOME"), "1000\n1000\n1000 2000\n/home/app\n", "", 0},
		{"user by number", user("1000", "id -u; id -G; echo $HOME"), "1000\n1000 2000\n/home/app\n", "", 0},
		{"user without entry", user("4321", "id -u; id -g; echo $HOME"), "4321\n0\n/\n", "", 0},
		{"name and group", user("app:other", "id -u; id -g; id -G"), "1000\n3000\n3000\n", "", 0},
		{"numbers", user("12:34", "id -u; id -g"), "12\n34\n", "", 0},
		{"a user may open its stdout", user("app", "echo x >/dev/stdout"), "x\n", "", 0},
		{"environment and directory", &agentv1.Process{Argv: []string{"sh", "-c", "pwd; echo $A $HOME"}, Env: []string{"A=1 2", "HOME=/h"}, WorkingDir: "/tmp"}, "/tmp\n1 2 /h\n", "", 0},
		{"no files leak", sh("ls /proc/self/fd | wc -l"), "4\n", "", 0}, // ls has its directory open
		{"control group", sh("cut -d: -f3 /proc/self/cgroup | sed 's/[0-9]*$//'"), "/atoll/exec-\n", "", 0},
		{"may be killed for memory", sh("cat /proc/self/oom_score_adj"), "0\n", "", 0},
		{"etc", sh("hostname; cat /etc/hostname; grep -c web /etc/hosts; cat /etc/resolv.conf; stat -c %a /etc/resolv.conf"), "box\nbox\n1\nnameserver 10.0.2.3\nsearch lan\n644\n", "", 0},
		{"network", sh("cat /sys/class/net/eth0/mtu; ip -o -4 addr show dev eth0 | grep -c 10.0.2.15/24; ip route | grep -c 'default via 10.0.2.2'; ping -c1 -W2 10.0.2.2 >/dev/null && echo pong"), "1400\n1\n1\npong\n", "", 0},
		{"the root is an overlay", sh("stat -f -c %T /; echo x >/file; cat /file; ls -d /init /lib/modules 2>/dev/null"), "UNKNOWN\nx\n", "", 1},
		{"mounts", sh("test -c /dev/ptmx && echo x >/dev/shm/x && echo ok >/dev/fd/1"), "ok\n", "", 0},
		{"left behind", sh("sleep 30 & echo done"), "done\n", "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, errOut, code := v.exec(tc.p, nil)
			if tc.name == "the root is an overlay" {
				out = "UNKNOWN" + out[strings.Index(out, "\n"):]
			}
			if out != tc.out || errOut != tc.errOut || code != tc.code {
				t.Errorf("got %q, %q, %d; want %q, %q, %d", out, errOut, code, tc.out, tc.errOut, tc.code)
			}
		})
	}

	for _, tc := range []struct {
		argv, user string
		class      agentv1.FailureClass
	}{
		{"nothere", "", agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND},
		{"/no/such", "", agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND},
		{"lost", "", agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND},
		{"noexec", "", agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE},
		{"text", "", agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE},
		{"/etc", "", agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE},
		{"true", "nobody-here", agentv1.FailureClass_FAILURE_CLASS_INVALID},
		{"true", "app:nogroup", agentv1.FailureClass_FAILURE_CLASS_INVALID},
	} {
		_, err := c.Exec(t.Context(), &agentv1.Exec{Process: &agentv1.Process{Argv: []string{tc.argv}, User: tc.user}})
		var f *host.Failure
		if !errors.As(err, &f) || f.Class != tc.class {
			t.Errorf("%q as %q: got %v, want %v", tc.argv, tc.user, err, tc.class)
		}
	}

	t.Run("clock", func(t *testing.T) {
		out, _, _ := v.exec(sh("date +%s"), nil)
		var s int64
		fmt.Sscan(out, &s)
		if d := time.Since(time.Unix(s, 0)); d < -2*time.Second || d > 3*time.Second {
			t.Errorf("the guest's clock is off by %v", d)
		}
	})
	t.Run("big stdin", func(t *testing.T) {
		data := bytes.Repeat([]byte("0123456789abcde\n"), 1<<20)
		began := time.Now()
		out, _, code := v.exec(&agentv1.Process{Argv: []string{"cat"}}, data)
		if out != string(data) || code != 0 {
			t.Errorf("got %d bytes back of %d, code %d", len(out), len(data), code)
		}
		t.Logf("%d MiB there and back in %v", len(data)>>20, time.Since(began))
	})
	t.Run("terminal", func(t *testing.T) {
		p := sh("tty; stty size; read x; stty size; echo got $x")
		p.Tty, p.Stdin, p.Rows, p.Cols = true, true, 11, 22
		x, err := c.Exec(t.Context(), &agentv1.Exec{Process: p})
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		out := ""
		for resized := false; ; {
			o, err := x.Recv()
			if err != nil {
				t.Fatalf("%v after %q", err, out)
			}
			out += string(o.GetStdout())
			if strings.Contains(out, "11 22\r\n") && !resized {
				resized = true
				x.Resize(33, 44)
				x.Write([]byte("hello\n"))
			}
			if o.GetExit() != nil {
				break
			}
		}
		if want := "/dev/pts/0\r\n11 22\r\nhello\r\n33 44\r\ngot hello\r\n"; out != want {
			t.Errorf("got %q, want %q", out, want)
		}
	})
	t.Run("signal past unread stdin", func(t *testing.T) {
		x, err := c.Exec(t.Context(), &agentv1.Exec{Process: &agentv1.Process{Argv: []string{"sleep", "100"}, Stdin: true}})
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		go x.Write(make([]byte, 1<<20))
		time.AfterFunc(200*time.Millisecond, func() { x.Signal(10) })
		o, err := x.Recv()
		if err != nil || o.GetExit().GetCode() != 138 || o.GetExit().GetSignal() != 10 {
			t.Fatalf("got %v, %v", o, err)
		}
	})
	t.Run("a dropped stream kills", func(t *testing.T) {
		x, err := c.Exec(t.Context(), &agentv1.Exec{Process: sh("trap '' HUP; echo ready; sleep 777; sleep 777")})
		if err != nil {
			t.Fatal(err)
		}
		x.Recv()
		const living = "ps -o args | grep -c 'sleep [7]77'"
		v.eventually(living, "2\n") // the shell and its child
		x.Close()
		v.eventually(living, "0\n")
	})
	t.Run("detached", func(t *testing.T) {
		x, err := c.Exec(t.Context(), &agentv1.Exec{Detach: true, Process: sh("sleep 0.3; echo x >/detached")})
		if err != nil {
			t.Fatal(err)
		}
		x.Close()
		v.eventually("cat /detached 2>/dev/null", "x\n")
	})
	t.Run("containers", func(t *testing.T) { v.testContainers(t) })
	t.Run("many", func(t *testing.T) {
		began := time.Now()
		for range 100 {
			if _, _, code := v.exec(&agentv1.Process{Argv: []string{"true"}}, nil); code != 0 {
				t.Fatal("true is false")
			}
		}
		t.Logf("%v each", time.Since(began)/100)
		var all sync.WaitGroup
		for i := range 30 {
			all.Go(func() {
				if out, _, _ := v.exec(sh(fmt.Sprint("echo ", i)), nil); out != fmt.Sprintln(i) {
					t.Errorf("%d: got %q", i, out)
				}
			})
		}
		all.Wait()
		v.eventually("ls -d /sys/fs/cgroup/atoll/exec-* | wc -l", "2\n") // this one's, and that with a sleep left behind
	})
}

func (v *guestVM) testContainers(t *testing.T) {
	if _, errOut, code := v.exec(sh(`mkdir -p /c/bin /c/etc /given/dir && cp /bin/busybox /c/bin/ && for a in sh cat ls id sleep ps touch mount echo seq wc grep readlink stat; do ln -s busybox /c/bin/$a; done
		echo given >/given/file; echo app:x:1000:1000::/home/app:/bin/sh >/c/etc/passwd; ln -s /given/file /c/leads-out; ln -s ../../../nowhere /c/etc/resolv.conf`), nil); code != 0 {
		t.Fatal(errOut)
	}
	contained := func(script string) *agentv1.Container {
		return &agentv1.Container{
			Id: "c", Root: "/c", Process: sh(script), Hostname: "inside", Hosts: []byte("127.0.0.1 inside\n"), ResolvConf: []byte("nameserver 1.1.1.1\n"),
		}
	}
	for _, tc := range []struct {
		name, script string
		change       func(*agentv1.Container)
		out          string
		code         int32
	}{
		{name: "what is its own", script: "cat /proc/sys/kernel/hostname /etc/hosts /etc/resolv.conf; ps -o args | grep -c '^sleep 1000'; cat /leads-out 2>/dev/null; exit 7", out: "inside\n127.0.0.1 inside\nnameserver 1.1.1.1\n0\n", code: 7},
		{name: "devices", script: "echo x >/dev/null; echo x >/dev/shm/x; echo y >/dev/stdout; stat -c %t,%T,%a /dev/zero; readlink /dev/ptmx", out: "y\n1,5,666\npts/ptmx\n"},
		{name: "rights", script: "grep CapEff /proc/self/status; mount -t tmpfs x /etc 2>/dev/null || echo no mount; echo 1 2>/dev/null >/proc/sys/kernel/panic || echo no sysctl", out: "CapEff:\t00000000a80425fb\nno mount\nno sysctl\n"},
		{name: "user and directory", script: "id -u; echo $HOME; stat -c %n .", change: func(c *agentv1.Container) { c.Process.User, c.Process.WorkingDir = "app", "/new/dir" }, out: "1000\n/home/app\n.\n"},
		{name: "mounts", script: "cat /a/b/file /f; echo x 2>/dev/null >/a/b/x || echo read-only; echo x >/t/x && echo room", change: func(c *agentv1.Container) {
			c.Mounts = []*agentv1.Mount{{Source: "/given", Target: "/a/b", ReadOnly: true}, {Source: "/given/file", Target: "/f"}, {Target: "/t", Options: "size=1m"}}
		}, out: "given\ngiven\nread-only\nroom\n"},
		{name: "read-only", script: "echo x 2>/dev/null >/x || echo no; echo x >/dev/shm/x && echo yes", change: func(c *agentv1.Container) { c.ReadOnly = true }, out: "no\nyes\n"},
		{name: "network", script: "ls /sys/class/net | grep -v dummy", out: "eth0\nlo\n"},
		{name: "no network", script: "ls /sys/class/net | grep -v dummy", change: func(c *agentv1.Container) { c.NoNetwork = true }, out: "lo\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := contained(tc.script)
			if tc.change != nil {
				tc.change(c)
			}
			x, err := v.client.Container(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			if out, errOut, code := v.drain(x); out != tc.out || errOut != "" || code != tc.code {
				t.Errorf("got %q, %q, %d; want %q, %d", out, errOut, code, tc.out, tc.code)
			}
		})
	}
	_, err := v.client.Container(t.Context(), &agentv1.Container{Id: "c", Root: "/c", Process: &agentv1.Process{Argv: []string{"nothere"}}})
	var f *host.Failure
	if !errors.As(err, &f) || f.Class != agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND {
		t.Errorf("a missing command: %v", err)
	}
	if _, err = v.client.Container(t.Context(), &agentv1.Container{Id: "c", Root: "/no/such", Process: sh("true")}); err == nil {
		t.Error("a missing root")
	}

	x, err := v.client.Container(t.Context(), contained("(sleep 888 &) ; sleep 888 & echo x >/made; sleep 889"))
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	v.eventually("cat /c/made 2>/dev/null", "x\n")
	const living = "ps -o args | grep -c 'sleep [8]8'"
	v.eventually(living, "3\n")
	y, err := v.client.Exec(t.Context(), &agentv1.Exec{Container: "c", Process: sh("cat /made; ps -o args | grep -c 'sleep [8]8'")})
	if err != nil {
		t.Fatal(err)
	}
	if out, _, _ := v.drain(y); out != "x\n3\n" {
		t.Errorf("beside it: %q", out)
	}
	x.Signal(9)
	if _, _, code := v.drain(x); code != 137 {
		t.Errorf("killed: %d", code)
	}
	if out, _, _ := v.exec(sh(living+"; grep -c ' /c[ /]' /proc/mounts"), nil); out != "0\n0\n" { // at once
		t.Errorf("left behind: %q", out)
	}
	if _, err := v.client.Exec(t.Context(), &agentv1.Exec{Container: "c", Process: sh("true")}); err == nil {
		t.Error("ran in a container that has ended")
	}
}

func user(name, script string) *agentv1.Process {
	p := sh(script)
	p.User = name
	return p
}

func (v *guestVM) eventually(script, want string) {
	v.t.Helper()
	out := ""
	for range 30 {
		if out, _, _ = v.exec(sh(script), nil); out == want {
			return
		}
		<-time.After(100 * time.Millisecond)
	}
	v.t.Errorf("%s: got %q, want %q", script, out, want)
}

func TestVMReconnectAndExit(t *testing.T) {
	v := bootVM(t)
	v.connect()
	v.configure(v.config("sh", "-c", "echo one; echo two >&2; read x; cat /proc/sys/kernel/hostname; exit 42"))
	// The host dies in the middle of a frame, with output under way.
	v.follow(v.client, 0, false)
	if x, err := v.client.Exec(t.Context(), &agentv1.Exec{Process: sh("yes")}); err != nil {
		t.Fatal(err)
	} else if _, err := x.Recv(); err != nil {
		t.Fatal(err)
	}
	v.conn.Write([]byte{0x7f, 0xff, 'h', 'a', 'l', 'f'})
	v.conn.Close()
	<-v.client.Done()

	began := time.Now()
	c := v.connect()
	t.Logf("reconnected in %v", time.Since(began))
	hello, err := c.Hello(t.Context())
	if err != nil || !hello.GetConfigured() || hello.GetState().GetStarted() == nil {
		t.Fatalf("got %v, %v", hello, err)
	}
	v.mu.Lock()
	v.events, v.out[agentv1.Stream_STREAM_STDOUT] = nil, &bytes.Buffer{}
	v.mu.Unlock()
	if err := c.Configure(t.Context(), v.config("true"), func(string) {}); err == nil {
		t.Fatal("configured twice")
	}
	if err := c.Signal(t.Context(), "NONSENSE"); err == nil {
		t.Fatal("sent nonsense")
	}
	v.follow(c, 0, true)
	if err := c.Signal(t.Context(), "SIGCONT"); err != nil {
		t.Fatal(err)
	}
	// There is no stdin, so read has ended and the code is kept until someone takes it.
	v.waitGone()
	v.mu.Lock()
	defer v.mu.Unlock()
	if got := v.out[agentv1.Stream_STREAM_STDOUT].String(); got != "box\n" && got != "one\nbox\n" {
		t.Errorf("output %q", got)
	}
	if len(v.events) != 3 || v.events[1].GetExited().GetCode() != 42 || v.events[2].GetGoingDown().GetReason() != agentv1.GoingDown_REASON_EXITED {
		t.Errorf("events %v", v.events)
	}
	v.run("e2fsck", "-fn", v.path("scratch.ext4"))
}

func TestVMStdinAndShutdown(t *testing.T) {
	v := bootVM(t)
	c := v.connect()
	config := v.config("sh", "-c", "trap 'echo stopping; exit 7' QUIT; read x; echo got $x; while :; do sleep 0.1; done")
	config.Process.Stdin, config.Process.StopSignal = true, "SIGQUIT"
	v.configure(config)
	v.follow(c, 0, true)
	in, err := c.Stdin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	in.Write([]byte("words\n"))
	in.Close()
	for !strings.Contains(v.stdout(), "got words\n") {
		<-time.After(20 * time.Millisecond)
	}
	began := time.Now()
	if err := c.Shutdown(t.Context(), "", 10*time.Second); err != nil {
		t.Fatal(err)
	}
	v.waitGone()
	t.Logf("down in %v", time.Since(began))
	if got := v.stdout(); got != "got words\nstopping\n" {
		t.Errorf("output %q", got)
	}
	if len(v.events) != 3 || v.events[1].GetExited().GetCode() != 7 || v.events[2].GetGoingDown().GetReason() != agentv1.GoingDown_REASON_SHUTDOWN {
		t.Errorf("events %v", v.events)
	}
}

func (v *guestVM) stdout() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.out[agentv1.Stream_STREAM_STDOUT].String()
}

func TestVMGuestGoesByItself(t *testing.T) {
	for _, tc := range []struct {
		command string
		reason  agentv1.GoingDown_Reason
	}{
		{"poweroff", agentv1.GoingDown_REASON_POWEROFF},
		{"reboot", agentv1.GoingDown_REASON_REBOOT},
	} {
		t.Run(tc.command, func(t *testing.T) {
			v := bootVM(t)
			c := v.connect()
			v.configure(v.config("sleep", "1000"))
			v.follow(c, 0, true)
			// Debian's static busybox has no poweroff applet; these are the signals it would send.
			sig := map[string]string{"poweroff": "USR2", "reboot": "TERM"}[tc.command]
			v.exec(sh("kill -"+sig+" 1"), nil)
			v.waitGone()
			if len(v.events) != 2 || v.events[1].GetGoingDown().GetReason() != tc.reason {
				t.Errorf("events %v", v.events)
			}
		})
	}
}

func TestVMEntrypointCannotStart(t *testing.T) {
	v := bootVM(t)
	c := v.connect()
	err := c.Configure(t.Context(), v.config("nothere", "x"), func(string) {})
	var f *host.Failure
	if !errors.As(err, &f) || f.Class != agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND || f.Step != "entrypoint" {
		t.Fatalf("got %v", err)
	}
}
