//go:build linux

// Command guest is the init of vmmtest's machines: it loads the modules beside it, opens the agent's port and does what it is told,
// a line at a time. Nothing but vmmtest's suite builds it.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	err := serve()
	// The console keeps what went wrong; the kernel then panics because init has ended.
	fmt.Fprintln(os.Stderr, "guest:", err)
	os.Exit(1)
}

func serve() error {
	for _, m := range []struct{ source, target, kind string }{{"dev", "/dev", "devtmpfs"}, {"sysfs", "/sys", "sysfs"}, {"proc", "/proc", "proc"}} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	modules, _ := filepath.Glob("/modules/*.ko")
	sort.Strings(modules)
	for _, name := range modules {
		if err := load(name); err != nil {
			return err
		}
	}
	port, err := open()
	if err != nil {
		return err
	}
	in := bufio.NewReaderSize(port, 1<<16)
	fmt.Fprintln(port, "hello")
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) {
			wait() // the host has hung up: it may dial again
			continue
		}
		if err != nil {
			return err
		}
		switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "panic":
			return errors.New("told to panic")
		case "poweroff":
			return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		case "halt":
			return unix.Reboot(unix.LINUX_REBOOT_CMD_HALT)
		case "cpus", "memory":
			err = count(port, word)
		case "print":
			_, err = fmt.Fprintln(os.Stdout, rest)
		case "hear":
			err = hear(port)
		case "disk":
			err = disk(port, rest)
		case "share":
			err = share(port, rest)
		case "bounce":
			err = bounce(port)
		default:
			_, err = io.WriteString(port, line)
		}
		if err != nil {
			fmt.Fprintln(port, "error:", err)
		}
	}
}

// hear answers with the next line that is typed at the console.
func hear(w io.Writer) error {
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, strings.TrimSpace(line))
	return err
}

func wait() { time.Sleep(10 * time.Millisecond) }

func load(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("loading %s: %w", name, err)
	}
	return nil
}

// open finds the port by its name. The driver adds ports in the background, so it may need a moment.
func open() (*os.File, error) {
	for range 500 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if text, _ := os.ReadFile(n); strings.TrimSpace(string(text)) == "atoll.agent" {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		wait()
	}
	return nil, errors.New("no port named atoll.agent")
}

func count(w io.Writer, what string) error {
	if what == "cpus" {
		text, err := os.ReadFile("/sys/devices/system/cpu/online")
		fmt.Fprintf(w, "%s\n", strings.TrimSpace(string(text)))
		return err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	fmt.Fprintln(w, info.Totalram*uint64(info.Unit))
	return nil
}

// share shows the first line of a file of a share, or writes one: "tag file" or "tag file text".
func share(w io.Writer, args string) error {
	words := strings.SplitN(args, " ", 3)
	dir := "/" + words[0]
	if _, err := os.Stat(dir); err != nil {
		modules, _ := filepath.Glob("/modules/virtiofs/*.ko")
		sort.Strings(modules)
		for _, name := range modules {
			if err := load(name); err != nil {
				return err
			}
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(words[0], dir, "virtiofs", 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", words[0], err)
		}
	}
	path := filepath.Join(dir, words[1])
	if len(words) == 3 {
		if err := os.WriteFile(path, []byte(words[2]+"\n"), 0o640); err != nil {
			return err
		}
		_, err := fmt.Fprintln(w, "ok")
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	_, err = fmt.Fprintln(w, line)
	return err
}

// disk shows a disk's first line, or writes one: "vda" or "vda text".
func disk(w io.Writer, args string) error {
	name, text, write := strings.Cut(args, " ")
	f, err := os.OpenFile("/dev/"+name, os.O_RDWR|os.O_SYNC, 0)
	if !write {
		f, err = os.Open("/dev/" + name)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 512)
	if write {
		copy(block, text+"\n")
		if _, err := f.Write(block); err != nil {
			return err
		}
		fmt.Fprintln(w, "ok")
		return nil
	}
	if _, err := io.ReadFull(f, block); err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(block), "\n")
	fmt.Fprintln(w, first)
	return nil
}

// bounce sends every frame that comes in on eth0 back to its sender, for ever.
func bounce(w io.Writer) error {
	const mtu = "65520"
	control, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	ifr, err := unix.NewIfreq("eth0")
	if err != nil {
		return err
	}
	if err := os.WriteFile("/sys/class/net/eth0/mtu", []byte(mtu), 0); err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(control, unix.SIOCSIFFLAGS, ifr); err != nil {
		return err
	}
	const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // network byte order
	sock, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, all&0xffff)
	if err != nil {
		return err
	}
	index, err := os.ReadFile("/sys/class/net/eth0/ifindex")
	if err != nil {
		return err
	}
	var at unix.SockaddrLinklayer
	at.Protocol = all & 0xffff
	if _, err := fmt.Sscan(string(index), &at.Ifindex); err != nil {
		return err
	}
	if err := unix.Bind(sock, &at); err != nil {
		return err
	}
	fmt.Fprintln(w, "bouncing")
	go func() {
		frame := make([]byte, 1<<17)
		for {
			n, from, err := unix.Recvfrom(sock, frame, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); err != nil || n < 14 || !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			mac := [6]byte(frame)
			copy(frame, frame[6:12])
			copy(frame[6:], mac[:])
			if _, err := unix.Write(sock, frame[:n]); err != nil {
				fmt.Fprintln(os.Stderr, "guest: bouncing:", err)
			}
		}
	}()
	return nil
}
