package provision

import (
	"context"
	"fmt"

	"github.com/atollvm/atoll/internal/provision/ignition"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/containerd/errdefs"
)

// The doors of the languages that have a room of their own.

func checkCloudConfig([]byte) error {
	return fmt.Errorf("cloud-config is not understood yet: %w", errdefs.ErrNotImplemented)
}

func applyCloudConfig(_ context.Context, doc []byte, _ *plan.Plan) error {
	return checkCloudConfig(doc)
}

func applyIgnition(ctx context.Context, doc []byte, p *plan.Plan, o Options) error {
	return ignition.Apply(ctx, doc, p, ignition.Options{Transport: o.Transport, Spool: o.Spool})
}
