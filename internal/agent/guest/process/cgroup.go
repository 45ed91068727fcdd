package process

import (
	"math"
	"os"
	"path/filepath"
	"strconv"
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

// OpenCgroup opens a control group for processes to start in, and makes it when it is not there. No group can have all the processes that
// the kernel has room for: the agent and what it starts for a person who looks into the matter need some.
func OpenCgroup(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if most := mostProcesses(); most > 0 { // a kernel may lack the controller
		_ = os.WriteFile(filepath.Join(dir, "pids.max"), strconv.AppendInt(nil, most, 10), 0)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// mostProcesses is how many processes and threads one group may have; 0: the kernel does not say how many it has room for.
func mostProcesses() int64 {
	all := int64(math.MaxInt64)
	for _, name := range []string{"threads-max", "pid_max"} {
		data, err := os.ReadFile("/proc/sys/kernel/" + name)
		if err != nil {
			return 0
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		if err != nil {
			return 0
		}
		all = min(all, n)
	}
	return all - all/4
}

// leaveMemory has a group use no more memory than there is now but for a little, which is the agent's and that of what it starts beside: where a
// group goes beyond, the kernel ends one of its processes, and nobody else waits for that.
func leaveMemory(dir string) {
	var free int64
	data, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			free = kib << 10
		}
	}
	if free > 0 {
		_ = os.WriteFile(filepath.Join(dir, "memory.max"), strconv.AppendInt(nil, free-min(max(free/16, 8<<20), 64<<20, free/2), 10), 0)
	}
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
