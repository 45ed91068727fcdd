// Package e2e runs scripts on the real binary: CLI, daemon, BuildKit, QEMU, a registry on loopback. Each script has an ATOLL_HOME of its
// own, made from the fixture's (kernel and base images) by hard links.
package e2e

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

var (
	fixtureHome string
	binDir      string
	helperDir   string
)

func TestMain(m *testing.M) {
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "preparing the end-to-end tests:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(helperDir)
	os.Exit(code)
}

// prepare builds the binary and the fixture, unless `make test` has done so already.
func prepare() error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	binDir = filepath.Join(root, "bin")
	fixtureHome = os.Getenv("ATOLL_TEST_HOME")
	if fixtureHome == "" {
		build := exec.Command("make", "-s", "build")
		build.Dir = root
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("make build: %w\n%s", err, out)
		}
		fixture := exec.Command("go", "run", "./test/fixture")
		fixture.Dir, fixture.Stderr = root, os.Stderr
		out, err := fixture.Output()
		if err != nil {
			return fmt.Errorf("test/fixture: %w", err)
		}
		for line := range strings.Lines(string(out)) {
			if k, v, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "="); ok {
				os.Setenv(k, strings.Trim(v, `"`))
			}
		}
	}
	fixtureHome = os.Getenv("ATOLL_TEST_HOME")
	helperDir, err = os.MkdirTemp("", "atoll-e2e")
	if err != nil {
		return err
	}
	build := exec.Command("go", "build", "-o", helperDir+"/", "./netcheck", "./registry", "./webserver", "./fscheck", "./hostile", "./execmany")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the scripts' helpers: %w\n%s", err, out)
	}
	return nil
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE") != "",
		Deadline:            deadline(t),
		Setup:               setup,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"eventually": eventually,
			"killpid":    killPid,
			"freeport":   freePort,
		},
		Condition: condition,
	})
}

func deadline(t *testing.T) time.Time {
	d, _ := t.Deadline()
	return d
}

func condition(cond string) (bool, error) {
	switch cond {
	case "root":
		return os.Geteuid() == 0, nil
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}

// setup gives a script its own home with a short path, since unix sockets end at about 104 bytes, and ends what it leaves.
func setup(env *testscript.Env) error {
	name := make([]byte, 4)
	_, _ = rand.Read(name)
	home := filepath.Join(os.TempDir(), "at-"+hex.EncodeToString(name))
	if err := cloneHome(fixtureHome, home); err != nil {
		return err
	}
	env.Setenv("ATOLL_HOME", home)
	env.Setenv("OWN_KERNEL", os.Getenv("ATOLL_TEST_OWN_KERNEL"))
	env.Setenv("PATH", strings.Join([]string{binDir, helperDir, env.Getenv("PATH"), "/usr/sbin", "/sbin"}, ":"))
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("NO_COLOR", "1")
	env.Setenv("CLOUD_IMAGE", os.Getenv("ATOLL_TEST_CLOUD_IMAGE"))
	env.Setenv("SYSTEMD_IMAGE", os.Getenv("ATOLL_TEST_SYSTEMD"))
	env.Setenv("OPENRC_IMAGE", os.Getenv("ATOLL_TEST_OPENRC"))
	env.Setenv("PODMAN_IMAGE", os.Getenv("ATOLL_TEST_PODMAN"))
	env.Defer(func() {
		endAll(home)
		os.RemoveAll(home)
	})
	return nil
}

// cloneHome makes a home with the fixture's content. Content never changes in place, so hard links serve; the state is copied. What only
// a daemon's helpers use is left out: a lock file with two names would be one lock.
func cloneHome(from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	for _, room := range []string{"images", "rootdisks", "kernels", "qemu"} {
		if out, err := exec.Command("cp", "-al", filepath.Join(from, room), to).CombinedOutput(); err != nil {
			return fmt.Errorf("cloning %s: %w: %s", room, err, out)
		}
	}
	state, err := os.ReadFile(filepath.Join(from, "atoll.db"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, "atoll.db"), state, 0o600)
}

// endAll kills the processes that work on a home: those whose command line or environment names it.
func endAll(home string) {
	for range 3 {
		found := false
		for _, pid := range processesOf(home) {
			found = true
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if !found {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func processesOf(home string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if pid == os.Getpid() {
			continue
		}
		for _, file := range []string{"cmdline", "environ"} {
			data, _ := os.ReadFile(filepath.Join(dir, file))
			if strings.Contains(string(data), home) {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// eventually COMMAND ARGS...: runs it until it succeeds, for at most 30 s; the last output is there for stdout.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: [!] eventually command [args...]")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		err := ts.Exec(args[0], args[1:]...)
		if (err == nil) != neg {
			return
		}
		select {
		case <-ctx.Done():
			ts.Fatalf("eventually %s: %v", strings.Join(args, " "), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// killpid SIGNAL PIDFILE: sends a signal to the process whose number the file holds and, for KILL, waits for its end.
func killPid(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 || neg {
		ts.Fatalf("usage: killpid signal file")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(ts.ReadFile(args[1])))
	ts.Check(err)
	sig := map[string]syscall.Signal{"KILL": syscall.SIGKILL, "TERM": syscall.SIGTERM, "STOP": syscall.SIGSTOP, "CONT": syscall.SIGCONT}[args[0]]
	ts.Check(syscall.Kill(pid, sig))
	for sig == syscall.SIGKILL && syscall.Kill(pid, 0) == nil {
		if state, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); strings.Contains(string(state), ") Z ") {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// freeport VAR: puts the number of a free port of 127.0.0.1 into an environment variable.
func freePort(ts *testscript.TestScript, neg bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	defer l.Close()
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
}
