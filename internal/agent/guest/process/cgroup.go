package process

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CgroupRoot is where the agent keeps the control groups of the guest's processes.
const CgroupRoot = "/sys/fs/cgroup/atoll"

// SetUpCgroups makes the groups' parent and lets them have every controller. A kernel without some has less. The agent stays in the
// root group with the kernel's threads: to move a process takes an RCU grace period, up to 200 ms of every emulated boot.
func SetUpCgroups() error {
	if err := os.Mkdir(CgroupRoot, 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	for _, dir := range []string{filepath.Dir(CgroupRoot), CgroupRoot} {
		available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		controllers := strings.Fields(string(available))
		if os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+strings.Join(controllers, " +")), 0) == nil {
			continue
		}
		for _, c := range controllers { // one that cannot be had must not keep the others out
			os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
		}
	}
	return nil
}

// OpenCgroup opens a control group for processes to start in, and makes it when it is not there.
func OpenCgroup(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// oomKilled says whether the kernel killed a process of the group for want of memory.
func oomKilled(cgroup string) bool {
	if cgroup == "" {
		return false
	}
	events, _ := os.ReadFile(filepath.Join(cgroup, "memory.events"))
	for line := range strings.Lines(string(events)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			return n != "0"
		}
	}
	return false
}
