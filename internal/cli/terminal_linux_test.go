package cli

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/cli/ui"
)

// A run -it at a terminal: raw while the guest has it, with the guest told its size and every change, and as before afterwards.
func TestTerminal(t *testing.T) {
	user, tty := openPTY(t)
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	resize(t, user, 30, 100)
	a := newAtoll(t)
	env := a.environment(&syncBuffer{}, &syncBuffer{})
	env.Stdin, env.Stdout = tty, tty
	code := make(chan int)
	go func() { code <- Main(t.Context(), []string{"run", "-it", "hello", "cat"}, env) }()

	screen := &syncBuffer{}
	go func() {
		buf := make([]byte, 1024)
		for {
			n, err := user.Read(buf)
			if err != nil {
				return
			}
			screen.Write(buf[:n])
		}
	}()
	waitFor(t, func() bool {
		now, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		return err == nil && now.Lflag&unix.ICANON == 0
	})
	sizes := func(n int) bool { a.fake.mu.Lock(); defer a.fake.mu.Unlock(); return len(a.fake.sizes) >= n }
	waitFor(t, func() bool { return sizes(1) })
	if s := a.fake.sizes[0]; s.Rows != 30 || s.Cols != 100 {
		t.Errorf("the guest was told %v", s)
	}
	resize(t, user, 40, 120)
	if err := unix.Kill(os.Getpid(), unix.SIGWINCH); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return sizes(2) })
	if s := a.fake.sizes[1]; s.Rows != 40 || s.Cols != 120 {
		t.Errorf("the guest was told %v after a change", s)
	}
	// Ctrl-C is a byte like any other.
	fmt.Fprint(user, "typed\x03")
	waitFor(t, func() bool { return strings.Contains(screen.String(), "typed\x03") })

	m := a.fake.machines[0]
	m.attached.end()
	select {
	case got := <-code:
		if got != 0 {
			t.Errorf("exit code %d", got)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("did not end")
	}
	after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal was not put back: %+v, was %+v, %v", after, before, err)
	}
}

func TestColours(t *testing.T) {
	user, tty := openPTY(t)
	if _, ok := ui.Terminal(tty); !ok {
		t.Fatal("a terminal is not seen to be one")
	}
	a := newAtoll(t)
	lines := bufio.NewReader(user)
	for noColor, want := range map[string]string{"": "\x1b[32m✓\x1b[0m  x  y\r\n", "1": "✓  x  y\r\n"} {
		a.env["NO_COLOR"] = noColor
		env := a.environment(nil, nil)
		env.Stdout = tty
		e := &environment{Env: env}
		if err := e.printChecks("", []checkView{{Name: "x", Level: "ok", Message: "y"}}); err != nil {
			t.Fatal(err)
		}
		line, err := lines.ReadString('\n') // the terminal may hand it over in pieces
		if err != nil || line != want {
			t.Errorf("NO_COLOR=%q: %q, %v, want %q", noColor, line, err, want)
		}
	}
}

func openPTY(t *testing.T) (user, tty *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { user.Close() })
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return user, tty
}

func resize(t *testing.T, pty *os.File, rows, cols uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(pty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
		t.Fatal(err)
	}
}
