package provision

import (
	"context"

	"github.com/atollvm/atoll/internal/provision/ignition"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/atollvm/atoll/internal/provision/userdata"
)

// The doors of the languages that have a room of their own.

func applyCloudConfig(ctx context.Context, doc []byte, p *plan.Plan, o Options) error {
	return userdata.Apply(ctx, doc, p, userdata.Options{Transport: o.Transport, Alive: o.Alive})
}

func applyIgnition(ctx context.Context, doc []byte, p *plan.Plan, o Options) error {
	return ignition.Apply(ctx, doc, p, ignition.Options{Transport: o.Transport, Spool: o.Spool, Alive: o.Alive})
}
