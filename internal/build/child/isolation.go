//go:build linux

package child

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/atollvm/atoll/internal/build/vmexec"
	"github.com/atollvm/atoll/internal/vmm/qemu"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Isolation is what the session of a build offers that wants its steps run in a VM: the shape of that VM. BuildKit knows of a step
// only in whose sessions it runs, so this is how a step knows where to run.
type Isolation struct {
	VM vmexec.Spec
	// ProbeDir is where QEMU's driver keeps what its probe found out.
	ProbeDir string
}

const (
	isolationService = "atoll.build.v1.Isolation"
	isolationMethod  = "/" + isolationService + "/VM"
)

// Register makes the offer part of a session.
func (i Isolation) Register(s *grpc.Server) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: isolationService,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "VM",
			Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				if err := decode(&emptypb.Empty{}); err != nil {
					return nil, err
				}
				data, err := json.Marshal(i)
				return wrapperspb.Bytes(data), err
			},
		}},
	}, i)
}

// vms are the virtual machines of the builds that have one, each as long as its build's session.
type vms struct {
	dir string
	log *slog.Logger

	mu   sync.Mutex // guards the rest
	last int
	open map[string]*vmexec.VM // by session
	ends sync.WaitGroup
}

func vmDir(dir string) string { return filepath.Join(dir, "vm") }

func newVMs(dir string, log *slog.Logger) *vms {
	return &vms{dir: vmDir(dir), log: log, open: map[string]*vmexec.VM{}}
}

// of returns the VM of the first of the sessions that wants one; nil: none does. A step that builds share runs in a VM if one of
// them asks for that.
func (v *vms) of(ctx context.Context, sm *session.Manager, g session.Group) (*vmexec.VM, error) {
	for _, id := range session.AllSessionIDs(g) {
		caller, err := sm.Get(ctx, id, true)
		if err != nil || caller == nil || !caller.Supports(isolationMethod) {
			continue
		}
		if _, bare, ok := strings.Cut(id, ":"); ok { // a prefix tells steps of different contexts apart
			id = bare
		}
		vm, err := v.get(ctx, id, caller)
		if err != nil {
			return nil, fmt.Errorf("preparing the build's virtual machine: %w", err)
		}
		return vm, nil
	}
	return nil, nil
}

func (v *vms) get(ctx context.Context, id string, caller session.Caller) (*vmexec.VM, error) {
	var reply wrapperspb.BytesValue
	if err := caller.Conn().Invoke(ctx, isolationMethod, &emptypb.Empty{}, &reply); err != nil {
		return nil, err
	}
	var i Isolation
	if err := json.Unmarshal(reply.GetValue(), &i); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if vm := v.open[id]; vm != nil {
		return vm, nil
	}
	v.last++
	dir := filepath.Join(v.dir, strconv.Itoa(v.last))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	vm := vmexec.New(dir, i.VM, qemu.New(qemu.Options{Dir: i.ProbeDir, Log: v.log}), v.log)
	v.open[id] = vm
	ended := caller.Context(context.Background()).Done()
	v.ends.Go(func() {
		<-ended
		v.mu.Lock()
		delete(v.open, id)
		v.mu.Unlock()
		if err := vm.Close(); err != nil {
			v.log.Error("ending a build's VM", "err", err)
		}
	})
	return vm, nil
}

// wait returns when all have ended, which they do with their sessions.
func (v *vms) wait() { v.ends.Wait() }

// step is a RUN: where it runs is decided when it runs.
type step struct {
	solver.Op
	worker *imageWorker
	sm     *session.Manager
	inVM   func(executor.Executor) (solver.Op, error)
}

// ResolveOp has steps look for the VM of their build.
func (w *imageWorker) ResolveOp(v solver.Vertex, s frontend.FrontendLLBBridge, sm *session.Manager, proxy worker.ProxyOpt) (solver.Op, error) {
	op, err := w.Worker.ResolveOp(v, s, sm, proxy)
	if err != nil {
		return nil, err
	}
	if o, ok := v.Sys().(*pb.Op); !ok || o.GetExec() == nil {
		return op, nil
	}
	return &step{Op: op, worker: w, sm: sm, inVM: func(e executor.Executor) (solver.Op, error) {
		opt := w.WorkerOpt
		opt.Executor = withAuthorities(e, w.authorities)
		isolated := &base.Worker{WorkerOpt: opt, CacheMgr: w.CacheMgr, SourceManager: w.SourceManager, ImageSource: w.ImageSource, OCILayoutSource: w.OCILayoutSource}
		return isolated.ResolveOp(v, s, sm, proxy)
	}}, nil
}

func (s *step) Exec(ctx context.Context, job solver.JobContext, inputs []solver.Result) ([]solver.Result, error) {
	vm, err := s.worker.vms.of(ctx, s.sm, job.Session())
	if err != nil {
		return nil, err
	}
	if vm == nil {
		return s.Op.Exec(ctx, job, inputs)
	}
	op, err := s.inVM(vm)
	if err != nil {
		return nil, err
	}
	return op.Exec(ctx, job, inputs)
}

// noExecutor stands for runc where there is none.
type noExecutor struct{}

// NoRunc is what the error of a RUN says that needs runc where there is none.
const NoRunc = "RUN on this host needs runc"

var errNoRunc = fmt.Errorf("%s: %w", NoRunc, errdefs.ErrFailedPrecondition)

func (noExecutor) Run(context.Context, string, executor.Mount, []executor.Mount, executor.ProcessInfo, chan<- struct{}) (resourcestypes.Recorder, error) {
	return nil, errNoRunc
}

func (noExecutor) Exec(context.Context, string, executor.ProcessInfo) error { return errNoRunc }
