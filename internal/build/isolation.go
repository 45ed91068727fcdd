//go:build linux

package build

import (
	"context"
	"fmt"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
)

// Where the RUN steps of a build run.
const (
	IsolationHost = "host" // in containers on this host, by runc; the default
	IsolationVM   = "vm"   // in one virtual machine per build
)

// isolate tells the child where the steps are to run.
func (b *Builder) isolate(ctx context.Context, isolation string, opt *client.SolveOpt) error {
	switch isolation {
	case "", IsolationHost:
		return nil
	case IsolationVM:
		if b.o.VM == nil {
			return fmt.Errorf("isolation %q: %w", isolation, errdefs.ErrNotImplemented)
		}
		vm, err := b.o.VM(ctx)
		if err != nil {
			return fmt.Errorf("isolation %q: %w", isolation, err)
		}
		opt.Session = append(opt.Session, vm)
		return nil
	}
	return hint.With(fmt.Errorf("isolation %q: %w", isolation, errdefs.ErrInvalidArgument), "give host or vm")
}
