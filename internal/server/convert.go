//go:build linux

package server

import (
	"fmt"
	"net/netip"
	"time"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/network"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func specFrom(s *atollv1.MachineSpec) (machine.Spec, error) {
	ports, err := portsFrom(s.GetPorts())
	if err != nil {
		return machine.Spec{}, err
	}
	spec := machine.Spec{
		Name: s.GetName(), Image: s.GetImage(), Command: s.GetCommand(), Entrypoint: s.GetEntrypoint(), SetEntrypoint: s.GetSetEntrypoint(),
		Env: s.GetEnv(), WorkingDir: s.GetWorkingDir(), User: s.GetUser(), TTY: s.GetTty(), Stdin: s.GetStdin(), Remove: s.GetRemove(),
		Hostname: s.GetHostname(), CPUs: int(s.GetCpus()), MemoryBytes: s.GetMemoryBytes(), DiskBytes: s.GetDiskBytes(), Ports: ports,
		Labels: s.GetLabels(), Network: s.GetNetwork(), Kernel: s.GetKernel(), VMM: s.GetVmm(), Platform: s.GetPlatform(), StopSignal: s.GetStopSignal(),
		Verity: s.GetVerity(), Init: s.GetInit(), Profiles: s.GetProfiles(), Disk: s.GetDisk(), Firmware: s.GetFirmware(),
		LogMaxBytes: s.GetLogMaxBytes(), LogMaxFiles: int(s.GetLogMaxFiles()),
	}
	guestFrom(s, &spec)
	spec.Metadata = machine.Metadata{Disabled: s.GetMetadata().GetDisabled(), V1: s.GetMetadata().GetV1()}
	spec.Provisioning = requestFrom(s.GetProvisioning())
	if t := s.GetStopTimeout(); t != nil {
		spec.StopTimeout = t.AsDuration()
	}
	return spec, nil
}

func portsFrom(ports []*atollv1.PortMapping) ([]network.PortMapping, error) {
	var out []network.PortMapping
	for _, p := range ports {
		m := network.PortMapping{HostPort: uint16(p.GetHostPort()), GuestPort: uint16(p.GetGuestPort()), Protocol: p.GetProtocol()}
		if p.GetHostPort() > 65535 || p.GetGuestPort() > 65535 || p.GetGuestPort() == 0 {
			return nil, fmt.Errorf("port mapping %d:%d: ports go from 1 to 65535: %w", p.GetHostPort(), p.GetGuestPort(), errdefs.ErrInvalidArgument)
		}
		switch m.Protocol {
		case "":
			m.Protocol = "tcp"
		case "tcp", "udp":
		default:
			return nil, fmt.Errorf("port mapping of %d: protocol %q is neither tcp nor udp: %w", p.GetGuestPort(), p.GetProtocol(), errdefs.ErrInvalidArgument)
		}
		if a := p.GetHostAddress(); a != "" {
			addr, err := netip.ParseAddr(a)
			if err != nil {
				return nil, fmt.Errorf("port mapping of %d: address %q: %w", p.GetGuestPort(), a, errdefs.ErrInvalidArgument)
			}
			m.HostAddress = addr
		}
		out = append(out, m)
	}
	return out, nil
}

func portsTo(ports []network.PortMapping) []*atollv1.PortMapping {
	var out []*atollv1.PortMapping
	for _, p := range ports {
		addr := "127.0.0.1"
		if p.HostAddress.IsValid() {
			addr = p.HostAddress.String()
		}
		out = append(out, &atollv1.PortMapping{HostAddress: addr, HostPort: uint32(p.HostPort), GuestPort: uint32(p.GuestPort), Protocol: p.Protocol})
	}
	return out
}

var states = map[machine.State]atollv1.MachineState{
	machine.Created:  atollv1.MachineState_MACHINE_STATE_CREATED,
	machine.Starting: atollv1.MachineState_MACHINE_STATE_STARTING,
	machine.Running:  atollv1.MachineState_MACHINE_STATE_RUNNING,
	machine.Paused:   atollv1.MachineState_MACHINE_STATE_PAUSED,
	machine.Stopping: atollv1.MachineState_MACHINE_STATE_STOPPING,
	machine.Stopped:  atollv1.MachineState_MACHINE_STATE_STOPPED,
	machine.Failed:   atollv1.MachineState_MACHINE_STATE_FAILED,
}

func machineTo(m machine.Machine) *atollv1.Machine {
	s := m.Spec
	out := &atollv1.Machine{
		Id: string(m.ID), Host: m.Host, State: states[m.State], Reason: string(m.Reason), ExitCode: int32(m.ExitCode), Error: m.Error,
		FailedStep: m.FailedStep, ImageDigest: m.Image.Digest.String(), ImageRef: m.Image.Reference, Argv: m.Argv(),
		Spec: &atollv1.MachineSpec{
			Name: s.Name, Image: s.Image, Command: s.Command, Entrypoint: s.Entrypoint, SetEntrypoint: s.SetEntrypoint, Env: s.Env,
			WorkingDir: s.WorkingDir, User: s.User, Tty: s.TTY, Stdin: s.Stdin, Remove: s.Remove, Hostname: s.Hostname, Cpus: uint32(s.CPUs),
			MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes, Ports: portsTo(s.Ports), Labels: s.Labels, Network: s.Network, Kernel: s.Kernel,
			Vmm: s.VMM, Platform: s.Platform, StopSignal: s.StopSignal, StopTimeout: durationpb.New(s.StopTimeout),
			Verity: s.Verity, Init: s.Init, Profiles: s.Profiles, Disk: s.Disk, Firmware: s.Firmware,
			LogMaxBytes: s.LogMaxBytes, LogMaxFiles: uint32(s.LogMaxFiles),
		},
		Health: healthTo(&m), ExposedPorts: m.Image.ExposedPorts, Volumes: m.Image.Volumes,
		CreatedAt: stamp(m.Created), StartedAt: stamp(m.Started), FinishedAt: stamp(m.Finished),
		Vmm: &atollv1.VMMStatus{Driver: m.VMM.Driver, Accelerator: m.VMM.Accelerator, Pid: int32(m.VMM.PID), Kernel: m.VMM.Kernel, Console: m.VMM.Console},
	}
	guestTo(s, out.Spec)
	out.Spec.Metadata = &atollv1.Metadata{Disabled: s.Metadata.Disabled, V1: s.Metadata.V1}
	out.Spec.Provisioning, out.Provisioning = provisioningTo(s.Provisioning), provisionStatusTo(m)
	if s.Disk != "" {
		out.ImageRef = s.Disk
	}
	for _, st := range m.Steps {
		out.Steps = append(out.Steps, &atollv1.StepTime{Name: st.Name, Took: durationpb.New(st.Took)})
	}
	if m.Lease.Address.IsValid() {
		out.Network = &atollv1.NetworkStatus{Name: m.Lease.Network, Mac: m.Lease.MAC, Address: m.Lease.Address.String(), Ports: portsTo(m.Ports)}
	}
	return out
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func exitTo(m machine.Machine) *atollv1.WaitMachineResponse {
	return &atollv1.WaitMachineResponse{ExitCode: int32(m.ExitCode), Reason: string(m.Reason), Error: m.Error}
}
