package guest

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/guest/netconf"
	"github.com/atollvm/atoll/internal/agent/guest/process"
)

// setUpNetwork also lets everybody listen on ports below 1024 and send pings, as Docker does: images count on it with their USER. An
// image with an init of its own has that decide.
func setUpNetwork(c *agentv1.Config) error {
	if !c.GetInit() { // a kernel may lack them
		_ = setSysctl("net.ipv4.ip_unprivileged_port_start", "0")
		_ = setSysctl("net.ipv4.ping_group_range", "0 2147483647")
	}
	return netconf.Set(c.GetInterfaces())
}

// setSysctls sets parameters of the kernel, by their names as sysctl(8) has them.
func setSysctls(values map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if err := setSysctl(key, values[key]); err != nil {
			return &process.Error{Class: agentv1.FailureClass_FAILURE_CLASS_INVALID, Message: err.Error()}
		}
	}
	return nil
}

func setSysctl(key, value string) error {
	path := sysctlPath(key)
	if !filepath.IsLocal(path) {
		return errors.New("sysctl " + strconv.Quote(key) + ": not the name of a parameter")
	}
	f, err := os.OpenFile(filepath.Join("/proc/sys", path), os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("sysctl " + key + ": the guest's kernel has no such parameter")
	}
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	var e *fs.PathError
	if errors.As(err, &e) {
		err = e.Err
	}
	if err != nil {
		return errors.New("sysctl " + key + "=" + value + ": " + err.Error())
	}
	return nil
}

// sysctlPath: where the first separator is a slash, dots are part of the names; else a slash stands for a dot in a name, as in that of
// a VLAN.
func sysctlPath(key string) string {
	if at := strings.IndexAny(key, "./"); at >= 0 && key[at] == '/' {
		return key
	}
	return strings.NewReplacer(".", "/", "/", ".").Replace(key)
}

// makeReadOnly forbids writing to the root once all in it that the machine needs has been made.
func makeReadOnly(c *agentv1.Config) error {
	if dir := c.GetProcess().GetWorkingDir(); dir != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return mounts.MakeReadOnly()
}
