package cli

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
)

// autostarting returns a command line without a daemon, which starts this test binary as one.
func autostarting(t *testing.T, mode string) (env Env, home string, out, errOut *syncBuffer) {
	t.Helper()
	dir, err := os.MkdirTemp("", "atoll-cli")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	home = filepath.Join(dir, "home")
	a := &atoll{t: t, env: map[string]string{"ATOLL_HOME": home}}
	out, errOut = &syncBuffer{}, &syncBuffer{}
	env = a.environment(out, errOut)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	env.DaemonCmd = []string{self, "fake-daemon", mode}
	t.Cleanup(func() {
		if c, err := client.New("unix://" + filepath.Join(home, "atoll.sock")); err == nil {
			c.System.Shutdown(context.Background(), connect.NewRequest(&atollv1.ShutdownRequest{}))
			c.Close()
		}
	})
	return env, home, out, errOut
}

// Ten commands at once start one daemon, and all of them work.
func TestAutostart(t *testing.T) {
	env, home, out, errOut := autostarting(t, "serve")
	var wg sync.WaitGroup
	codes := make([]int, 10)
	for i := range codes {
		wg.Go(func() { codes[i] = Main(t.Context(), []string{"version", "--format", "{{.Server.Version}}"}, env) })
	}
	wg.Wait()
	for _, code := range codes {
		if code != 0 {
			t.Fatalf("exit codes %v\n%s", codes, errOut)
		}
	}
	if out.String() != strings.Repeat("v1\n", 10) {
		t.Errorf("stdout %q", out)
	}
	starts, err := os.ReadFile(filepath.Join(home, "starts"))
	if err != nil || strings.Count(string(starts), "\n") != 1 {
		t.Errorf("daemons started: %q, %v", starts, err)
	}
	for path, mode := range map[string]os.FileMode{home: 0o700 | os.ModeDir, filepath.Join(home, "daemon.log"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}

func TestAutostartFails(t *testing.T) {
	env, home, _, errOut := autostarting(t, "fail")
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(home, "daemon.log")
	if err := os.WriteFile(log, []byte("an older failure\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code := Main(t.Context(), []string{"ps"}, env); code != 1 {
		t.Errorf("exit code %d", code)
	}
	want := "Error: starting the daemon: it ended at once: exit status 4\nopening state: disk on fire\nHint: all that it said is in " + log + "\n"
	if errOut.String() != want {
		t.Errorf("stderr %q, want %q", errOut, want)
	}
}

// A daemon that was asked for by its address is never replaced by one of our own, and a Tab starts none.
func TestNoAutostart(t *testing.T) {
	for _, args := range [][]string{{"--host", "unix:///nowhere/s", "ps"}, {"__complete", "stop", ""}} {
		env, home, _, _ := autostarting(t, "serve")
		Main(t.Context(), args, env)
		if _, err := os.Stat(filepath.Join(home, "starts")); !os.IsNotExist(err) {
			t.Errorf("%v started a daemon: %v", args, err)
		}
	}
}
