package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/client"
)

const (
	// silent is how long a start may take before it is told what it is at.
	silent = time.Second
	glance = 500 * time.Millisecond
)

// watchProvisioning tells which step of provisioning a start is at, when that takes long. The caller ends it when the start is over.
func (e *environment) watchProvisioning(ctx context.Context, c *client.Client, name string, several bool) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		told, seen := "", ""
		for wait := silent; ; wait = glance {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
			res, err := c.Machines.Get(ctx, connect.NewRequest(&atollv1.GetMachineRequest{Machine: name}))
			if err != nil {
				continue
			}
			// A step that is gone at the next glance is not worth a word.
			step := res.Msg.GetMachine().GetProvisioning().GetStep()
			if step != "" && step == seen && step != told {
				told = step
				if several {
					step = name + ": " + step
				}
				fmt.Fprintf(e.Stderr, "Provisioning: %s\n", step)
			}
			seen = step
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// provisionView is what a machine was to be set up with, without what may be secret.
type provisionView struct {
	Users      []provisionUserView  `json:"users"`
	Timezone   string               `json:"timezone"`
	Locale     string               `json:"locale"`
	NTPServers []string             `json:"ntpServers"`
	Packages   []string             `json:"packages"`
	Files      []provisionFileView  `json:"files"`
	Mounts     []provisionMountView `json:"mounts"`
	Secrets    []string             `json:"secrets"`  // their names
	Withheld   []string             `json:"withheld"` // what was given and is not shown
}

type provisionUserView struct {
	Name   string   `json:"name"`
	UID    *uint32  `json:"uid"`
	Home   string   `json:"home"`
	Shell  string   `json:"shell"`
	Groups []string `json:"groups"`
	Sudo   bool     `json:"sudo"`
}

type provisionFileView struct {
	Path  string `json:"path"`
	Mode  string `json:"mode"`
	Owner string `json:"owner"`
}

type provisionMountView struct {
	Type    string `json:"type"`
	Source  string `json:"source"`
	Target  string `json:"target"`
	Options string `json:"options"`
}

func newProvisionView(p *atollv1.Provisioning) *provisionView {
	if p == nil {
		return nil
	}
	v := &provisionView{
		Users: []provisionUserView{}, Timezone: p.GetTimezone(), Locale: p.GetLocale(), NTPServers: list(p.GetNtpServers()), Packages: list(p.GetPackages()),
		Files: []provisionFileView{}, Mounts: []provisionMountView{}, Secrets: []string{}, Withheld: list(p.GetWithheld()),
	}
	for _, u := range p.GetUsers() {
		v.Users = append(v.Users, provisionUserView{u.GetName(), u.Uid, u.GetHome(), u.GetShell(), list(u.GetGroups()), u.GetSudo()})
	}
	for _, f := range p.GetFiles() {
		v.Files = append(v.Files, provisionFileView{f.GetPath(), fmt.Sprintf("%04o", f.GetMode()), f.GetOwner()})
	}
	for _, m := range p.GetMounts() {
		v.Mounts = append(v.Mounts, provisionMountView{m.GetType(), m.GetSource(), m.GetPath(), m.GetOptions()})
	}
	for _, s := range p.GetSecrets() {
		v.Secrets = append(v.Secrets, s.GetName())
	}
	return v
}

// provisionStatusView is what has become of it.
type provisionStatusView struct {
	Due        bool       `json:"due"`    // the next start does it
	DoneAt     *time.Time `json:"doneAt"` // null: the first boot has not been finished
	Digest     string     `json:"digest"` // of what was done
	FailedStep string     `json:"failedStep"`
	ExitCode   *int32     `json:"exitCode"` // of the command that failed
	Log        string     `json:"log"`
}

// String is a sentence for templates.
func (v provisionStatusView) String() string {
	switch {
	case v.FailedStep != "" && v.ExitCode != nil:
		return fmt.Sprintf("failed: %s (exit code %d)", v.FailedStep, *v.ExitCode)
	case v.FailedStep != "":
		return "failed: " + v.FailedStep
	case v.Due:
		return "due"
	}
	return strings.TrimSpace("done " + v.Digest)
}

func newProvisionStatusView(p *atollv1.ProvisioningStatus) provisionStatusView {
	return provisionStatusView{p.GetDue(), clockOrNil(p.GetDoneAt()), p.GetDigest(), p.GetFailedStep(), exitCodeOrNil(p), p.GetLog()}
}

func exitCodeOrNil(p *atollv1.ProvisioningStatus) *int32 {
	if p == nil {
		return nil
	}
	return p.ExitCode
}
