package host

import (
	"fmt"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

// checkProtocol refuses an agent that this host does not understand, or that would not understand it.
func checkProtocol(version uint32) error {
	switch {
	case version < transport.OldestProtocol:
		return tooOld(fmt.Sprintf("it speaks version %d of the protocol, and %d is the oldest that is still understood", version, transport.OldestProtocol))
	case version > transport.Protocol:
		return hint.With(fmt.Errorf("it is newer than this daemon: it speaks version %d of the protocol, not %d: %w", version, transport.Protocol, errdefs.ErrFailedPrecondition),
			"run the newer Atoll again, or restart the machine to give it this one's agent")
	}
	return nil
}

func tooOld(why string) error {
	return hint.With(fmt.Errorf("%s: %w", why, errdefs.ErrFailedPrecondition), "restart the machine to give it the agent of this Atoll")
}

// understood refuses, by name, what an agent of an older version does not know. It would leave out what it does not know of a Config.
func (c *Client) understood(req *agentv1.Request) error {
	if what := since2(req); what != "" {
		return c.since2(what)
	}
	return nil
}

// since2 refuses, by name, what only agents of version 2 know.
func (c *Client) since2(what string) error {
	if version := c.protocol.Load(); version < 2 {
		return tooOld(fmt.Sprintf("the machine's agent is too old for %s: it speaks version %d of the protocol, and that came with 2", what, version))
	}
	return nil
}

// since2 names what of a request only agents of version 2 know; "" when it has nothing of that.
func since2(req *agentv1.Request) string {
	switch k := req.GetKind().(type) {
	case *agentv1.Request_PutFiles, *agentv1.Request_GetFiles, *agentv1.Request_StatFile:
		return "copying files"
	case *agentv1.Request_Modules:
		return "kernel modules"
	case *agentv1.Request_SyncTime:
		return "setting its clock"
	case *agentv1.Request_Exec:
		return since2Process(k.Exec.GetProcess())
	case *agentv1.Request_Container:
		return since2Process(k.Container.GetProcess())
	case *agentv1.Request_Configure:
		c := k.Configure
		switch {
		case c.GetProvision() != nil:
			return "provisioning"
		case len(c.GetTmpfs()) > 0:
			return "tmpfs mounts"
		case len(c.GetSysctls()) > 0:
			return "sysctls"
		case len(c.GetVolumes()) > 0:
			return "volumes of the image"
		case len(c.GetNtpServers()) > 0:
			return "NTP"
		case len(c.GetDnsOptions()) > 0:
			return "DNS options"
		}
		return since2Process(c.GetProcess())
	}
	return ""
}

func since2Process(p *agentv1.Process) string {
	if len(p.GetRlimits()) > 0 {
		return "resource limits"
	}
	return ""
}
