//go:build linux

// Command hostile is an agent that lies. On a host it prints an initramfs with itself as /init; as PID 1 of a machine it does what the kernel's
// command line says after hostile=.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
)

func main() {
	do := printInitramfs
	if os.Getpid() == 1 {
		do = lie
	}
	fmt.Fprintln(os.Stderr, "hostile:", do())
	os.Exit(1)
}

func printInitramfs() error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for i, f := range []struct {
		name string
		mode int
		rdev int
		data []byte
	}{{"dev", 0o40755, 0, nil}, {"proc", 0o40755, 0, nil}, {"sys", 0o40755, 0, nil}, {"dev/console", 0o20600, 5<<8 | 1, nil}, {"init", 0o100755, 0, self}, {"TRAILER!!!", 0, 0, nil}} {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", i+1, f.mode, 0, 0, 1, 0, len(f.data), 0, 0, f.rdev>>8, f.rdev&0xff, len(f.name)+1, 0, f.name)
		b.Write(make([]byte, -b.Len()&3))
		b.Write(f.data)
		b.Write(make([]byte, -b.Len()&3))
	}
	if _, err := b.WriteTo(os.Stdout); err != nil {
		return err
	}
	os.Exit(0)
	return nil
}

// lie returns what went wrong; the kernel then panics.
func lie() error {
	for _, kind := range []string{"devtmpfs", "proc", "sysfs"} {
		on := map[string]string{"devtmpfs": "/dev", "proc": "/proc", "sysfs": "/sys"}[kind]
		if err := unix.Mount(kind, on, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	_, how, _ := strings.Cut(string(line), "hostile=")
	how, _, _ = strings.Cut(strings.TrimSpace(how), " ")
	port, err := open()
	if err != nil {
		return err
	}
	if how == "garbage" {
		return garbage(port)
	}
	return transport.Serve(port, func(s *transport.Session) {
		go func() {
			for {
				stream, err := s.Accept()
				if err != nil {
					return
				}
				go func() {
					defer stream.Close()
					answer(how, stream)
				}()
			}
		}()
	})
}

func open() (*os.File, error) {
	for range 1000 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if text, _ := os.ReadFile(n); strings.TrimSpace(string(text)) == "atoll.agent" {
				// Blocking: a poller would be told of a hang-up while no host is there.
				fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(n)), unix.O_RDWR, 0)
				return os.NewFile(uintptr(fd), "port"), err
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.New("no port")
}

// garbage floods the port and the console.
func garbage(port io.ReadWriter) error {
	one := make([]byte, 1)
	for n := 0; n == 0; { // the host is there
		n, _ = port.Read(one)
	}
	for b := bytes.Repeat([]byte{0xff}, 64<<10); ; {
		if _, err := port.Write(b); err != nil {
			return err
		}
	}
}

// answer is what each request gets.
func answer(how string, s net.Conn) {
	req := &agentv1.Request{}
	if transport.ReadMsg(bufio.NewReaderSize(s, 16), req) != nil {
		return
	}
	flood := func(m func(i uint64) transport.Message) {
		for i := uint64(1); transport.WriteMsg(s, m(i)) == nil; i++ {
		}
	}
	data := bytes.Repeat([]byte("\x1b[2J"), 15<<10)
	switch k := req.GetKind().(type) {
	case *agentv1.Request_Configure:
		switch how {
		case "steps":
			flood(func(uint64) transport.Message { return &agentv1.Progress{Step: strings.Repeat("\x1b]0;x\a", 1<<14)} })
		case "output":
			flood(func(uint64) transport.Message { return &agentv1.Progress{Output: data} })
		}
		_ = transport.WriteMsg(s, &agentv1.Progress{Done: true})
	case *agentv1.Request_Output:
		flood(func(i uint64) transport.Message { return &agentv1.Output{Seq: k.Output.GetAfter() + i, Data: data} })
	case *agentv1.Request_Watch:
		flood(func(i uint64) transport.Message {
			return &agentv1.Event{Seq: i, Kind: &agentv1.Event_Started{Started: &agentv1.EntrypointStarted{Pid: math.MaxUint32}}}
		})
	case *agentv1.Request_Exec:
		_ = transport.WriteMsg(s, &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Started_{Started: &agentv1.ExecOutput_Started{Pid: 7}}})
		if argv := k.Exec.GetProcess().GetArgv(); len(argv) > 0 && argv[0] == "flood" {
			flood(func(uint64) transport.Message {
				return &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Stdout{Stdout: data}}
			})
		}
		_ = transport.WriteMsg(s, &agentv1.ExecOutput{Kind: &agentv1.ExecOutput_Exit{Exit: &agentv1.EntrypointExited{Code: 256}}})
	case *agentv1.Request_StatFile:
		_ = transport.WriteMsg(s, &agentv1.StatFileReply{Name: "../../up", Mode: 0o40755})
	case *agentv1.Request_GetFiles:
		flood(func(uint64) transport.Message { return &agentv1.FilesReply{Data: make([]byte, 60<<10)} })
	default:
		_, _ = io.Copy(io.Discard, s)
	}
}
