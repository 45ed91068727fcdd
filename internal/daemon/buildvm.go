//go:build linux

package daemon

import (
	"cmp"
	"context"
	"fmt"
	"runtime"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/build/vmexec"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/vmm/qemu"
	"golang.org/x/sys/unix"
)

// mostBuildMemory is what a build's VM gets at most where nobody says how much. Pages that a build never touches cost nothing.
const mostBuildMemory = 2 << 30

// buildVM describes the virtual machine of a build. What it cannot do without is looked for here, where an error finds its reader.
func (s *system) buildVM(ctx context.Context, settings config.Build, probeDir string) (child.Isolation, error) {
	if _, err := qemu.FindVirtiofsd(); err != nil {
		return child.Isolation{}, err
	}
	if _, err := s.qemu.Probe(ctx); err != nil {
		return child.Isolation{}, err
	}
	k, err := s.kernels.Get("")
	if err != nil {
		return child.Isolation{}, err
	}
	if err := k.Require(kernel.VirtioFS); err != nil {
		return child.Isolation{}, err
	}
	boot, _, err := (&kernelsOf{s}).Boot(ctx, k.Name)
	if err != nil {
		return child.Isolation{}, err
	}
	memory := int64(settings.VMMemory)
	if memory == 0 {
		if memory, err = defaultBuildMemory(); err != nil {
			return child.Isolation{}, err
		}
	}
	return child.Isolation{
		VM: vmexec.Spec{
			Kernel: boot, Features: []string{kernel.VirtioFS}, CPUs: cmp.Or(settings.VMCPUs, runtime.NumCPU()), MemoryBytes: memory,
		},
		ProbeDir: probeDir,
	}, nil
}

func defaultBuildMemory() (int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("finding out how much memory the host has: %w", err)
	}
	const mib = 1 << 20
	quarter := int64(info.Totalram) * int64(info.Unit) / 4
	return min(quarter, mostBuildMemory) / mib * mib, nil
}
