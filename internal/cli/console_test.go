package cli

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// Console is a guest that says who it is, repeats what is typed, and is switched off by "halt".
func (f *fake) Console(_ context.Context, s *connect.BidiStream[atollv1.ConsoleRequest, atollv1.ConsoleResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	if _, err := f.find(first.GetStart().GetMachine()); err != nil {
		return err
	}
	for _, text := range []string{"", "login: "} {
		if err := s.Send(&atollv1.ConsoleResponse{Output: []byte(text)}); err != nil {
			return err
		}
	}
	for {
		req, err := s.Receive()
		if errors.Is(err, io.EOF) {
			return errors.New("the client has closed its side, and so would end a console that it only watches")
		}
		if err != nil {
			return err
		}
		if err := s.Send(&atollv1.ConsoleResponse{Output: req.GetInput()}); err != nil {
			return err
		}
		if strings.Contains(string(req.GetInput()), "halt") {
			return nil
		}
	}
}

func TestConsole(t *testing.T) {
	a := newAtoll(t)
	a.ok("create", "--name", "web", "hello")
	a.in = "to\x1d and \x03halt"
	r := a.run("console", "web")
	if r.code != 0 || r.out != "login: to\x1d and \x03halt" || !strings.Contains(r.errOut, "Machine web has stopped") {
		t.Errorf("through a pipe: %d, %q, %q", r.code, r.out, r.errOut)
	}
	if r := a.run("console", "other"); r.code != 1 || !strings.Contains(r.errOut, "not found") {
		t.Errorf("no such machine: %d, %q", r.code, r.errOut)
	}
	if r := a.run("console", "--escape", "^x^y", "web"); r.code != 2 {
		t.Errorf("a wrong escape: %d, %q", r.code, r.errOut)
	}
}

// At a terminal it is raw, Ctrl-C is typed, and the escape leaves; then the terminal is as before.
func TestConsoleTerminal(t *testing.T) {
	for escape, key := range map[string]string{"": "\x1d", "^A": "\x01", "~": "~"} {
		user, tty := openPTY(t)
		before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		a := newAtoll(t)
		a.ok("create", "--name", "web", "hello")
		out, errOut := &syncBuffer{}, &syncBuffer{}
		env := a.environment(out, errOut)
		env.Stdin = tty
		args := []string{"console", "web"}
		if escape != "" {
			args = []string{"console", "--escape", escape, "web"}
		}
		code := make(chan int)
		go func() { code <- Main(t.Context(), args, env) }()
		waitFor(t, func() bool { return strings.Contains(out.String(), "login: ") })
		if _, err := user.WriteString("typed\x03"); err != nil {
			t.Fatal(err)
		}
		waitFor(t, func() bool { return strings.Contains(out.String(), "typed\x03") })
		if _, err := user.WriteString("last" + key + "never"); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-code:
			if got != 0 || strings.Contains(out.String(), "never") || !strings.Contains(errOut.String(), keyName(key[0])+" leaves") {
				t.Errorf("exit code %d, %q, %q", got, out, errOut)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("did not leave")
		}
		after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		if err != nil || *after != *before {
			t.Errorf("the terminal was not put back: %+v, was %+v, %v", after, before, err)
		}
	}
}

func TestParseEscape(t *testing.T) {
	for text, want := range map[string]byte{"^]": 0x1d, "^a": 1, "^Z": 26, "^_": 31, "~": '~', "none": 0} {
		if got, err := parseEscape(text); err != nil || got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "^", "^1", "^aa", "ab", "é"} {
		if _, err := parseEscape(text); text != "^" && err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

func TestTypeInto(t *testing.T) {
	for _, c := range []struct {
		in     string
		escape byte
		sent   string
		left   bool
	}{{"ab\x1dc", 0x1d, "ab", true}, {"\x1d", 0x1d, "", true}, {"ab\x1dc", 0, "ab\x1dc", false}, {"", 0x1d, "", false}} {
		var sent string
		left := typeInto(strings.NewReader(c.in), c.escape, func(p []byte) error { sent += string(p); return nil })
		if sent != c.sent || left != c.left {
			t.Errorf("%q: sent %q, left %t", c.in, sent, left)
		}
	}
}
