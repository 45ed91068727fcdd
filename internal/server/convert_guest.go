//go:build linux

package server

import (
	"time"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/health"
	"github.com/atollvm/atoll/internal/machine"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// guestFrom takes over what a spec says of the guest beside its entrypoint.
func guestFrom(s *atollv1.MachineSpec, to *machine.Spec) {
	to.ReadOnly, to.Sysctls, to.DNS, to.DNSSearch, to.DNSOptions = s.GetReadOnly(), s.GetSysctls(), s.GetDns(), s.GetDnsSearch(), s.GetDnsOptions()
	to.PublishAll, to.KernelArgs, to.Health = s.GetPublishAll(), s.GetKernelArgs(), checkFrom(s.GetHealthCheck())
	for _, t := range s.GetTmpfs() {
		to.Tmpfs = append(to.Tmpfs, machine.Tmpfs{Path: t.GetPath(), Options: t.GetOptions()})
	}
	for _, u := range s.GetUlimits() {
		to.Ulimits = append(to.Ulimits, machine.Ulimit{Name: u.GetName(), Soft: u.GetSoft(), Hard: u.GetHard()})
	}
	for _, h := range s.GetAddHosts() {
		to.AddHosts = append(to.AddHosts, machine.HostEntry{Address: h.GetAddress(), Names: h.GetNames()})
	}
}

func guestTo(s machine.Spec, to *atollv1.MachineSpec) {
	to.Sysctls, to.Dns, to.DnsSearch, to.DnsOptions = s.Sysctls, s.DNS, s.DNSSearch, s.DNSOptions
	to.PublishAll, to.KernelArgs, to.HealthCheck = s.PublishAll, s.KernelArgs, checkTo(s.Health)
	if s.ReadOnly {
		to.ReadOnly = proto.Bool(true)
	}
	for _, t := range s.Tmpfs {
		to.Tmpfs = append(to.Tmpfs, &atollv1.Tmpfs{Path: t.Path, Options: t.Options})
	}
	for _, u := range s.Ulimits {
		to.Ulimits = append(to.Ulimits, &atollv1.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	for _, h := range s.AddHosts {
		to.AddHosts = append(to.AddHosts, &atollv1.HostEntry{Address: h.Address, Names: h.Names})
	}
}

func checkFrom(c *atollv1.HealthCheck) health.Check {
	return health.Check{
		Test: c.GetTest(), Interval: c.GetInterval().AsDuration(), Timeout: c.GetTimeout().AsDuration(), StartPeriod: c.GetStartPeriod().AsDuration(),
		StartInterval: c.GetStartInterval().AsDuration(), Retries: int(c.GetRetries()),
	}
}

// checkTo is nil of a check that says nothing.
func checkTo(c health.Check) *atollv1.HealthCheck {
	duration := func(d time.Duration) *durationpb.Duration {
		if d == 0 {
			return nil
		}
		return durationpb.New(d)
	}
	out := &atollv1.HealthCheck{
		Test: c.Test, Interval: duration(c.Interval), Timeout: duration(c.Timeout), StartPeriod: duration(c.StartPeriod),
		StartInterval: duration(c.StartInterval), Retries: uint32(c.Retries),
	}
	if proto.Equal(out, &atollv1.HealthCheck{}) {
		return nil
	}
	return out
}

func healthTo(m *machine.Machine) *atollv1.HealthStatus {
	if m.Health == nil {
		return nil
	}
	out := &atollv1.HealthStatus{Status: string(m.Health.Status), FailingStreak: uint32(m.Health.FailingStreak), Check: checkTo(m.HealthCheck())}
	for _, r := range m.Health.Log {
		out.Log = append(out.Log, &atollv1.HealthResult{Start: stamp(r.Start), End: stamp(r.End), ExitCode: int32(r.ExitCode), Output: r.Output})
	}
	return out
}
