package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func TestLoadSettings(t *testing.T) {
	home := t.TempDir()
	if s, err := LoadSettings(home); err != nil || !cmp.Equal(s, Settings{}) {
		t.Errorf("no file: %+v, %v", s, err)
	}
	write(t, home, `
[registry."docker.io"]
mirrors = ["https://mirror.example"]
[registry."lab:5000"]
insecure = true
ca = "/etc/lab.pem"
[proxy]
https = "http://proxy.example:3128"
no = "localhost,.example"
[tls]
ca = ["/etc/corp.pem"]
[build]
cacheSize = "2G"
timeout = "90m"
isolation = "vm"
vmCPUs = 3
vmMemory = "1G"
`)
	want := Settings{
		Registries: map[string]Registry{
			"docker.io": {Mirrors: []string{"https://mirror.example"}},
			"lab:5000":  {Insecure: true, CA: "/etc/lab.pem"},
		},
		Proxy: Proxy{HTTPS: "http://proxy.example:3128", No: "localhost,.example"},
		TLS:   TLS{CA: []string{"/etc/corp.pem"}},
		Build: Build{CacheSize: 2 << 30, Timeout: Duration(90 * time.Minute), Isolation: "vm", VMCPUs: 3, VMMemory: 1 << 30},
	}
	got, err := LoadSettings(home)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLoadSettingsFaults(t *testing.T) {
	for text, want := range map[string]string{
		"[build]\ncacheSise = \"2G\"\n":                     "line 2: unknown key build.cacheSise",
		"[build]\n\ncacheSize = \"2X\"\n":                   "line 3",
		"[build]\ntimeout = \"-2h\"\n":                      "line 2",
		"[build]\nisolation = \"jail\"\n":                   `isolation "jail"`,
		"[build]\nvmMemory = \"64M\"\n":                     "at least 256MiB",
		"[build]\nvmCPUs = -1\n":                            "vmCPUs -1",
		"[build\n":                                          "line 1",
		"[registry.\"r\"]\nmirrors = [\"ftp://x\"]\n":       `mirror "ftp://x"`,
		"[registry.\"r\"]\nmirrors = [\"https://a:b@x\"]\n": "no name and password",
		"[registry.\"r\"]\nca = \"x.pem\"\n":                "absolute path",
		"[tls]\nca = [\"a.pem\"]\n[proxy]\nhttp = \"x\"\n":  "proxy: http",
	} {
		home := t.TempDir()
		write(t, home, text)
		_, err := LoadSettings(home)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), FileName) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func write(t *testing.T, home, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(home, FileName), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestProxyOrEnvironment(t *testing.T) {
	env := map[string]string{"HTTP_PROXY": "http://upper", "http_proxy": "http://lower", "HTTPS_PROXY": "http://upper", "NO_PROXY": "x"}
	got := Proxy{No: "mine"}.OrEnvironment(func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	if want := (Proxy{HTTP: "http://lower", HTTPS: "http://upper", No: "mine"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
