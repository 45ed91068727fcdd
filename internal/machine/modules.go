package machine

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/containerd/errdefs"
)

// modulesOf is the modules of a running machine's kernel. What the guest asks for is not to be trusted: it gets nothing but modules of its
// own kernel, and each only so often that asking for ever costs the host nothing.
type modulesOf struct {
	kernel KernelModules
	log    *slog.Logger

	mu    sync.Mutex     // guards given
	given map[string]int // how often, by name
}

// sameModule is how often one module is given to one run of a guest, which may have unloaded it, or lost its channel while it came.
const sameModule = 10

func (ms *Machines) modulesOf(kernel string) *modulesOf {
	m := ms.Kernels.Modules(kernel)
	if m == nil {
		return nil
	}
	return &modulesOf{kernel: m, log: ms.Log, given: map[string]int{}}
}

// serve answers the guest until its session ends.
func (m *modulesOf) serve(agent *host.Client) {
	if err := agent.Modules(context.Background(), m.find); err != nil && !errdefs.IsUnavailable(err) {
		m.log.Debug("serving kernel modules", "err", err)
	}
}

func (m *modulesOf) find(request string, loaded []string) ([]host.Module, error) {
	names, err := m.kernel.Find(request)
	if err != nil {
		return nil, err
	}
	var modules []host.Module
	for _, name := range names {
		if slices.Contains(loaded, name) {
			continue
		}
		if !m.give(name) {
			return nil, fmt.Errorf("module %s has been given %d times: %w", name, sameModule, errdefs.ErrResourceExhausted)
		}
		data, err := m.kernel.Read(name)
		if err != nil {
			m.log.Warn("reading a kernel's module", "module", name, "err", err)
			return nil, err
		}
		modules = append(modules, host.Module{Name: name, Data: data})
	}
	return modules, nil
}

func (m *modulesOf) give(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.given[name]++
	return m.given[name] <= sameModule
}
