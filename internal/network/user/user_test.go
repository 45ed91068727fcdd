package user_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/network/networktest"
	"github.com/atollvm/atoll/internal/network/user"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "network-helper" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := user.RunHelper(ctx, os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func newRig(t testing.TB) networktest.Rig {
	dir, err := os.MkdirTemp("", "atollnet") // t.TempDir's paths are long for sockets
	if err != nil {
		t.Fatal(err)
	}
	resolvConf := filepath.Join(dir, "resolv.conf")
	t.Cleanup(func() {
		if pid, err := helperPID(dir); err == nil { // what a failed test has left
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, networktest.Net.Name, "helper.log"))
			t.Logf("helper's log:\n%s", log)
		}
		os.RemoveAll(dir)
	})
	return networktest.Rig{
		ResolvConf: resolvConf,
		New: func() network.Driver {
			d := user.New(user.Options{
				Dir:        dir,
				Helper:     []string{os.Args[0], "network-helper"},
				ResolvConf: resolvConf,
				Log:        slog.New(slog.DiscardHandler),
			})
			t.Cleanup(func() { d.Close() })
			return d
		},
		Crash: func(network.Network) {
			pid, err := helperPID(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the helper's death", func() bool { return syscall.Kill(pid, 0) != nil })
		},
	}
}

func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not come", what)
		}
	}
}

// helperPID asks the kernel who serves the control socket.
func helperPID(dir string) (int, error) {
	conn, err := net.Dial("unix", filepath.Join(dir, networktest.Net.Name, "control.sock"))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

func TestSuite(t *testing.T) {
	networktest.Run(t, func(t *testing.T) networktest.Rig { return newRig(t) })
}

// A helper that serves nobody ends with its driver.
func TestIdleHelperEnds(t *testing.T) {
	r := newRig(t)
	d := r.New()
	e := networktest.Endpoint(t, 2, "web")
	a := networktest.Attach(t, d, e)
	if info, err := os.Stat(filepath.Dir(a.Remote)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the sockets' directory: %v, %v", info, err)
	}
	dir := filepath.Dir(filepath.Dir(a.Remote))
	pid, err := helperPID(dir)
	if err != nil {
		t.Fatal(err)
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("the helper is in session %d, %v, not in its own", sid, err)
	}
	if err := d.Detach(t.Context(), networktest.Net, e.ID); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the helper's end", func() bool { return syscall.Kill(pid, 0) != nil })
}

// What the helper says when it cannot start is in the error.
func TestHelperFails(t *testing.T) {
	d := user.New(user.Options{Dir: t.TempDir(), Helper: []string{"/nonexistent"}, Log: slog.New(slog.DiscardHandler)})
	if _, err := d.Attach(t.Context(), networktest.Net, networktest.Endpoint(t, 2, "web")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a helper: %v", err)
	}
}

func BenchmarkAttach(b *testing.B) {
	d := newRig(b).New()
	for i := range b.N {
		e := networktest.Endpoint(b, byte(2+i%200), "web", "80")
		if _, err := d.Attach(b.Context(), networktest.Net, e); err != nil {
			b.Fatal(err)
		}
		if err := d.Detach(b.Context(), networktest.Net, e.ID); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHelperStart(b *testing.B) {
	r := newRig(b)
	for range b.N {
		d := r.New()
		e := networktest.Endpoint(b, 2, "web", "80")
		if _, err := d.Attach(b.Context(), networktest.Net, e); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := d.Detach(b.Context(), networktest.Net, e.ID); err != nil {
			b.Fatal(err)
		}
		d.Close()
		b.StartTimer()
	}
}

// The guest's stack runs in this process and has its share of the time.
func BenchmarkPublishedPort(b *testing.B) {
	e := networktest.Endpoint(b, 2, "web", "80")
	a := networktest.Attach(b, newRig(b).New(), e)
	l := networktest.Boot(b, networktest.Net, e, a).Listen(b, 80)
	const chunk = 1 << 20
	for name, run := range map[string]func(b *testing.B, guest, host net.Conn) error{
		"download": func(b *testing.B, guest, host net.Conn) error { return transfer(b.N, host, guest, chunk) },
		"upload":   func(b *testing.B, guest, host net.Conn) error { return transfer(b.N, guest, host, chunk) },
	} {
		b.Run(name, func(b *testing.B) {
			host, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", a.Ports[0].HostPort))
			if err != nil {
				b.Fatal(err)
			}
			defer host.Close()
			guest, err := l.Accept()
			if err != nil {
				b.Fatal(err)
			}
			defer guest.Close()
			b.SetBytes(chunk)
			b.ResetTimer()
			if err := run(b, guest, host); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func transfer(n int, to io.Reader, from io.Writer, chunk int) error {
	sent := make(chan error, 1)
	go func() {
		data := make([]byte, chunk)
		for range n {
			if _, err := from.Write(data); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	buf := make([]byte, chunk)
	for left := n * chunk; left > 0; {
		m, err := to.Read(buf)
		if err != nil {
			return err
		}
		left -= m
	}
	return <-sent
}
