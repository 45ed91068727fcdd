package guest

import (
	"strings"
	"testing"
)

func TestSysctlPath(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.ip_forward":             "net/ipv4/ip_forward",
		"net/ipv4/conf/eth0.1/forwarding": "net/ipv4/conf/eth0.1/forwarding",
		"net.ipv4.conf.eth0/1.forwarding": "net/ipv4/conf/eth0.1/forwarding",
		"kernel.x":                        "kernel/x",
	} {
		if got := sysctlPath(key); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	for _, bad := range []string{"../../etc/passwd", "net..", ""} {
		if err := setSysctl(bad, "1"); err == nil || !strings.Contains(err.Error(), "sysctl") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
