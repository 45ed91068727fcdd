package timekeeping

import (
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// server answers as an NTP server (RFC 5905) whose clock is that far ahead.
func server(t *testing.T, ahead time.Duration, stratum byte) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if n < 48 {
				continue
			}
			reply := make([]byte, 48)
			reply[0] = 4<<3 | 4 // version 4, a server
			reply[1] = stratum
			copy(reply[24:32], buf[40:48]) // when it was asked, in its own words
			for _, at := range []int{16, 32, 40} {
				now := time.Now().Add(ahead)
				if at == 16 {
					now = now.Add(-time.Second) // when it was last set
				}
				binary.BigEndian.PutUint32(reply[at:], uint32(now.Unix()+2208988800))
				binary.BigEndian.PutUint32(reply[at+4:], uint32(uint64(now.Nanosecond())<<32/1e9))
			}
			c.WriteTo(reply, from)
		}
	}()
	return c.LocalAddr().String()
}

func TestAsk(t *testing.T) {
	good := server(t, 7*time.Second, 2)
	offset, err := Ask([]string{good})
	if err != nil || (offset-7*time.Second).Abs() > 200*time.Millisecond {
		t.Errorf("offset %v, %v; want 7s", offset, err)
	}
	// One that says of itself that it does not know the time is passed over.
	unsynchronised := server(t, time.Hour, 16)
	offset, err = Ask([]string{unsynchronised, good})
	if err != nil || (offset-7*time.Second).Abs() > 200*time.Millisecond {
		t.Errorf("behind a bad server: offset %v, %v; want 7s", offset, err)
	}
	if _, err = Ask([]string{unsynchronised}); err == nil || !strings.Contains(err.Error(), unsynchronised) {
		t.Errorf("a server without the time: %v", err)
	}
}

func TestDelegate(t *testing.T) {
	root := t.TempDir()
	put := func(path string) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if done, err := Delegate(root, []string{"a"}); done || err != nil {
		t.Errorf("nobody is there: %v, %v", done, err)
	}
	put("/usr/lib/systemd/systemd-timesyncd")
	put("/usr/sbin/chronyd") // without its directory
	if done, err := Delegate(root, []string{"a", "b"}); !done || err != nil {
		t.Errorf("timesyncd: %v, %v", done, err)
	}
	if text, _ := os.ReadFile(filepath.Join(root, "/etc/systemd/timesyncd.conf.d/50-atoll.conf")); string(text) != "[Time]\nNTP=a b\n" {
		t.Errorf("timesyncd is told %q", text)
	}
	put("/etc/chrony/sources.d/README")
	if done, err := Delegate(root, []string{"a", "b"}); !done || err != nil {
		t.Errorf("chrony: %v, %v", done, err)
	}
	if text, _ := os.ReadFile(filepath.Join(root, "/etc/chrony/sources.d/atoll.sources")); string(text) != "server a iburst\nserver b iburst\n" {
		t.Errorf("chrony is told %q", text)
	}
}
