package host

import (
	"context"
	"fmt"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/containerd/errdefs"
)

// Module is a module of the guest's kernel.
type Module struct {
	Name string
	Data []byte
}

// maxModuleName bounds what a kernel can ask for (MODULE_NAME_LEN and aliases).
const maxModuleName = 256

// Modules serves what the guest's kernel asks for while it runs, one question after the other: find returns the modules to load, in that
// order, but those that the guest says are loaded. It returns when ctx or the session ends.
func (c *Client) Modules(ctx context.Context, find func(name string, loaded []string) ([]Module, error)) error {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_Modules{Modules: &agentv1.Modules{}}})
	if err != nil {
		return fmt.Errorf("serving kernel modules: %w", err)
	}
	defer s.Close()
	for {
		w := &agentv1.ModuleWanted{}
		if err := s.recv(w); err != nil {
			return fmt.Errorf("serving kernel modules: %w", err)
		}
		if len(w.GetName()) > maxModuleName {
			return fmt.Errorf("serving kernel modules: a name of %d bytes: %w", len(w.GetName()), c.violation())
		}
		modules, err := find(w.GetName(), w.GetLoaded())
		if err := s.sendModules(w.GetId(), modules, err); err != nil {
			return fmt.Errorf("serving kernel module %q: %w", printable(w.GetName()), err)
		}
	}
}

func (s *stream) sendModules(id uint64, modules []Module, failed error) error {
	last := &agentv1.ModulePart{Id: id, Done: true}
	if failed != nil {
		last.Error = "the host could not read it"
		if errdefs.IsNotFound(failed) {
			last.Error = "the host has no such module"
		}
	}
	for _, m := range modules {
		for at := 0; at < len(m.Data); at += maxChunk {
			end := min(at+maxChunk, len(m.Data))
			if err := s.send(&agentv1.ModulePart{Id: id, Name: m.Name, Data: m.Data[at:end], Last: end == len(m.Data)}); err != nil {
				return err
			}
		}
	}
	return s.send(last)
}
