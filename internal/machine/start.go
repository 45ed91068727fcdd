package machine

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/health"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	startTimeout   = 2 * time.Minute // of each step of a start; emulation on a busy host is slow
	cleanupTimeout = 20 * time.Second
	scratchFile    = "scratch.ext4"
)

var errNoProgress = fmt.Errorf("no progress for too long: %w", context.DeadlineExceeded)

// starting is one start under way: what its steps have made so far.
type starting struct {
	ms      *Machines
	e       *entry
	m       Machine
	kernel  vmm.Kernel
	net     network.Network
	nic     []vmm.NIC
	root    []RootDisk
	checked chan error // gets the outcome of checking the root disks; nil: nobody asked
	reason  Reason     // of the failure, where there is one beside the failed step
	run     *run
	undo    []func(ctx context.Context) error
	running string // the step under way, also the guest's own

	request       *provision.Request // of a guest without an agent; nil: it has one
	patience      *time.Timer        // ends a start that makes no progress
	plan          *plan.Plan         // what the guest is provisioned with
	digest        digest.Digest
	log           *provisionLog
	provisionStep string // that of provisioning which is under way; "" before the first
	warnings      []string
}

// step is one named part of a start. Do registers what undoes it.
type step struct {
	name string
	do   func(ctx context.Context) error
}

// Start boots a machine and returns when its entrypoint runs. Already running is no error.
func (ms *Machines) Start(ctx context.Context, name string) (Machine, []string, error) {
	e, err := ms.find(name)
	if err != nil {
		return Machine{}, nil, err
	}
	if err := e.take(ctx); err != nil {
		return Machine{}, nil, err
	}
	defer e.give()
	return ms.start(ctx, e)
}

func (ms *Machines) start(ctx context.Context, e *entry) (Machine, []string, error) {
	m := e.get()
	if m.State.Alive() {
		return m, nil, nil
	}
	if e.isGone() {
		return m, nil, fmt.Errorf("starting machine %q: %w", m.Spec.Name, errdefs.ErrNotFound)
	}
	driver, caps, err := ms.driver(ctx, m.Spec.VMM)
	if err != nil {
		return m, nil, fmt.Errorf("starting machine %q: %w", m.Spec.Name, err)
	}
	token := transport.NewToken()
	s := &starting{ms: ms, e: e, log: &provisionLog{dir: e.dir}}
	if caps.Warning != "" {
		s.warnings = append(s.warnings, caps.Warning)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.patience = time.AfterFunc(startTimeout, func() { cancel(errNoProgress) })
	defer s.patience.Stop()
	e.setCancel(func() { cancel(nil) })
	defer e.setCancel(nil)
	// Before the record tells that it starts: whoever is attached waits for this boot's output.
	if err := e.log.Begin(); err != nil {
		e.log.End()
		return m, s.warnings, fmt.Errorf("starting machine %q: %w", m.Spec.Name, err)
	}
	began := time.Now()
	// The one write before the VMM runs: after a crash from here on, Recover undoes what it finds.
	e.mu.Lock()
	err = ms.commitWholeLocked(e, "", func(m *Machine) {
		m.State, m.Reason, m.ExitCode, m.Error, m.FailedStep = Starting, "", 0, "", ""
		m.Started, m.Finished, m.Steps, m.Ports = time.Time{}, time.Time{}, nil, nil
		m.AgentToken, m.HostBoot, m.Last, m.Health = token, ms.BootID, nil, nil
		m.Provisioning.FailedStep, m.Provisioning.ExitCode = "", nil
		m.VMM = VMMStatus{Driver: driver.Name(), Accelerator: caps.Accelerator, Console: filepath.Join(e.dir, vmm.ConsoleFile)}
		s.m = *m
	})
	e.mu.Unlock()
	if err != nil {
		e.log.End()
		return e.get(), s.warnings, fmt.Errorf("starting machine %q: %w", m.Spec.Name, err)
	}
	s.m.Steps = []StepTime{{stepRecord, time.Since(began)}}
	steps := []step{
		{stepProvisioning, s.compile},
		{"kernel", s.findKernel},
		{"root disk", s.makeRoot},
		{"scratch disk", s.makeScratch},
		{"network", s.attachNetwork},
		{"vmm", func(ctx context.Context) error { return s.startVMM(ctx, driver) }},
		{"agent", s.connectAgent},
		{"verity", s.verify},
		{"guest", s.configureGuest},
	}
	if m.ownSystem() {
		steps = s.diskSteps(driver)
	}
	err = s.all(ctx, steps)
	asked := s.m.Provisioning
	if err == nil {
		err = s.provisioned()
	}
	err = errors.Join(err, s.log.close())
	e.mu.Lock()
	if err == nil {
		err = ctx.Err() // a kill came with the last step
	}
	if err == nil {
		err = s.recordLocked()
	}
	if err != nil {
		e.mu.Unlock()
		s.m.Provisioning = asked
		return s.fail(ctx, err)
	}
	e.cancelStart, e.stopAsked = nil, false
	e.run = s.run
	e.mu.Unlock()
	ms.supervise(e, s.run)
	return e.get(), s.warnings, nil
}

// stepRecord writes down that a machine runs.
const stepRecord = "record"

// recordLocked tells that the machine runs. Where that cannot be written and something was due, the start has failed: the next daemon
// would take the record at its word and do again what was due, a first boot with a fresh disk in the place of one that was used.
func (s *starting) recordLocked() error {
	commit, due := s.ms.commitLocked, s.e.m.Provisioning.Due != DueNothing
	if due {
		commit = s.ms.commitWholeLocked
	}
	err := commit(s.e, "start", func(m *Machine) {
		m.State, m.Started, m.Steps, m.Lease, m.Ports = Running, time.Now(), s.m.Steps, s.m.Lease, s.m.Ports
		m.VMM, m.Spec.Hostname, m.Provisioning = s.m.VMM, s.m.Spec.Hostname, s.m.Provisioning
		if m.healthArgv() != nil {
			m.Health = &health.State{Status: health.Starting}
		}
	})
	switch {
	case err != nil && due:
		s.running = stepRecord
		return hint.With(err, "check the free space in %s", s.ms.Dir)
	case err != nil:
		s.ms.Log.Error("recording a started machine", "machine", s.m.ID, "err", err)
	}
	return nil
}

func (ms *Machines) driver(ctx context.Context, name string) (vmm.Driver, vmm.Capabilities, error) {
	d := ms.Drivers[name]
	if d == nil {
		return nil, vmm.Capabilities{}, fmt.Errorf("VMM %q: %w", name, errdefs.ErrNotFound)
	}
	caps, err := d.Probe(ctx)
	return d, caps, err
}

func (s *starting) all(ctx context.Context, steps []step) error {
	for _, st := range steps {
		s.running = st.name
		s.patience.Reset(startTimeout)
		began := time.Now()
		if err := st.do(ctx); err != nil {
			return err
		}
		s.m.Steps = append(s.m.Steps, StepTime{st.name, time.Since(began)})
	}
	return nil
}

func (s *starting) findKernel(ctx context.Context) error {
	if s.plan != nil {
		if faults := kernelArgsFaults(slices.Concat(s.plan.KernelArgs, s.plan.DropArgs), s.m.ownSystem()); faults != nil {
			return fmt.Errorf("%w: %w", errors.Join(faults...), errdefs.ErrInvalidArgument)
		}
	}
	k, name, err := s.ms.Kernels.Boot(ctx, s.m.Spec.Kernel, s.features()...)
	k.Args = strings.TrimSpace(strings.Join(append([]string{k.Args}, s.m.Spec.KernelArgs...), " "))
	s.kernel, s.m.VMM.Kernel = k, name
	return err
}

// features is what the machine needs of its kernel beside what all do.
func (s *starting) features() []string {
	if s.m.Spec.Verity {
		return []string{featureVerity}
	}
	return nil
}

func (s *starting) makeRoot(ctx context.Context) (err error) {
	if s.root, err = s.ms.Disks.Root(ctx, s.m.Image.Digest); err != nil || !s.m.Spec.Verity {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	s.undo = append(s.undo, func(context.Context) error { cancel(); return nil })
	s.checked = make(chan error, 1)
	go func() { // while the kernel boots
		defer cancel()
		s.checked <- s.ms.Disks.Verify(ctx, s.m.Image.Digest)
	}()
	return nil
}

// verify waits for the check of the root disks. The guest gets to know nothing of its machine, and mounts nothing, before.
func (s *starting) verify(context.Context) error {
	if s.checked == nil {
		return nil
	}
	err := <-s.checked
	if errdefs.IsDataLoss(err) {
		s.reason = ReasonVerity
	}
	return err
}

// makeScratch makes the disk at the first start; later ones find what the machine wrote. Until a first boot has been finished each try
// has a disk of its own.
func (s *starting) makeScratch(context.Context) error {
	path := s.scratch()
	if _, err := os.Stat(path); err == nil && s.m.Provisioning.Due != DueFirst {
		return nil
	}
	tmp := path + ".new"
	if err := s.ms.Disks.Scratch(tmp, s.m.Spec.DiskBytes); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return os.Rename(tmp, path)
}

func (s *starting) scratch() string { return filepath.Join(s.e.dir, scratchFile) }

func (s *starting) attachNetwork(ctx context.Context) error {
	name := s.m.Spec.Network
	if name == NoNetwork {
		return nil
	}
	n, d, err := s.ms.Networks.Get(name)
	if err != nil {
		return err
	}
	lease, err := s.ms.Networks.Lease(name, s.m.ID.Short())
	if err != nil {
		return err
	}
	s.net, s.m.Lease = n, lease
	s.undo = append(s.undo, func(ctx context.Context) error { return d.Detach(ctx, n, s.m.ID.Short()) })
	if s.request == nil {
		if s.request, err = s.ms.requestFor(&s.m); err != nil {
			return err
		}
	}
	ep, err := s.m.endpoint(n, s.request)
	if err != nil {
		return err
	}
	a, err := d.Attach(ctx, n, ep)
	if err != nil {
		return err
	}
	s.m.Ports = a.Ports
	s.nic = []vmm.NIC{{MAC: lease.MAC, MTU: n.MTU, Local: a.Local, Remote: a.Remote}}
	return nil
}

func (s *starting) startVMM(ctx context.Context, d vmm.Driver) error {
	inst, err := d.Start(ctx, s.spec())
	if err != nil {
		return err
	}
	s.run = newRun(inst, s.e)
	s.run.modules = s.ms.modulesOf(s.m.VMM.Kernel)
	s.undo = append(s.undo, func(ctx context.Context) error {
		return errors.Join(inst.Kill(ctx), s.run.close())
	})
	s.m.VMM.PID, s.m.VMM.Accelerator = inst.PID(), inst.Accelerator()
	return nil
}

func (s *starting) spec() vmm.Spec {
	if s.m.ownSystem() {
		return s.diskSpec()
	}
	var disks []vmm.Disk
	for _, d := range slices.Backward(s.root) { // the topmost first, as the agent joins them
		disks = append(disks, vmm.Disk{Path: d.Path, ReadOnly: true})
	}
	kernel := s.kernel
	if s.plan != nil { // else it is only to be recovered
		kernel.Args, kernel.DropArgs = kernelArgs(kernel.Args, s.plan), s.plan.DropArgs
	}
	return vmm.Spec{
		ID:          s.m.ID.Short(),
		Dir:         s.e.dir,
		Kernel:      kernel,
		CPUs:        s.m.Spec.CPUs,
		MemoryBytes: s.m.Spec.MemoryBytes,
		Disks:       append(disks, vmm.Disk{Path: s.scratch()}),
		NICs:        s.nic,
		PowersOff:   s.m.imageInit(),
	}
}

func (s *starting) connectAgent(ctx context.Context) error {
	return s.run.connect(ctx, s.m.AgentToken)
}

func (s *starting) configureGuest(ctx context.Context) error {
	c, err := s.config()
	if err != nil {
		return err
	}
	began := time.Now()
	last := ""
	err = s.run.configure(ctx, c, s.contents(), host.Configuring{Output: s.guestOutput, Step: func(name string) {
		if last != "" {
			s.m.Steps = append(s.m.Steps, StepTime{last, time.Since(began)})
		}
		last, began = "guest: "+name, time.Now()
		s.running = last
		s.guestStep(name)
	}})
	if err == nil && s.m.imageInit() {
		// The agent goes on in another process now, which answers a new session only.
		s.running = "agent beside init"
		s.run.drop()
		err = s.run.connect(ctx, s.m.AgentToken)
	}
	return err
}

func (s *starting) config() (*agentv1.Config, error) {
	words, err := argv(s.m.Spec, s.m.Image)
	if err != nil {
		return nil, err
	}
	entropy := make([]byte, 64)
	_, _ = rand.Read(entropy)
	sp, img := s.m.Spec, s.m.Image
	c := &agentv1.Config{
		MachineId: string(s.m.ID),
		Hostname:  sp.Hostname,
		UnixNanos: time.Now().UnixNano(),
		Entropy:   entropy,
		Modules:   s.features(),
		Root:      s.rootConfig(),
		Process: &agentv1.Process{
			Argv:       words,
			Env:        environment(sp.TTY, sp.Hostname, img.Env, sp.Env),
			WorkingDir: cmp.Or(sp.WorkingDir, img.WorkingDir, "/"),
			User:       cmp.Or(sp.User, img.User),
			Tty:        sp.TTY,
			Stdin:      sp.Stdin,
			StopSignal: cmp.Or(sp.StopSignal, img.StopSignal),
			Rlimits:    rlimits(sp.Ulimits),
		},
		Volumes: volumes(img),
		Tmpfs:   tmpfsConfig(sp.Tmpfs),
		Sysctls: sp.Sysctls,
	}
	c.Root.ReadOnly = sp.ReadOnly
	if s.m.imageInit() {
		c.Init, c.Process.Env = true, initEnvironment(c.Process.Env, sp.TTY)
		c.Modules = append(c.Modules, initModules)
	}
	if len(s.nic) > 0 {
		c.DnsServers = []string{s.net.Gateway.String()}
		c.Interfaces = []*agentv1.Interface{{
			Mac: s.m.Lease.MAC, Address: s.m.address(s.net).String(), Gateway: s.net.Gateway.String(), Mtu: uint32(s.net.MTU),
		}}
		c.Hosts = []*agentv1.HostEntry{{Address: s.m.Lease.Address.String(), Names: []string{sp.Hostname, sp.Name}}}
	}
	s.provision(c)
	return c, s.addNames(c)
}

// rootConfig names the disks in the order of spec.
func (s *starting) rootConfig() *agentv1.Root {
	device := func(i int) string { return "/dev/vd" + string(rune('a'+i)) }
	r := &agentv1.Root{Scratch: device(len(s.root)), ScratchType: "ext4"}
	for _, d := range slices.Backward(s.root) {
		disk := &agentv1.RootDisk{Device: device(len(r.GetDisks())), Type: "erofs", HasRoot: d.HasRoot}
		if s.m.Spec.Verity {
			disk.Verity = &agentv1.Verity{RootHash: d.RootHash, Salt: d.Salt, DataBlocks: uint64(d.DataBlocks)}
		}
		r.Disks = append(r.Disks, disk)
	}
	return r
}

// fail undoes what the steps did, in reverse, and records why.
func (s *starting) fail(ctx context.Context, cause error) (Machine, []string, error) {
	status := s.provisionFailed(cause)
	code := exitCodeOf(cause)
	if s.provisionStep != "" {
		cause = s.withOutput(cause)
	} else if f := (*host.Failure)(nil); errors.As(cause, &f) { // the agent's own words say more than the console, and the step is named already
		cause = &host.Failure{Class: f.Class, Message: f.Message}
	} else if s.reason == "" && s.running != stepRecord { // else it is not the guest's fault
		cause = withConsole(cause, s.m.VMM.Console, s.run != nil)
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	for i := len(s.undo) - 1; i >= 0; i-- {
		if err := s.undo[i](cleanup); err != nil {
			s.ms.Log.Error("undoing a failed start", "machine", s.m.ID, "err", err)
		}
	}
	err := fmt.Errorf("starting machine %q: %s: %w", s.m.Spec.Name, s.running, cause)
	s.e.log.End()
	commitErr := s.ms.commit(s.e, "die", func(m *Machine) {
		m.State, m.Error, m.FailedStep, m.ExitCode, m.Finished, m.Steps = Failed, cause.Error(), s.running, code, time.Now(), s.m.Steps
		m.Reason = s.reason
		m.Lease, m.Provisioning = s.m.Lease, status
		m.VMM.PID = 0
	})
	if ctx.Err() != nil {
		s.ms.afterwards(s.e) // nobody may be there any more to throw it away
	}
	return s.e.get(), s.warnings, errors.Join(err, commitErr)
}

func (e *entry) setCancel(cancel context.CancelFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cancelStart = cancel
}

func (e *entry) isGone() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.gone
}

// withConsole adds the console's tail, which tells more than any time-out.
func withConsole(err error, console string, booted bool) error {
	if !booted {
		return err
	}
	tail := consoleTail(console, 12)
	if tail == "" {
		return hint.With(err, "the console is empty: the kernel did not start")
	}
	return fmt.Errorf("%w; the console's last lines:\n%s", err, tail)
}
