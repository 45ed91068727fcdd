package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

const (
	parallelLayers = 3
	attempts       = 4 // of one request or transfer, the first one included
	firstPause     = 250 * time.Millisecond
	progressEvery  = 100 * time.Millisecond
)

// Transfer is the progress of one blob.
type Transfer struct {
	ID     string // its digest
	Status string // waiting, downloading, verifying, done, exists
	Done   int64
	Total  int64
}

// AllPlatforms is the platform that stands for the whole of an index.
const AllPlatforms = "all"

// PullOptions are what a pull may be told.
type PullOptions struct {
	Platform  string         // os/arch[/variant] or AllPlatforms; default: linux on the host's architecture
	Referrers []string       // types of the artifacts to bring along that refer to the image, or AnyArtifact
	Progress  func(Transfer) // called by one goroutine at a time
}

// Pull brings an image from its registry: the manifest of one platform and its blobs, each verified by its digest before it is in the
// store. What an interrupted pull has already is not fetched again. Of an index all is kept that is here.
func (s *Store) Pull(ctx context.Context, reference string, o PullOptions) (Image, error) {
	r, err := ref.Parse(reference)
	if err != nil {
		return Image{}, err
	}
	all := o.Platform == AllPlatforms
	if o.Platform == "" || all {
		o.Platform = "linux/" + runtime.GOARCH
	}
	want, err := parsePlatform(o.Platform)
	if err != nil {
		return Image{}, err
	}
	if r.Digest != "" {
		r.Tag = "" // the digest decides; keeping a tag that nobody looked up would be a lie
	}
	defer s.Hold()()
	p := &puller{store: s, ref: r, want: want, all: all, referrers: o.Referrers, progress: o.Progress}
	img, err := p.pull(quiet(ctx))
	if err != nil {
		return Image{}, fmt.Errorf("pulling %s: %w", r, err)
	}
	return img, nil
}

// puller is one pull.
type puller struct {
	store     *Store
	ref       ref.Ref
	want      ocispec.Platform
	all       bool
	referrers []string
	fetcher   remotes.Fetcher

	mu       sync.Mutex // makes calls of progress one at a time
	progress func(Transfer)
}

func (p *puller) pull(ctx context.Context) (Image, error) {
	started := time.Now()
	source, err := p.resolve(ctx)
	if err != nil {
		return Image{}, err
	}
	rec, img, err := p.image(ctx, source)
	if err != nil {
		return Image{}, err
	}
	if err := p.artifacts(ctx, img.Digest, rec.Source.Digest); err != nil {
		return Image{}, err
	}
	s := p.store
	if err := s.set(p.ref.String(), rec, img); err != nil {
		return Image{}, err
	}
	s.publish("pull", img.Digest, p.ref.String())
	s.log.Debug("image pulled", "reference", p.ref.String(), "digest", img.Digest, "took", time.Since(started))
	return s.image(img.Digest), nil
}

// image brings what the reference stands for: one platform, or all of them.
func (p *puller) image(ctx context.Context, source ocispec.Descriptor) (record, *Image, error) {
	if p.all {
		if err := p.whole(ctx, source, 0, map[digest.Digest]bool{}); err != nil {
			return record{}, nil, err
		}
		return p.store.adopt(ctx, source)
	}
	manifest, err := p.manifest(ctx, &source)
	if err != nil {
		return record{}, nil, err
	}
	img, err := p.config(ctx, manifest)
	if err != nil {
		return record{}, nil, err
	}
	if err := p.layers(ctx, img.Layers); err != nil {
		return record{}, nil, err
	}
	rec := record{Manifest: img.ManifestDesc, Source: source}
	if source.Digest != manifest.Digest {
		have, _ := p.store.complete(ctx, source) // most are not here: that is what one platform means
		rec.Kept = without(have, manifest.Digest)
	}
	return rec, img, nil
}

// whole fetches a manifest or an index and all below it.
func (p *puller) whole(ctx context.Context, desc ocispec.Descriptor, depth int, seen map[digest.Digest]bool) error {
	if depth > maxNesting {
		return errTooDeep
	}
	if seen[desc.Digest] {
		return nil
	}
	seen[desc.Digest] = true
	if len(seen) > maxEntries {
		return fmt.Errorf("more than %d manifests: %w", maxEntries, errdefs.ErrInvalidArgument)
	}
	if !isDocument(desc) {
		desc.MediaType = ocispec.MediaTypeImageManifest
	}
	doc, err := p.document(ctx, desc)
	if err != nil {
		return fmt.Errorf("fetching manifest %s: %w", desc.Digest, err)
	}
	if doc.Config != nil {
		return p.layers(ctx, append([]ocispec.Descriptor{*doc.Config}, doc.Layers...))
	}
	for _, d := range doc.Manifests {
		if err := p.whole(ctx, d, depth+1, seen); err != nil {
			return err
		}
	}
	return nil
}

// artifacts brings what refers to the subjects.
func (p *puller) artifacts(ctx context.Context, subjects ...digest.Digest) error {
	if len(p.referrers) == 0 {
		return nil
	}
	lister, ok := p.fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return fmt.Errorf("listing referrers: %w", errdefs.ErrNotImplemented)
	}
	slices.Sort(subjects)
	for _, subject := range slices.Compact(subjects) {
		var found []ocispec.Descriptor
		err := retry(ctx, func() (err error) {
			found, err = lister.FetchReferrers(ctx, subject)
			return err
		})
		if err != nil {
			return fmt.Errorf("listing what refers to %s: %w", subject, p.store.explain(ctx, err, p.ref))
		}
		if len(found) > maxEntries {
			return fmt.Errorf("%d artifacts refer to %s, more than %d: %w", len(found), subject, maxEntries, errdefs.ErrInvalidArgument)
		}
		for _, desc := range found {
			if !wanted(p.referrers, desc.ArtifactType) {
				continue
			}
			if err := p.artifact(ctx, subject, desc); err != nil {
				return fmt.Errorf("fetching artifact %s: %w", desc.Digest, err)
			}
		}
	}
	return nil
}

func (p *puller) artifact(ctx context.Context, subject digest.Digest, desc ocispec.Descriptor) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	doc, err := p.document(ctx, desc)
	if err != nil {
		return err
	}
	if doc.Config == nil || doc.Subject == nil || doc.Subject.Digest != subject {
		return fmt.Errorf("it does not refer to %s: %w", subject, errdefs.ErrInvalidArgument)
	}
	if err := p.layers(ctx, append([]ocispec.Descriptor{*doc.Config}, doc.Layers...)); err != nil {
		return err
	}
	return p.store.keepArtifact(ctx, desc)
}

// PullArtifact brings an artifact of one of the types from a registry, and returns its manifest. It has no name here: it stays as long as the
// caller's Hold.
func (s *Store) PullArtifact(ctx context.Context, reference string, types []string, progress func(Transfer)) (ocispec.Descriptor, error) {
	r, err := ref.Parse(reference)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if r.Digest != "" {
		r.Tag = ""
	}
	defer s.Hold()()
	p := &puller{store: s, ref: r, progress: progress}
	desc, err := p.alone(quiet(ctx), types)
	if err != nil {
		return desc, fmt.Errorf("pulling %s: %w", r, err)
	}
	return desc, s.sweep(ctx) // it goes when nobody holds it any more
}

func (p *puller) alone(ctx context.Context, types []string) (ocispec.Descriptor, error) {
	desc, err := p.resolve(ctx)
	if err != nil {
		return desc, err
	}
	if !isDocument(desc) {
		desc.MediaType = ocispec.MediaTypeImageManifest
	}
	doc, err := p.document(ctx, desc)
	if err != nil {
		return desc, fmt.Errorf("fetching manifest %s: %w", desc.Digest, err)
	}
	if doc.Config == nil || !wanted(types, artifactType(doc)) {
		return desc, hint.With(fmt.Errorf("it is of type %q, not %s: %w", cmp.Or(artifactType(doc), "index"), strings.Join(types, " or "), errdefs.ErrInvalidArgument),
			"check name and tag of %s", p.ref.Familiar())
	}
	desc.MediaType, desc.ArtifactType = manifestType(doc, desc), artifactType(doc)
	return desc, p.layers(ctx, append([]ocispec.Descriptor{*doc.Config}, doc.Layers...))
}

// resolve asks the registry what the reference stands for now.
func (p *puller) resolve(ctx context.Context) (ocispec.Descriptor, error) {
	var desc ocispec.Descriptor
	resolver := p.store.resolver(nil)
	err := retry(ctx, func() (err error) {
		_, desc, err = resolver.Resolve(ctx, p.ref.String())
		return err
	})
	if err != nil {
		return desc, p.store.explain(ctx, err, p.ref)
	}
	if strings.HasPrefix(desc.MediaType, "application/vnd.docker.distribution.manifest.v1+") {
		return desc, errSchema1
	}
	p.fetcher, err = resolver.Fetcher(ctx, p.ref.String())
	return desc, err
}

// manifest walks from what the reference stands for to the manifest of the wanted platform. It sets the source's real media type.
func (p *puller) manifest(ctx context.Context, source *ocispec.Descriptor) (ocispec.Descriptor, error) {
	desc := *source
	for range maxNesting {
		if !images.IsManifestType(desc.MediaType) && !images.IsIndexType(desc.MediaType) {
			desc.MediaType = ocispec.MediaTypeImageManifest // some registries say octet-stream; the manifests endpoint is meant
		}
		doc, err := p.document(ctx, desc)
		if err != nil {
			return desc, fmt.Errorf("fetching manifest %s: %w", desc.Digest, err)
		}
		desc.MediaType = manifestType(doc, desc)
		if desc.Digest == source.Digest {
			source.MediaType = desc.MediaType
		}
		if doc.Config != nil {
			return desc, checkImage(doc)
		}
		if desc, err = p.choose(doc.Manifests); err != nil {
			return desc, err
		}
	}
	return desc, errTooDeep
}

func (p *puller) document(ctx context.Context, desc ocispec.Descriptor) (document, error) {
	if err := p.small(ctx, desc, maxManifest); err != nil {
		return document{}, err
	}
	return p.store.document(ctx, desc)
}

// small fetches a blob that will be read into memory.
func (p *puller) small(ctx context.Context, desc ocispec.Descriptor, limit int64) error {
	if desc.Size > limit {
		return tooLarge(desc, limit)
	}
	return p.blob(ctx, desc)
}

// choose picks the wanted platform's entry of an index. One without a platform is taken when no other fits: its config will tell.
func (p *puller) choose(entries []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var have []string
	unknown := -1
	for i, e := range entries {
		switch {
		case e.Platform == nil:
			unknown = i
		case matches(p.want, *e.Platform):
			return e, nil
		case e.Platform.OS != "unknown": // what BuildKit says of attestations
			have = append(have, platforms.Format(*e.Platform))
		}
	}
	if unknown >= 0 {
		return entries[unknown], nil
	}
	return ocispec.Descriptor{}, p.wrongPlatform(have)
}

func (p *puller) wrongPlatform(have []string) error {
	err := fmt.Errorf("no manifest for %s: %w", platforms.Format(p.want), errdefs.ErrNotFound)
	if len(have) == 0 {
		return err
	}
	slices.Sort(have)
	return hint.With(fmt.Errorf("no manifest for %s, there are %s: %w", platforms.Format(p.want), strings.Join(slices.Compact(have), ", "), errdefs.ErrNotFound),
		"atoll pull --platform %s %s", have[0], p.ref.Familiar())
}

// config fetches the image's config, which has the last word on its platform.
func (p *puller) config(ctx context.Context, manifest ocispec.Descriptor) (*Image, error) {
	doc, err := p.store.document(ctx, manifest)
	if err != nil {
		return nil, err
	}
	if err := p.small(ctx, *doc.Config, maxConfig); err != nil {
		return nil, fmt.Errorf("fetching config %s: %w", doc.Config.Digest, err)
	}
	img, err := p.store.decode(ctx, manifest)
	if err != nil {
		return nil, err
	}
	if !matches(p.want, img.Platform) {
		return nil, p.wrongPlatform([]string{platforms.Format(img.Platform)})
	}
	return img, nil
}

func (p *puller) layers(ctx context.Context, layers []ocispec.Descriptor) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelLayers)
	seen := map[digest.Digest]bool{}
	var todo []ocispec.Descriptor
	for _, l := range layers {
		if !seen[l.Digest] {
			seen[l.Digest] = true
			todo = append(todo, l)
			p.report(l, "waiting", 0)
		}
	}
	for _, l := range todo {
		g.Go(func() error {
			if err := p.blob(ctx, l); err != nil {
				return fmt.Errorf("fetching layer %s: %w", l.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (p *puller) report(desc ocispec.Descriptor, status string, done int64) {
	if p.progress == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.progress(Transfer{ID: desc.Digest.String(), Status: status, Done: done, Total: desc.Size})
}

// blob brings one blob into the store.
func (p *puller) blob(ctx context.Context, desc ocispec.Descriptor) error {
	desc.URLs, desc.Data = nil, nil // bytes come from the registry that was named, from nowhere else
	if info, err := p.store.content.Info(ctx, desc.Digest); err == nil {
		if info.Size != desc.Size {
			return fmt.Errorf("blob %s has %d bytes, its descriptor says %d: %w", desc.Digest, info.Size, desc.Size, errdefs.ErrDataLoss)
		}
		p.report(desc, "exists", desc.Size)
		return nil
	}
	if err := retry(ctx, func() error { return p.transfer(ctx, desc) }); err != nil {
		return p.store.explain(ctx, err, p.ref)
	}
	p.report(desc, "done", desc.Size)
	return nil
}

// errRestart means that the kept part of an interrupted transfer was bad, or that the registry cannot go on from there.
var errRestart = errors.New("the transfer cannot go on where it was interrupted")

// transfer fetches one blob, going on where an interrupted transfer has ended. Another pull that fetches the same blob is waited for.
func (p *puller) transfer(ctx context.Context, desc ocispec.Descriptor) error {
	store, key := p.store.content, "blob-"+desc.Digest.String()
	w, err := content.OpenWriter(ctx, store, content.WithRef(key), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return p.store.full(err)
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return err
	}
	if st.Offset == 0 {
		// Where an ingest cannot be resumed the library begins it anew but leaves the old bytes behind the new ones.
		if err := w.Truncate(0); err != nil {
			return err
		}
	}
	body, err := p.fetcher.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer body.Close()
	err = content.Copy(ctx, w, &meter{ReadCloser: body, p: p, desc: desc}, desc.Size, desc.Digest)
	noRange := statusOf(err) == http.StatusRequestedRangeNotSatisfiable
	switch {
	case st.Offset > 0 && (errdefs.IsFailedPrecondition(err) || noRange):
		_ = w.Close()
		return errors.Join(errRestart, store.Abort(ctx, key))
	case errdefs.IsFailedPrecondition(err): // size or digest is wrong
		if err := store.Abort(ctx, key); err != nil {
			return err
		}
		return hint.With(fmt.Errorf("the registry sent other bytes than the digest says: %w: %w", err, errdefs.ErrDataLoss),
			"pull again; if it stays so, a proxy or the registry changes the data")
	case errors.Is(err, syscall.ENOSPC):
		_ = w.Close()
		err = p.store.full(err)
		_ = store.Abort(context.WithoutCancel(ctx), key) // a full disk needs the space more than the next pull needs a head start
	}
	return err
}

// full says where the disk is full, when that is what err means.
func (s *Store) full(err error) error {
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	free := "free space unknown"
	if n, ok := s.free(); ok {
		free = fmt.Sprintf("%d KiB free", n>>10)
	}
	return hint.With(fmt.Errorf("writing to %s (%s): %w: %w", s.dir, free, syscall.ENOSPC, errdefs.ErrResourceExhausted),
		"free some space there, such as with atoll image prune, and try again")
}

func (s *Store) free() (int64, bool) {
	var st unix.Statfs_t
	err := unix.Statfs(s.dir, &st)
	return int64(st.Bavail) * st.Bsize, err == nil
}

// room says beforehand that so many bytes would fill the disk.
func (s *Store) room(size int64) error {
	if n, ok := s.free(); !ok || size <= n {
		return nil
	}
	return s.full(fmt.Errorf("%d bytes: %w", size, syscall.ENOSPC))
}

// meter reads a blob's body, reports how far it is, and ends what is longer than it should be.
type meter struct {
	io.ReadCloser
	p      *puller
	desc   ocispec.Descriptor
	done   int64
	latest time.Time
}

func (m *meter) Read(b []byte) (int, error) {
	if m.done > m.desc.Size {
		return 0, io.EOF // one byte too many is enough to fail the commit
	}
	n, err := m.ReadCloser.Read(b[:min(int64(len(b)), m.desc.Size-m.done+1)])
	m.done += int64(n)
	if m.done >= m.desc.Size {
		m.p.report(m.desc, "verifying", m.desc.Size)
	} else if now := time.Now(); now.Sub(m.latest) >= progressEvery {
		m.latest = now
		m.p.report(m.desc, "downloading", m.done)
	}
	return n, err
}

// Seek is how content.Copy goes on in the middle: the fetcher's body then asks for a range.
func (m *meter) Seek(offset int64, whence int) (int64, error) {
	n, err := m.ReadCloser.(io.Seeker).Seek(offset, whence)
	m.done = n
	return n, err
}

// retry calls f again after failures that may pass, with growing pauses.
func retry(ctx context.Context, f func() error) error {
	pause := firstPause
	for i := 1; ; i++ {
		err := f()
		if err == nil || i == attempts || ctx.Err() != nil || !passing(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
			pause *= 2
		}
	}
}

// passing says whether a failure may not be there the next time.
func passing(err error) bool {
	switch code := statusOf(err); {
	case code == http.StatusTooManyRequests, code >= 500:
		return true
	case code == http.StatusRequestedRangeNotSatisfiable: // asked for by the library after a cut; transfer then begins anew
		return true
	case code != 0:
		return false
	}
	var cut *net.OpError
	if errors.As(err, &cut) && slices.Contains([]string{"read", "write", "set"}, cut.Op) {
		return true // reset, or closed below us while a blob went up
	}
	return errors.Is(err, errRestart) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || timedOut(err) ||
		errors.Is(err, fs.ErrNotExist) // another pull of this blob failed and has just cleaned up
}
