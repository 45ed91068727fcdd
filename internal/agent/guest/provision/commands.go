package provision

import (
	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// wants says whether a command runs at this boot, after everything else.
func (r *Provisioner) wants(c *agentv1.Command) bool {
	return !c.GetEarly() && (r.GetFirst() || c.GetEachBoot())
}

// wantsEarly says whether a command runs at this boot, before everything else.
func (r *Provisioner) wantsEarly(c *agentv1.Command) bool {
	return c.GetEarly() && (r.GetFirst() || c.GetEachBoot())
}

func (r *Provisioner) commands(which func(*agentv1.Command) bool) error { return errTODO }
