//go:build linux

package server

import (
	"slices"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/provision"
)

func requestFrom(p *atollv1.Provisioning) provision.Request {
	r := provision.Request{
		SSHAuthorizedKeys: p.GetSshAuthorizedKeys(), SSHHostKeys: p.GetSshHostKeys(), Timezone: p.GetTimezone(), Locale: p.GetLocale(),
		NTPServers: p.GetNtpServers(), Packages: p.GetPackages(), UserData: p.GetUserData(), Ignition: p.GetIgnition(),
	}
	for _, u := range p.GetUsers() {
		r.Users = append(r.Users, provision.User{
			Name: u.GetName(), UID: u.Uid, Home: u.GetHome(), Shell: u.GetShell(), Groups: u.GetGroups(), Sudo: u.GetSudo(),
			PasswordHash: u.GetPasswordHash(), SSHAuthorizedKeys: u.GetSshAuthorizedKeys(),
		})
	}
	for _, f := range p.GetFiles() {
		r.Files = append(r.Files, provision.File{Path: f.GetPath(), Data: f.GetData(), Mode: f.GetMode(), Owner: f.GetOwner()})
	}
	for _, m := range p.GetMounts() {
		r.Mounts = append(r.Mounts, provision.FileSystemMount{Source: m.GetSource(), Path: m.GetPath(), Type: m.GetType(), Options: m.GetOptions()})
	}
	for _, s := range p.GetSecrets() {
		r.Secrets = append(r.Secrets, provision.Secret{Name: s.GetName(), Data: s.GetData(), Owner: s.GetOwner(), Mode: s.GetMode()})
	}
	return r
}

func requestOrNil(p *atollv1.Provisioning) *provision.Request {
	if p == nil {
		return nil
	}
	r := requestFrom(p)
	return &r
}

// provisioningTo shows a request as a machine's record has it: redacted.
func provisioningTo(r provision.Request) *atollv1.Provisioning {
	if r.Empty() && len(r.Withheld) == 0 {
		return nil
	}
	p := &atollv1.Provisioning{Timezone: r.Timezone, Locale: r.Locale, NtpServers: r.NTPServers, Packages: r.Packages, Withheld: r.Withheld}
	for _, u := range r.Users {
		p.Users = append(p.Users, &atollv1.User{Name: u.Name, Uid: u.UID, Home: u.Home, Shell: u.Shell, Groups: u.Groups, Sudo: u.Sudo})
	}
	for _, f := range r.Files {
		p.Files = append(p.Files, &atollv1.File{Path: f.Path, Mode: f.Mode, Owner: f.Owner})
	}
	for _, m := range r.Mounts {
		p.Mounts = append(p.Mounts, &atollv1.FileSystemMount{Source: m.Source, Path: m.Path, Type: m.Type, Options: m.Options})
	}
	for _, s := range r.Secrets {
		p.Secrets = append(p.Secrets, &atollv1.Secret{Name: s.Name, Owner: s.Owner, Mode: s.Mode})
	}
	return p
}

func provisionStatusTo(m machine.Machine) *atollv1.ProvisioningStatus {
	p := m.Provisioning
	out := &atollv1.ProvisioningStatus{
		DoneAt: stamp(p.Done), Digest: p.Digest.String(), FailedStep: p.FailedStep, Log: p.Log, Step: p.Step, Due: p.Due != machine.DueNothing,
	}
	if p.ExitCode != nil {
		code := int32(*p.ExitCode)
		out.ExitCode = &code
	}
	return out
}

func (s *machines) provisionLog(req *atollv1.LogsRequest, out *connect.ServerStream[atollv1.LogsResponse]) error {
	lines := req.GetTail()
	if req.GetTailAll() {
		lines = -1
	}
	log, err := s.Machines.ProvisionLog(req.GetMachine(), lines)
	if err != nil {
		return err
	}
	for piece := range slices.Chunk(log, 64<<10) {
		if err := out.Send(&atollv1.LogsResponse{Stream: atollv1.Stream_STREAM_STDOUT, Data: piece}); err != nil {
			return err
		}
	}
	return nil
}
