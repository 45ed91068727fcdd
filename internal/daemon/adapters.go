//go:build linux

package daemon

import (
	"context"
	"fmt"
	"io"
	"runtime"

	"github.com/atollvm/atoll/internal/agent/embedded"
	"github.com/atollvm/atoll/internal/base"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// imagesOf is the image store as the machine room sees it.
type imagesOf struct{ s *system }

func (i *imagesOf) Find(ctx context.Context, ref, platform string) (machine.Image, error) {
	img, err := i.s.images.Resolve(ctx, ref, platform)
	if _, absent := i.s.images.Resolve(ctx, ref, ""); errdefs.IsNotFound(err) && absent != nil && isBase(ref) {
		return machine.Image{}, hint.With(err, "make it from the distribution's packages: atoll base build %s", ref)
	}
	if err != nil {
		return machine.Image{}, err
	}
	if p := img.Platform; p.OS != "linux" || p.Architecture != runtime.GOARCH {
		err := fmt.Errorf("image %s is for %s/%s, this host runs linux/%s: %w", ref, p.OS, p.Architecture, runtime.GOARCH, errdefs.ErrInvalidArgument)
		return machine.Image{}, hint.With(err, "use an image for linux/%s", runtime.GOARCH)
	}
	c := img.Config.Config
	return machine.Image{
		Digest: img.Digest, Reference: ref, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, WorkingDir: c.WorkingDir, User: c.User,
		StopSignal: c.StopSignal,
	}, nil
}

func (i *imagesOf) Hold() func() { return i.s.images.Hold() }

func isBase(name string) bool {
	_, err := base.Find(name)
	return err == nil
}

// disksOf is the root disks and scratch disks as the machine room sees them.
type disksOf struct{ s *system }

func (d *disksOf) Root(ctx context.Context, img digest.Digest) (string, error) {
	disk, err := d.s.disks.Get(img)
	if errdefs.IsNotFound(err) {
		disk, err = d.Make(ctx, img, nil)
	}
	return disk.Path, err
}

// Get returns a root disk that is there.
func (d *disksOf) Get(img digest.Digest) (rootdisk.Disk, error) { return d.s.disks.Get(img) }

func (d *disksOf) Scratch(path string, size int64) error { return rootdisk.CreateScratch(path, size) }

// Make makes an image's root disk, unless it is there.
func (d *disksOf) Make(ctx context.Context, img digest.Digest, progress func(done int64)) (rootdisk.Disk, error) {
	release := d.s.images.Hold()
	defer release()
	i, err := d.s.images.Resolve(ctx, img.String(), "")
	if err != nil {
		return rootdisk.Disk{}, err
	}
	return d.s.disks.Ensure(ctx, img, layersOf(ctx, d.s.images, i), progress)
}

// kernelsOf is the kernels as the machine room sees them.
type kernelsOf struct{ s *system }

func (k *kernelsOf) Boot(ctx context.Context, name string) (vmm.Kernel, string, error) {
	kn, err := k.s.kernels.Get(name)
	if err != nil {
		return vmm.Kernel{}, "", err
	}
	agent, id, err := embedded.Binary(kn.Arch)
	if err != nil {
		return vmm.Kernel{}, "", err
	}
	initramfs, err := k.s.kernels.Initramfs(ctx, kn, kernel.Agent{ID: id, Binary: agent})
	if err != nil {
		return vmm.Kernel{}, "", err
	}
	return vmm.Kernel{Path: kn.Path, Initramfs: initramfs, Args: kn.Args, NeedsACPI: kn.NeedsACPI}, kn.Name, nil
}

func layersOf(ctx context.Context, store *image.Store, i image.Image) []rootdisk.Layer {
	var layers []rootdisk.Layer
	for _, l := range i.Layers {
		layers = append(layers, rootdisk.Layer{Digest: l.Digest, MediaType: l.MediaType, Open: func() (io.ReadCloser, error) { return store.Blob(ctx, l) }})
	}
	return layers
}

func buildRegistries(settings map[string]config.Registry) map[string]build.Registry {
	all := map[string]build.Registry{}
	for host, r := range settings {
		all[host] = build.Registry{Mirrors: r.Mirrors, Insecure: r.Insecure, CA: r.CA}
	}
	return all
}
