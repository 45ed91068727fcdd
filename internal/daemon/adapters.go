//go:build linux

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"

	"github.com/atollvm/atoll/internal/agent/embedded"
	"github.com/atollvm/atoll/internal/base"
	"github.com/atollvm/atoll/internal/config"
	"github.com/atollvm/atoll/internal/health"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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
	out := machine.Image{
		Digest: img.Digest, Reference: ref, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, WorkingDir: c.WorkingDir, User: c.User,
		StopSignal: c.StopSignal, ExposedPorts: slices.Sorted(maps.Keys(c.ExposedPorts)), Volumes: slices.Sorted(maps.Keys(c.Volumes)),
		Labels: c.Labels, Shell: c.Shell,
	}
	if h := c.Healthcheck; h != nil {
		out.Health = health.Check{
			Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
		}
	}
	return out, nil
}

func (i *imagesOf) Hold() func() { return i.s.images.Hold() }

func isBase(name string) bool {
	_, err := base.Find(name)
	return err == nil
}

// pullBase brings a base that is an image of its distribution's registry.
func (s *system) pullBase(ctx context.Context, reference string, progress func(line string)) (ocispec.Descriptor, error) {
	said := map[string]bool{}
	img, err := s.images.Pull(ctx, reference, image.PullOptions{Progress: func(t image.Transfer) {
		if line := t.ID + ": " + t.Status; !said[line] { // each step of each blob once
			said[line] = true
			progress(line)
		}
	}})
	return img.ManifestDesc, err
}

// disksOf is the root disks and scratch disks as the machine room sees them.
type disksOf struct{ s *system }

func (d *disksOf) Root(ctx context.Context, img digest.Digest) ([]machine.RootDisk, error) {
	root, err := d.s.disks.Get(img)
	if errdefs.IsNotFound(err) {
		root, err = d.Make(ctx, img, nil)
	}
	var disks []machine.RootDisk
	for _, r := range root.Disks {
		disks = append(disks, machine.RootDisk{
			Path: r.Path, HasRoot: r.HasRoot, RootHash: r.Verity.RootHash, Salt: r.Verity.Salt, DataBlocks: r.Verity.DataBlocks,
		})
	}
	return disks, err
}

func (d *disksOf) Verify(ctx context.Context, img digest.Digest) error {
	root, err := d.s.disks.Get(img)
	if err != nil {
		return err
	}
	for _, r := range root.Disks {
		err := r.Verify(ctx)
		if errdefs.IsDataLoss(err) {
			err = hint.With(err, "remove it, and the next start makes it anew from the image's layers: rm %s", r.Path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Get returns root disks that are there.
func (d *disksOf) Get(img digest.Digest) (rootdisk.Root, error) { return d.s.disks.Get(img) }

// Users returns how many images use each root disk, by its key.
func (d *disksOf) Users() (map[string]int, error) { return d.s.disks.Users() }

func (d *disksOf) Scratch(path string, size int64) error { return rootdisk.CreateScratch(path, size) }

// Make makes an image's root disks, unless they are there.
func (d *disksOf) Make(ctx context.Context, img digest.Digest, progress func(done int64)) (rootdisk.Root, error) {
	release := d.s.images.Hold()
	defer release()
	i, err := d.s.images.Resolve(ctx, img.String(), "")
	if err != nil {
		return rootdisk.Root{}, err
	}
	return d.s.disks.Ensure(ctx, img, layersOf(ctx, d.s.images, i), progress)
}

// Flat writes all of an image as one disk, in a file without a name.
func (d *disksOf) Flat(ctx context.Context, img digest.Digest) (*os.File, error) {
	release := d.s.images.Hold()
	defer release()
	i, err := d.s.images.Resolve(ctx, img.String(), "")
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(d.s.tmp, "disk-")
	if err != nil {
		return nil, err
	}
	err = os.Remove(f.Name())
	if err == nil {
		err = rootdisk.WriteFlat(ctx, f, layersOf(ctx, d.s.images, i), nil)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making one disk of image %s: %w", img, err), f.Close())
	}
	return f, nil
}

// kernelsOf is the kernels as the machine room sees them.
type kernelsOf struct{ s *system }

func (k *kernelsOf) Boot(ctx context.Context, name string, features ...string) (vmm.Kernel, string, error) {
	kn, err := k.s.kernels.Get(name)
	for _, f := range features {
		if err == nil {
			err = kn.Require(f)
		}
	}
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
	return vmm.Kernel{Path: kn.Path, Initramfs: initramfs, Args: kn.Args, NeedsACPI: kn.NeedsACPI, ACPI: kn.ACPI, BuiltIn: len(kn.Modules) == 0}, kn.Name, nil
}

func (k *kernelsOf) Modules(name string) machine.KernelModules {
	if m := k.s.kernels.Modules(name); m != nil {
		return m
	}
	return nil
}

func layersOf(ctx context.Context, store *image.Store, i image.Image) []rootdisk.Layer {
	var layers []rootdisk.Layer
	for _, l := range i.Layers {
		layers = append(layers, rootdisk.Layer{Digest: l.Digest, MediaType: l.MediaType, Size: l.Size, Open: func() (io.ReadCloser, error) { return store.Blob(ctx, l) }})
	}
	return layers
}

func registriesOf(set config.Settings) map[string]image.Registry {
	all := map[string]image.Registry{}
	for host, r := range set.Registries {
		all[host] = image.Registry{Mirrors: r.Mirrors, Insecure: r.Insecure, CA: r.CA}
	}
	return all
}
