package kernel

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
	images "github.com/atollvm/atoll/internal/image"
)

// A kernel in a registry is an artifact of this type: its config is a Kernel, and each of its files is a blob with its name in the
// annotation org.opencontainers.image.title.
const (
	ArtifactType = "application/vnd.atoll.kernel.v1"
	artifactMeta = "application/vnd.atoll.kernel.config.v1+json"
	artifactFile = "application/vnd.atoll.kernel.file.v1"
)

// Push brings a kernel to a registry, under a reference, and returns its digest there.
func (s *Store) Push(ctx context.Context, to *images.Store, name, reference string, progress func(Transfer)) (digest.Digest, error) {
	k, err := s.Get(name)
	if err != nil {
		return "", fmt.Errorf("pushing kernel: %w", err)
	}
	defer to.Hold()()
	var desc ocispec.Descriptor
	a, err := s.artifact(ctx, to, k)
	if err == nil {
		desc, err = to.PutArtifact(ctx, a)
	}
	if err == nil {
		err = to.PushArtifact(ctx, reference, desc, transfersOf(progress))
	}
	if err != nil {
		return "", fmt.Errorf("pushing kernel %q: %w", k.Name, err)
	}
	return desc.Digest, nil
}

// Attach makes a kernel an artifact that refers to an image, to travel with it.
func (s *Store) Attach(ctx context.Context, to *images.Store, name string, img digest.Digest) error {
	k, err := s.Get(name)
	if err != nil {
		return fmt.Errorf("attaching a kernel to image %s: %w", img, err)
	}
	defer to.Hold()()
	a, err := s.artifact(ctx, to, k)
	if err == nil {
		_, err = to.Attach(ctx, img, a)
	}
	if err != nil {
		return fmt.Errorf("attaching kernel %q to image %s: %w", k.Name, img, err)
	}
	return nil
}

// artifact puts a kernel's files into the image store.
func (s *Store) artifact(ctx context.Context, to *images.Store, k Kernel) (images.Artifact, error) {
	a := images.Artifact{Type: ArtifactType, ConfigType: artifactMeta, Annotations: map[string]string{
		ocispec.AnnotationTitle: k.Name, ocispec.AnnotationVersion: k.Version, "org.atoll.kernel.architecture": k.Arch,
	}}
	meta := k
	// What this host has built, and where its user keeps files, is nobody's business.
	meta.BuildKey = ""
	if kind, _, _ := strings.Cut(meta.Source, " "); kind == "file" || kind == "directory" {
		meta.Source = kind
	}
	var err error
	if a.Config, err = json.Marshal(meta); err != nil {
		return a, err
	}
	for _, file := range k.files() {
		blob, err := addFile(ctx, to, filepath.Join(s.opts.Dir, k.Name), file)
		if err != nil {
			return a, err
		}
		a.Blobs = append(a.Blobs, blob)
	}
	return a, nil
}

func addFile(ctx context.Context, to *images.Store, dir, file string) (ocispec.Descriptor, error) {
	f, err := os.Open(filepath.Join(dir, filepath.FromSlash(file)))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer f.Close()
	blob, err := to.AddBlob(ctx, f)
	blob.MediaType, blob.Annotations = artifactFile, map[string]string{ocispec.AnnotationTitle: file}
	return blob, err
}

func transfersOf(progress func(Transfer)) func(images.Transfer) {
	return func(t images.Transfer) { progress(Transfer{ID: t.ID, Status: t.Status, Done: t.Done, Total: t.Total}) }
}

// files are a kernel's files below its own directory, with slashes.
func (k Kernel) files() []string {
	all := []string{imageFile}
	if k.ConfigDigest != "" {
		all = append(all, configFile)
	}
	for _, m := range k.moduleFiles() {
		all = append(all, path.Join(moduleDir, m.path))
	}
	return all
}

// PullFrom brings a kernel from a registry. Every file is verified by its digest. It gets the name it had where it was pushed, unless one
// is given; the same kernel under that name is returned as it is.
func (s *Store) PullFrom(ctx context.Context, from *images.Store, reference, name string, progress func(Transfer)) (Kernel, error) {
	defer from.Hold()()
	desc, err := from.PullArtifact(ctx, reference, []string{ArtifactType}, transfersOf(progress))
	if err != nil {
		return Kernel{}, err
	}
	k, fresh, err := s.install(ctx, from, desc, reference, name, false)
	if err != nil {
		return Kernel{}, fmt.Errorf("pulling kernel %s: %w", reference, err)
	}
	if fresh {
		s.publish("pull", k)
	}
	return k, nil
}

// Adopt takes the kernels that came with an image.
func (s *Store) Adopt(ctx context.Context, from *images.Store, img digest.Digest, reference string) error {
	defer from.Hold()()
	came, err := from.Referrers(ctx, img, ArtifactType)
	if err != nil {
		return err
	}
	for _, desc := range came {
		k, fresh, err := s.install(ctx, from, desc, reference, "", true)
		if err != nil {
			return fmt.Errorf("taking the kernel that came with %s: %w", reference, err)
		}
		if fresh {
			s.publish("pull", k)
		}
	}
	return nil
}

func (s *Store) install(ctx context.Context, from *images.Store, desc ocispec.Descriptor, reference, name string, foreign bool) (k Kernel, fresh bool, err error) {
	a, err := from.ArtifactOf(ctx, desc)
	if err != nil {
		return Kernel{}, false, err
	}
	var meta Kernel
	if err := json.Unmarshal(a.Config, &meta); err != nil {
		return Kernel{}, false, fmt.Errorf("its description: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if name != "" {
		meta.Name = name
	}
	if err := meta.check(); err != nil {
		return Kernel{}, false, err
	}
	release, err := s.lock(ctx)
	if err != nil {
		return Kernel{}, false, err
	}
	defer release()
	if have, err := s.Get(meta.Name); err == nil {
		if have.Digest == meta.Digest && slices.Equal(have.files(), meta.files()) {
			return have, false, nil
		}
		return Kernel{}, false, hint.With(fmt.Errorf("there is another kernel %q: %w", meta.Name, errdefs.ErrAlreadyExists), "give this one another name: --name")
	}
	dir, err := os.MkdirTemp(s.opts.Dir, tempPrefix)
	if err != nil {
		return Kernel{}, false, err
	}
	defer os.RemoveAll(dir)
	img, err := unpack(ctx, from, a.Blobs, meta, dir)
	if err != nil {
		return Kernel{}, false, err
	}
	if got := digest.FromBytes(img.data); got != meta.Digest || img.arch != meta.Arch {
		return Kernel{}, false, fmt.Errorf("its kernel has the digest %s and is for %s, its description says %s and %s: %w", got, img.arch, meta.Digest, meta.Arch, errdefs.ErrDataLoss)
	}
	meta.BuildKey, meta.Foreign = "", foreign
	meta.Source = fmt.Sprintf("%s@%s (%s)", reference, desc.Digest, meta.Source)
	k, err = s.add(dir, img, meta)
	return k, true, err
}

// check looks at a description that a stranger has written: names in it become names of files, and words of a command line.
func (k Kernel) check() error {
	if !nameRE.MatchString(k.Name) {
		return badName(k.Name)
	}
	for feature := range k.Features {
		if !nameRE.MatchString(feature) {
			return fmt.Errorf("feature %q: %w", feature, errdefs.ErrInvalidArgument)
		}
	}
	for _, text := range []string{k.Args, k.Source, k.Version} {
		if len(text) > 1000 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("description %q: %w", text[:min(len(text), 80)], errdefs.ErrInvalidArgument)
		}
	}
	for _, file := range k.files() {
		if !filepath.IsLocal(filepath.FromSlash(file)) || len(file) > 200 {
			return fmt.Errorf("file %q: %w", file, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// unpack writes the files that the description names, all but the kernel itself, which it returns.
func unpack(ctx context.Context, from *images.Store, blobs []ocispec.Descriptor, k Kernel, dir string) (image, error) {
	byName := map[string]ocispec.Descriptor{}
	for _, b := range blobs {
		byName[b.Annotations[ocispec.AnnotationTitle]] = b
	}
	var img image
	for _, file := range k.files() {
		blob, ok := byName[file]
		if !ok {
			return img, fmt.Errorf("file %q is missing: %w", file, errdefs.ErrInvalidArgument)
		}
		if blob.Size > imageMax {
			return img, fmt.Errorf("file %q of %d bytes is too large, more than %d MiB: %w", file, blob.Size, imageMax>>20, errdefs.ErrInvalidArgument)
		}
		r, err := from.Blob(ctx, blob)
		if err != nil {
			return img, err
		}
		data, err := io.ReadAll(io.LimitReader(r, imageMax))
		r.Close()
		if err != nil {
			return img, err
		}
		if file == imageFile {
			if img, err = parseImage(data); err != nil {
				return img, err
			}
			continue
		}
		if file == configFile && digest.FromBytes(data) != k.ConfigDigest {
			return img, fmt.Errorf("its configuration is not the one that its description names: %w", errdefs.ErrDataLoss)
		}
		target := filepath.Join(dir, filepath.FromSlash(file))
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return img, err
		}
		if err := writeSynced(target, data); err != nil {
			return img, err
		}
	}
	return img, nil
}
