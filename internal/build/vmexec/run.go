//go:build linux

package vmexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/executor/resources/types"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/resolvconf"
	"golang.org/x/sys/unix"
)

// OutOfMemory is what the error of a step says that the guest's kernel killed for want of memory.
const OutOfMemory = "the build's virtual machine has too little memory"

const (
	defaultHostname = "buildkitsandbox" // BuildKit's own
	// killPatience is how long a killed step may take to end before its VM counts as lost.
	killPatience = 10 * time.Second
	exitNoExec   = 126
	exitNotFound = 127
)

// Run implements executor.Executor.
func (v *VM) Run(ctx context.Context, id string, root executor.Mount, mounts []executor.Mount, process executor.ProcessInfo, ready chan<- struct{}) (_ types.Recorder, err error) {
	began := func() {
		if ready != nil {
			close(ready)
			ready = nil
		}
	}
	defer began()
	if id == "" {
		id = identity.NewID()
	}
	if err := executor.ValidContainerID(id); err != nil {
		return nil, err
	}
	if err := refuse(process.Meta); err != nil {
		return nil, err
	}
	vm, leave, err := v.enter()
	if err != nil {
		return nil, err
	}
	defer leave()

	t := v.stage().tree(id)
	defer func() { err = errors.Join(err, t.close()) }()
	if err := t.mountRoot(ctx, root); err != nil {
		return nil, fmt.Errorf("mounting the step's root: %w", err)
	}
	// Its mount points are the guest's to make; what is left of them goes, as with other executors.
	var removeStubs func()
	if err := inside(t.root(), func() {
		removeStubs = executor.MountStubsCleaner(context.WithoutCancel(ctx), "/", mounts, process.Meta.RemoveMountStubsRecursive)
	}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, inside(t.root(), removeStubs)) }()
	guest, err := t.mountAll(ctx, mounts)
	if err != nil {
		return nil, err
	}
	resolvConf, err := resolvConf()
	if err != nil {
		return nil, err
	}
	sockets := takeSockets(guest)
	req := containerOf(id, process, root.Readonly, guest, resolvConf)
	x, err := vm.agent.Container(context.WithoutCancel(ctx), req)
	if err != nil {
		return nil, v.notStarted(vm, err)
	}
	defer x.Close()
	began()
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan struct{})
	go func() {
		defer close(served)
		serveSockets(serving, vm.agent, id, sockets)
	}()
	defer func() {
		stop()
		<-served
	}()
	return nil, v.follow(ctx, vm, x, process)
}

// Exec implements executor.Executor.
func (v *VM) Exec(ctx context.Context, id string, process executor.ProcessInfo) error {
	vm, leave, err := v.enter()
	if err != nil {
		return err
	}
	defer leave()
	x, err := vm.agent.Exec(context.WithoutCancel(ctx), &agentv1.Exec{Process: processOf(process), Container: id})
	if err != nil {
		return v.notStarted(vm, err)
	}
	defer x.Close()
	return v.follow(ctx, vm, x, process)
}

// refuse names what a step asks for and cannot have here.
func refuse(m executor.Meta) error {
	const where = "is not available with --isolation vm"
	switch {
	case m.SecurityMode != pb.SecurityMode_SANDBOX:
		return fmt.Errorf("RUN --security=insecure %s: %w", where, errdefs.ErrNotImplemented)
	case len(m.CDIDevices) > 0:
		return fmt.Errorf("RUN --device %s: %w", where, errdefs.ErrNotImplemented)
	case len(m.Ulimit) > 0:
		return fmt.Errorf("a ulimit %s: %w", where, errdefs.ErrNotImplemented)
	case m.Proxy != nil:
		return fmt.Errorf("a network proxy of the builder %s: %w", where, errdefs.ErrNotImplemented)
	}
	return nil
}

// containerOf puts a step into the agent's words.
func containerOf(id string, p executor.ProcessInfo, readOnly bool, mounts []*agentv1.Mount, resolvConf []byte) *agentv1.Container {
	hostname := p.Meta.Hostname
	if hostname == "" {
		hostname = defaultHostname
	}
	var hosts bytes.Buffer
	fmt.Fprintf(&hosts, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname)
	for _, h := range p.Meta.ExtraHosts {
		fmt.Fprintf(&hosts, "%s\t%s\n", h.IP, h.Host)
	}
	return &agentv1.Container{
		Id: id, Process: processOf(p), Root: guestPath(id, rootName), ReadOnly: readOnly || p.Meta.ReadonlyRootFS, Mounts: mounts,
		Hostname: hostname, Hosts: hosts.Bytes(), ResolvConf: resolvConf, NoNetwork: p.Meta.NetMode == pb.NetMode_NONE,
	}
}

func processOf(p executor.ProcessInfo) *agentv1.Process {
	return &agentv1.Process{
		Argv: p.Meta.Args, Env: p.Meta.Env, WorkingDir: p.Meta.Cwd, User: p.Meta.User, Tty: p.Meta.Tty, Stdin: p.Stdin != nil,
	}
}

func guestPath(id, name string) string { return filepath.Join(guestShare, id, name) }

// resolvConf is the host's with the VM's gateway as the one name server.
func resolvConf() ([]byte, error) {
	rc, err := resolvconf.Load("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading the host's resolvers: %w", err)
	}
	n, _ := segment()
	rc.OverrideNameServers([]netip.Addr{n.Gateway})
	return rc.Generate(false)
}

// notStarted turns the agent's refusal into the end of a step: what is the Dockerfile's fault reads as with a shell.
func (v *VM) notStarted(vm *started, err error) error {
	var f *host.Failure
	if !errors.As(err, &f) {
		return v.explain(vm.instance, err)
	}
	code := uint32(0)
	switch f.Class {
	case agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND:
		code = exitNotFound
	case agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE:
		code = exitNoExec
	default:
		return f
	}
	return &gatewayapi.ExitError{ExitCode: code, Err: fmt.Errorf("exit code: %d: %w", code, f)}
}

// follow carries between a process and BuildKit until the process has ended.
func (v *VM) follow(ctx context.Context, vm *started, x *host.Exec, p executor.ProcessInfo) error {
	ended := make(chan struct{})
	defer close(ended)
	if p.Stdin != nil {
		go func() {
			_, _ = io.Copy(x, p.Stdin)
			_ = x.CloseStdin()
		}()
	}
	go obey(ctx, x, p, ended)
	for {
		o, err := x.Recv()
		if err != nil {
			return errors.Join(context.Cause(ctx), v.explain(vm.instance, err))
		}
		switch {
		case o.GetExit() != nil:
			return exitError(ctx, o.GetExit(), p.Meta.ValidExitCodes)
		case len(o.GetStdout()) > 0 && p.Stdout != nil:
			_, err = p.Stdout.Write(o.GetStdout())
		case len(o.GetStderr()) > 0 && p.Stderr != nil:
			_, err = p.Stderr.Write(o.GetStderr())
		}
		if err != nil {
			return err
		}
	}
}

// obey passes signals and sizes on, and kills the process when ctx ends; a VM in which even that does nothing is given up.
func obey(ctx context.Context, x *host.Exec, p executor.ProcessInfo, ended <-chan struct{}) {
	for {
		select {
		case <-ended:
			return
		case s := <-p.Signal:
			_ = x.Signal(int32(s))
		case size := <-p.Resize:
			_ = x.Resize(size.Rows, size.Cols)
		case <-ctx.Done():
			_ = x.Signal(int32(unix.SIGKILL))
			select {
			case <-ended:
			case <-time.After(killPatience):
				_ = x.Close()
			}
			return
		}
	}
}

func exitError(ctx context.Context, e *agentv1.EntrypointExited, valid []int) error {
	code := int(e.GetCode())
	if valid == nil {
		valid = []int{0}
	}
	if slices.Contains(valid, code) {
		return nil
	}
	exit := &gatewayapi.ExitError{ExitCode: uint32(code)}
	if e.GetOomKilled() {
		exit.Err = fmt.Errorf("exit code: %d: %s: %w", code, OutOfMemory, syscall.ENOMEM)
	}
	if ctx.Err() != nil {
		exit.Err = fmt.Errorf("%s: %w", exit.Error(), context.Cause(ctx))
	}
	return exit
}
