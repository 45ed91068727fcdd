package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"syscall"
	"time"
	"unsafe"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/etc"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/guest/provision"
	"golang.org/x/sys/unix"
)

// configure makes this guest the machine that the config describes, telling the host each step as it begins.
func (a *Agent) configure(host io.ReadWriter, c *agentv1.Config) {
	taken := uptime()
	t := &telling{host: host}
	a.mu.Lock()
	again := a.configured
	a.configured = true
	a.mu.Unlock()
	if again {
		t.tell(failed("configuration", errors.New("this machine has been configured before")))
		return
	}
	a.setLanguage(c)
	provision := a.provision(c, host, t)
	last := step{"entrypoint", func() error { return a.startEntrypoint(c.GetProcess()) }}
	var next *successor
	if c.GetInit() {
		last = step{"init", func() (err error) { next, err = a.prepareInit(c); return err }}
	}
	for _, step := range []step{
		{"clock", func() error { return setClock(c.GetUnixNanos(), taken) }},
		{"entropy", func() error { return reseed(c.GetEntropy()) }},
		{"modules", func() error { return loadFeatures(c.GetModules()) }},
		{"root", func() error { return a.mountRoot(c.GetRoot()) }},
		{"file systems", mounts.System},
		when(len(c.GetVolumes()) > 0, step{"volumes", func() error { return a.mounted().Volumes(c.GetVolumes(), c.GetRoot().GetReadOnly()) }}),
		when(len(c.GetTmpfs()) > 0, step{"tmpfs", func() error { return mounts.Tmpfs(c.GetTmpfs()) }}),
		{"shares", func() error { return mounts.Shares(c.GetShares()) }},
		{"control groups", process.SetUpCgroups},
		{"hostname", func() error { return setHostname(c) }},
		{"", provision.early},
		{"", provision.files},
		{"network", func() error { return setUpNetwork(c) }},
		when(len(c.GetNtpServers()) > 0, step{"time servers", func() (err error) { c.NtpServers, err = a.askTime(c); return err }}),
		when(len(c.GetSysctls()) > 0, step{"sysctls", func() error { return setSysctls(c.GetSysctls()) }}),
		{"", provision.late},
		when(c.GetRoot().GetReadOnly(), step{"read-only root", func() error { return makeReadOnly(c) }}),
		last,
	} {
		if step.do == nil {
			continue
		}
		if step.name != "" {
			t.step(step.name)
		}
		if err := step.do(); err != nil {
			t.failed(err)
			return
		}
	}
	done := func() { t.tell(&agentv1.Progress{Done: true}) }
	if next == nil {
		done()
		return
	}
	panic(next.become(a.port, done)) // as PID 1 has no other end; the kernel's panic names it
}

// step is one named part of the configuration, or one without a name that tells of its own steps.
type step struct {
	name string
	do   func() error
}

// when is a step that has nothing to do, and is not even told, unless it is needed.
func when(needed bool, s step) step {
	if !needed {
		return step{}
	}
	return s
}

func failed(step string, err error) *agentv1.Progress {
	p := &agentv1.Progress{Step: step, Error: err.Error()}
	if e := (*process.Error)(nil); errors.As(err, &e) {
		p.Failure = e.Class
	}
	if e := (*provision.ExitError)(nil); errors.As(err, &e) {
		code := int32(e.Code)
		p.ExitCode = &code
	}
	return p
}

// setClock sets the clock to what it was on the host when the message was taken here, and what has passed since.
func setClock(unixNanos int64, taken time.Duration) error {
	if unixNanos == 0 {
		return nil
	}
	tv := unix.NsecToTimeval(unixNanos + int64(uptime()-taken))
	return unix.Settimeofday(&tv)
}

// reseed mixes entropy into the kernel's pool and has the generator use it at once: a guest restored from a snapshot must not give
// the numbers of its twin.
func reseed(entropy []byte) error {
	if len(entropy) == 0 {
		return nil
	}
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// struct rand_pool_info: bits, bytes, the bytes
	info := binary.NativeEndian.AppendUint32(nil, uint32(8*len(entropy)))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(entropy)))
	info = append(info, entropy...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return errno
	}
	const rndReseedCRNG = 0x5207
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

// loadFeatures loads what the machine uses beside what every machine does. The initramfs, where the modules are, goes with the
// switch of the root. What a kernel has built in has no directory there.
func loadFeatures(names []string) error {
	for _, name := range names {
		if !filepath.IsLocal(name) {
			return fmt.Errorf("feature %q: not a name", name)
		}
		if err := mounts.LoadModules(filepath.Join(moduleDir, name)); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) mounted() *mounts.Root {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.root
}

func (a *Agent) mountRoot(r *agentv1.Root) error {
	if r == nil {
		return nil
	}
	if slices.ContainsFunc(r.GetDisks(), func(d *agentv1.RootDisk) bool { return d.GetVerity() != nil }) {
		if err := mounts.WatchVerity(func(detail string) { a.goDownFor(agentv1.GoingDown_REASON_VERITY, detail) }); err != nil {
			return err
		}
	}
	root, err := mounts.Mount(r)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.root = root
	a.mu.Unlock()
	return mounts.Switch()
}

func setHostname(c *agentv1.Config) error {
	if name := c.GetHostname(); name != "" {
		if err := syscall.Sethostname([]byte(name)); err != nil {
			return err
		}
	}
	return etc.Write("/etc", c)
}
