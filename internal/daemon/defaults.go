//go:build linux

package daemon

import (
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/config"
)

// defaultSpec is what the settings say of every machine.
func defaultSpec(m config.Machine) *atollv1.MachineSpec {
	return &atollv1.MachineSpec{
		Cpus: uint32(m.CPUs), MemoryBytes: int64(m.Memory), DiskBytes: int64(m.DiskSize), Kernel: m.Kernel, Network: m.Network, Profiles: m.Profiles,
	}
}
