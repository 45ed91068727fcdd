package machine

import (
	"context"
	"fmt"
	"io"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
)

// StatFile tells what is at a path of a running machine.
func (ms *Machines) StatFile(ctx context.Context, name, path string) (st *agentv1.StatFileReply, err error) {
	err = ms.withAgent(ctx, name, func(agent *host.Client) error {
		st, err = agent.StatFile(ctx, path)
		return err
	})
	return st, err
}

// GetFiles writes the tar stream of a file or tree of a running machine.
func (ms *Machines) GetFiles(ctx context.Context, name, path string, follow bool, w io.Writer) error {
	return ms.withAgent(ctx, name, func(agent *host.Client) error {
		return agent.GetFiles(ctx, &agentv1.GetFiles{Path: path, Follow: follow}, w)
	})
}

// PutFiles unpacks a tar stream in a directory of a running machine. owners: those of the stream; else all becomes root's.
func (ms *Machines) PutFiles(ctx context.Context, name, path string, owners bool, r io.Reader) error {
	return ms.withAgent(ctx, name, func(agent *host.Client) error {
		return agent.PutFiles(ctx, &agentv1.PutFiles{Path: path, KeepOwners: owners, NoReplaceKind: true}, r)
	})
}

// withAgent calls do with the agent of a machine that runs.
func (ms *Machines) withAgent(ctx context.Context, name string, do func(*host.Client) error) error {
	e, err := ms.find(name)
	if err != nil {
		return err
	}
	e.mu.Lock()
	r, m := e.run, e.m
	e.mu.Unlock()
	if r == nil || m.State != Running {
		return notRunning(m)
	}
	agent, err := r.await(ctx)
	if err == nil {
		err = do(agent)
	}
	if err != nil {
		return fmt.Errorf("machine %q: %w", m.Spec.Name, err)
	}
	return nil
}
