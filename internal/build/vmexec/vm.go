//go:build linux

// Package vmexec runs the steps of a build in a virtual machine: it is BuildKit's executor with a VM instead of an OCI runtime. It owns
// the VM, a directory that the VM shares, below which a step's root and mounts are while it runs, and the VM's network. It knows
// nothing of images; the caller says which kernel boots and how large the VM is. Imported by package child, and by package build for
// the words in which it describes a VM. A VM may be used from several goroutines.
package vmexec

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/network/user"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/executor"
)

// Spec is the shape of a build's VM.
type Spec struct {
	Kernel      vmm.Kernel
	Features    []string // of the kernel that the agent has to load
	CPUs        int
	MemoryBytes int64
}

const (
	startTimeout = 60 * time.Second
	stopTimeout  = 10 * time.Second
	shareTag     = "build"
	guestShare   = "/share" // where the guest has the shared directory
	consoleTail  = 2 << 10
)

// segment is the network of a build's VM: nobody else is on it, so all have the same. 198.18/15 is kept for benchmarks of networks
// and hides nothing that a build could want to reach.
func segment() (network.Network, network.Endpoint) {
	gateway := netip.MustParseAddr("198.18.0.1")
	return network.Network{Name: "build", Driver: "user", Subnet: netip.MustParsePrefix("198.18.0.0/30"), Gateway: gateway, MTU: 65520},
		network.Endpoint{ID: "build", Name: "build", MAC: "52:54:00:12:00:02", Address: gateway.Next()}
}

// VM is the virtual machine of one build. It starts with the first step.
type VM struct {
	dir    string // exists; short enough for sockets
	spec   Spec
	driver vmm.Driver
	log    *slog.Logger

	starting context.Context // ends with Close
	stop     context.CancelFunc
	running  sync.WaitGroup // steps

	mu      sync.Mutex // guards the rest; held while the VM starts
	closed  bool
	started *started
	failed  error // why it did not start
}

var _ executor.Executor = (*VM)(nil)

// started is what a running VM holds.
type started struct {
	instance vmm.Instance
	agent    *host.Client
	net      *user.InProcess
}

// New returns a VM that works in dir, which is its own.
func New(dir string, spec Spec, driver vmm.Driver, log *slog.Logger) *VM {
	v := &VM{dir: dir, spec: spec, driver: driver, log: log}
	v.starting, v.stop = context.WithCancel(context.Background())
	return v
}

func (v *VM) stage() stage { return stage{v.dir} }

// enter starts the VM unless it runs, and counts a step in; leave counts it out.
func (v *VM) enter() (_ *started, leave func(), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.closed:
		return nil, nil, fmt.Errorf("the build has ended: %w", errdefs.ErrAborted)
	case v.failed != nil:
		return nil, nil, v.failed
	case v.started == nil:
		// Not in the step's own time: another step may wait for the VM too.
		ctx, cancel := context.WithTimeout(v.starting, startTimeout)
		defer cancel()
		began := time.Now()
		if v.started, err = v.start(ctx); err != nil {
			v.failed = fmt.Errorf("starting the build's virtual machine: %w", err)
			return nil, nil, v.failed
		}
		v.log.Debug("build VM started", "pid", v.started.instance.PID(), "took", time.Since(began))
	}
	v.running.Add(1)
	return v.started, v.running.Done, nil
}

func (v *VM) start(ctx context.Context) (_ *started, err error) {
	if err := v.stage().open(); err != nil {
		return nil, err
	}
	s := &started{}
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	n, e := segment()
	if s.net, err = user.OpenInProcess(v.dir, n, "/etc/resolv.conf", v.log); err != nil {
		return nil, err
	}
	a, err := s.net.Attach(e)
	if err != nil {
		return nil, err
	}
	if s.instance, err = v.driver.Start(ctx, vmm.Spec{
		ID: "build", Dir: v.dir, Kernel: v.spec.Kernel, CPUs: v.spec.CPUs, MemoryBytes: v.spec.MemoryBytes,
		NICs:     []vmm.NIC{{MAC: e.MAC, MTU: n.MTU, Local: a.Local, Remote: a.Remote}},
		Shares:   []vmm.Share{{Tag: shareTag, Path: v.stage().seen()}},
		Tethered: true,
	}); err != nil {
		return nil, err
	}
	conn, err := s.instance.DialAgent(ctx)
	if err != nil {
		return nil, err
	}
	session, err := transport.Connect(ctx, conn, transport.NewToken())
	if err != nil {
		conn.Close()
		return nil, v.explain(s.instance, err)
	}
	s.agent = host.New(session)
	if err := s.agent.Configure(ctx, v.config(n, e), func(string) {}); err != nil {
		return nil, v.explain(s.instance, err)
	}
	return s, nil
}

func (v *VM) config(n network.Network, e network.Endpoint) *agentv1.Config {
	entropy := make([]byte, 64)
	_, _ = rand.Read(entropy)
	return &agentv1.Config{
		Hostname: "build", UnixNanos: time.Now().UnixNano(), Entropy: entropy, Modules: v.spec.Features,
		Interfaces: []*agentv1.Interface{{
			Mac: e.MAC, Address: netip.PrefixFrom(e.Address, n.Subnet.Bits()).String(), Gateway: n.Gateway.String(), Mtu: uint32(n.MTU),
		}},
		Shares: []*agentv1.Share{{Tag: shareTag, Path: guestShare}},
	}
}

// explain adds what is known of a VM that has ended to an error that came of it.
func (v *VM) explain(i vmm.Instance, err error) error {
	select {
	case <-i.Done():
	case <-time.After(time.Second): // the channel breaks a moment before the end is known
		return err
	}
	why := i.Exit()
	text := fmt.Sprintf("the build's virtual machine ended (%s)", why.Reason)
	if why.Detail != "" {
		text += ": " + why.Detail
	}
	if console := tail(filepath.Join(v.dir, vmm.ConsoleFile)); console != "" {
		text += "; the end of its console:\n" + console
	}
	return fmt.Errorf("%s: %w", text, errdefs.ErrUnavailable)
}

func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > consoleTail {
		_, _ = f.Seek(-consoleTail, io.SeekEnd)
	}
	text, _ := io.ReadAll(io.LimitReader(f, consoleTail))
	return strings.TrimSpace(strings.ToValidUTF8(string(text), "?"))
}

func (s *started) end() {
	if s.agent != nil {
		_ = s.agent.Close()
	}
	if s.instance != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		_ = s.instance.Kill(ctx)
		_ = s.instance.Close()
	}
	if s.net != nil {
		s.net.Close()
	}
}

// Close ends the VM once its last step has ended, and removes its directory.
func (v *VM) Close() error {
	v.stop()
	v.mu.Lock()
	v.closed = true
	v.mu.Unlock()
	v.running.Wait() // none is added any more
	if v.started != nil {
		v.started.end()
	}
	// Never a recursive removal of what may have something mounted in it.
	if err := v.stage().close(); err != nil {
		return fmt.Errorf("ending the build's virtual machine: %w", err)
	}
	if err := os.RemoveAll(v.dir); err != nil {
		return fmt.Errorf("ending the build's virtual machine: %w", err)
	}
	return nil
}
