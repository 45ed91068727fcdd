package base

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// ubiRegistry is where Red Hat publishes its universal base images.
const ubiRegistry = "registry.access.redhat.com"

// ubi is Red Hat's universal base image, taken as it is: its packages are signed, but only dnf inside it reads them.
type ubi struct{}

func (ubi) plan(ctx context.Context, b *Builder, base Base, o Options, progress func(string)) (*plan, error) {
	if len(o.Packages) > 0 || len(o.Keyring) > 0 || o.Snapshot != "" {
		return nil, hint.With(fmt.Errorf("%s is an image of a registry: packages, a keyring or a snapshot cannot be chosen: %w", base.Name, errdefs.ErrInvalidArgument),
			"add packages in a Dockerfile: FROM %s, RUN dnf install -y …", base.Name)
	}
	name := "ubi"
	if base.init {
		name = "ubi-init"
	}
	reference := fmt.Sprintf("%s/ubi%s/%s:latest", strings.TrimSuffix(cmp.Or(o.Mirror, ubiRegistry), "/"), base.release, name)
	if strings.Contains(o.Mirror, "://") {
		return nil, hint.With(fmt.Errorf("mirror %q: UBI comes from a registry, which has no scheme: %w", o.Mirror, errdefs.ErrInvalidArgument), "write it as registry.example.com or registry.example.com/path")
	}
	manifest, err := b.Pull(ctx, reference, progress)
	if err != nil {
		return nil, err
	}
	return &plan{manifest: &manifest}, nil
}
