// Package etc writes the guest's files that depend on the machine: hostname, hosts and resolv.conf. Each is replaced whole and keeps
// its mode; a link is replaced by a file, so that nothing is written where an image's link leads.
package etc

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// Write writes the files under the directory that a config speaks of.
func Write(dir string, c *agentv1.Config) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if name := c.GetHostname(); name != "" {
		if err := replace(filepath.Join(dir, "hostname"), []byte(name+"\n")); err != nil {
			return err
		}
	}
	if err := replace(filepath.Join(dir, "hosts"), hosts(c)); err != nil {
		return err
	}
	if c.GetInit() {
		if err := writeMachineID(dir, c.GetMachineId()); err != nil {
			return err
		}
	}
	// Docker has it too, for programs that look for what is mounted there.
	if err := os.Symlink("/proc/mounts", filepath.Join(dir, "mtab")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if len(c.GetDnsServers())+len(c.GetDnsSearch())+len(c.GetDnsOptions()) == 0 {
		return nil // the image's own
	}
	return replace(filepath.Join(dir, "resolv.conf"), resolvConf(c))
}

func hosts(c *agentv1.Config) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	named := c.GetHostname() == ""
	for _, e := range c.GetHosts() {
		var names []string
		for _, n := range e.GetNames() {
			named = named || n == c.GetHostname()
			if len(names) == 0 || names[len(names)-1] != n { // hostname and machine name are often the same
				names = append(names, n)
			}
		}
		b.WriteString(e.GetAddress() + "\t" + strings.Join(names, " ") + "\n")
	}
	if !named {
		b.WriteString("127.0.1.1\t" + c.GetHostname() + "\n")
	}
	return b.Bytes()
}

// writeMachineID gives an image that has no machine-id, as no image should, the machine's own (machine-id(5)): it lasts as long as the
// machine, and no two have the same.
func writeMachineID(dir, id string) error {
	path := filepath.Join(dir, "machine-id")
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if have := strings.TrimSpace(string(old)); id == "" || have != "" && have != "uninitialized" {
		return nil
	}
	return replace(path, []byte(id+"\n"))
}

func resolvConf(c *agentv1.Config) []byte {
	var b bytes.Buffer
	for _, s := range c.GetDnsServers() {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(c.GetDnsSearch()) > 0 {
		b.WriteString("search " + strings.Join(c.GetDnsSearch(), " ") + "\n")
	}
	if len(c.GetDnsOptions()) > 0 {
		b.WriteString("options " + strings.Join(c.GetDnsOptions(), " ") + "\n")
	}
	return b.Bytes()
}

// replace writes a file whole. It need not reach the disk: it is written again at the next boot, before any process can see it.
func replace(path string, data []byte) error {
	mode := os.FileMode(0o644)
	if st, err := os.Lstat(path); err == nil && st.Mode().IsRegular() {
		mode = st.Mode().Perm()
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
			return nil
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".atoll-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
