package provision

import (
	"context"
	"fmt"

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

func checkIgnition([]byte) ([]string, error) {
	return nil, fmt.Errorf("configs of Ignition and Butane are not understood yet: %w", errdefs.ErrNotImplemented)
}

func applyIgnition(_ context.Context, doc []byte, _ *plan.Plan, _ Options) error {
	_, err := checkIgnition(doc)
	return err
}
