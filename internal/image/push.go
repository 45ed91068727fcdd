package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

// PushOptions are what a push may be told.
type PushOptions struct {
	Platform  string         // os/arch[/variant] of the one image of an index to push; default: the whole index where all of it is here
	Referrers []string       // types of the artifacts to take along that refer to the image, or AnyArtifact
	Progress  func(Transfer) // called by one goroutine at a time; Status is waiting, uploading, done, exists or mounted
}

// Pushed is what a registry has now.
type Pushed struct {
	Digest  digest.Digest // under the reference
	Partial []string      // platforms of the image's index that are not here, and so were not pushed: Digest is one image's then
}

// Push brings an image to the registry of its reference. What the registry has already is not sent again; an interrupted push goes
// on with the blobs that are missing.
func (s *Store) Push(ctx context.Context, reference string, o PushOptions) (Pushed, error) {
	r, err := ref.Parse(reference)
	if err == nil && r.Digest != "" {
		err = hint.With(fmt.Errorf("image reference %q: a push needs a tag: %w", reference, errdefs.ErrInvalidArgument), "write name:tag")
	}
	if err != nil {
		return Pushed{}, err
	}
	defer s.Hold()()
	s.mu.RLock()
	rec, ok := s.refs[r.String()]
	s.mu.RUnlock()
	if !ok {
		return Pushed{}, s.nothingToPush(reference, r)
	}
	root, partial, err := s.toPush(ctx, rec, o.Platform)
	if err != nil {
		return Pushed{}, fmt.Errorf("pushing %s: %w", r, err)
	}
	subjects := []digest.Digest{root.Digest, rec.Manifest.Digest}
	if err := s.send(quiet(ctx), r, root, subjects, o); err != nil {
		return Pushed{}, fmt.Errorf("pushing %s: %w", r, err)
	}
	s.publish("push", rec.Manifest.Digest, r.String())
	return Pushed{Digest: root.Digest, Partial: partial}, nil
}

// PushArtifact brings an artifact, under a reference, to its registry.
func (s *Store) PushArtifact(ctx context.Context, reference string, desc ocispec.Descriptor, progress func(Transfer)) error {
	r, err := parseTag(reference)
	if err != nil {
		return err
	}
	defer s.Hold()()
	if err := s.send(quiet(ctx), r, desc, nil, PushOptions{Progress: progress}); err != nil {
		return fmt.Errorf("pushing %s: %w", r, err)
	}
	return s.sweep(ctx) // it goes when nobody holds it any more
}

// nothingToPush says why there is no such reference, and what the person may have meant.
func (s *Store) nothingToPush(name string, r ref.Ref) error {
	err := fmt.Errorf("pushing %q: there is no image of that name here: %w", name, errdefs.ErrNotFound)
	if img, findErr := s.find(name); findErr == nil { // an ID
		return hint.With(err, "give the image a name that says where it goes: atoll tag %s registry.example.com/team/app:1.0", img.Digest.Encoded()[:12])
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	var tags []string
	for key := range s.refs {
		if nameOf(key) == r.Name && !isUntagged(key) && !strings.Contains(key, "@") {
			tags = append(tags, strings.TrimPrefix(key, r.Name+":"))
		}
	}
	if len(tags) > 0 {
		slices.Sort(tags)
		return hint.With(err, "it has the tags %s", strings.Join(tags, ", "))
	}
	return hint.With(err, "atoll image ls shows the images there are; atoll tag IMAGE %s gives one this name", r.Familiar())
}

// toPush chooses what a reference stands for in the registry: the whole index, else one image.
func (s *Store) toPush(ctx context.Context, rec record, platform string) (root ocispec.Descriptor, partial []string, err error) {
	if platform != "" && platform != AllPlatforms {
		desc, err := s.ofPlatform(rec, platform)
		return desc, nil, err
	}
	_, missing := s.tree(ctx, rec.Source)
	if missing == nil {
		return rec.Source, nil, nil
	}
	if !errdefs.IsNotFound(missing) {
		return root, nil, missing
	}
	_, all := s.variantsOf(ctx, rec)
	for _, v := range all {
		if !v.Here {
			partial = append(partial, platforms.Format(v.Platform))
		}
	}
	if platform == AllPlatforms {
		return root, nil, hint.With(fmt.Errorf("of its index %s is not here: %w", strings.Join(partial, ", "), errdefs.ErrFailedPrecondition),
			"fetch all of it first: atoll pull --platform all")
	}
	return rec.Manifest, partial, nil
}

func (s *Store) ofPlatform(rec record, platform string) (ocispec.Descriptor, error) {
	want, err := parsePlatform(platform)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	s.mu.RLock()
	main := s.images[rec.Manifest.Digest].Platform
	s.mu.RUnlock()
	if matches(want, main) {
		return rec.Manifest, nil
	}
	for _, d := range rec.Kept {
		if d.Platform != nil && images.IsManifestType(d.MediaType) && matches(want, *d.Platform) {
			return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, nil
		}
	}
	return ocispec.Descriptor{}, hint.With(fmt.Errorf("no image for %s is here: %w", platforms.Format(want), errdefs.ErrNotFound), "fetch it first: atoll pull --platform %s", platforms.Format(want))
}

// send pushes what is below root, then root by its tag, then what refers to the subjects.
func (s *Store) send(ctx context.Context, r ref.Ref, root ocispec.Descriptor, subjects []digest.Digest, o PushOptions) error {
	t, err := s.tree(ctx, root)
	if err != nil {
		return err
	}
	if n := len(t.manifests); n > 0 {
		root = t.manifests[n-1] // with its real media type
	}
	p := &pusher{store: s, ref: r, tracker: docker.NewInMemoryTracker(), progress: o.Progress}
	p.resolver = s.resolver(p.tracker)
	if err := p.tree(ctx, t, root); err != nil {
		return err
	}
	if len(o.Referrers) == 0 {
		return nil
	}
	slices.Sort(subjects)
	for _, subject := range slices.Compact(subjects) {
		if err := p.artifacts(ctx, subject, o.Referrers, 0); err != nil {
			return err
		}
	}
	return nil
}

// pusher is one push.
type pusher struct {
	store    *Store
	ref      ref.Ref
	resolver remotes.Resolver
	tracker  docker.StatusTracker

	mu       sync.Mutex // makes calls of progress one at a time
	progress func(Transfer)
}

func (p *pusher) tree(ctx context.Context, t tree, root ocispec.Descriptor) error {
	sources := p.mountable()
	g, groupCtx := errgroup.WithContext(ctx)
	g.SetLimit(parallelLayers)
	for _, b := range t.blobs {
		p.report(b, "waiting", 0)
	}
	for _, b := range t.blobs {
		g.Go(func() error {
			b.Annotations = sources(b.Digest)
			if err := p.push(groupCtx, b, p.ref.Name+"@"+b.Digest.String()); err != nil {
				return fmt.Errorf("sending blob %s: %w", b.Digest, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, m := range t.manifests {
		name := p.ref.Name + "@" + m.Digest.String()
		if m.Digest == root.Digest && p.ref.Tag != "" {
			name = p.ref.Name + ":" + p.ref.Tag + "@" + m.Digest.String()
		}
		if err := p.push(ctx, m, name); err != nil {
			return fmt.Errorf("sending manifest %s: %w", m.Digest, err)
		}
	}
	return nil
}

// artifacts pushes what refers to a subject, by digest, and what refers to that.
func (p *pusher) artifacts(ctx context.Context, subject digest.Digest, types []string, depth int) error {
	if depth > maxNesting {
		return nil
	}
	found, err := p.store.Referrers(ctx, subject, AnyArtifact)
	if err != nil {
		return err
	}
	untagged := &pusher{store: p.store, ref: ref.Ref{Name: p.ref.Name}, resolver: p.resolver, tracker: p.tracker, progress: p.progress}
	for _, desc := range found {
		if !wanted(types, desc.ArtifactType) {
			continue
		}
		t, err := p.store.tree(ctx, desc)
		if err == nil {
			err = untagged.tree(ctx, t, desc)
		}
		if err == nil {
			err = p.list(ctx, subject, desc)
		}
		if err == nil {
			err = p.artifacts(ctx, desc.Digest, types, depth+1)
		}
		if err != nil {
			return fmt.Errorf("artifact %s: %w", desc.Digest, err)
		}
	}
	return nil
}

// list sees to it that the registry lists an artifact with its subject. A registry without the referrers API has an index for that,
// under a tag made of the subject's digest, which the clients keep (the distribution specification, "Referrers Tag Schema").
func (p *pusher) list(ctx context.Context, subject digest.Digest, desc ocispec.Descriptor) error {
	fetcher, err := p.resolver.Fetcher(ctx, p.ref.Name+"@"+subject.String())
	if err != nil {
		return err
	}
	lister, ok := fetcher.(remotes.ReferrersFetcher)
	if !ok {
		return fmt.Errorf("listing referrers: %w", errdefs.ErrNotImplemented)
	}
	listed, err := lister.FetchReferrers(ctx, subject)
	if err != nil {
		return p.explain(ctx, err)
	}
	if slices.ContainsFunc(listed, func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest }) {
		return nil
	}
	index, data, err := marshalIndex(append(listed, desc), nil)
	if err != nil {
		return err
	}
	tag := strings.Replace(subject.String(), ":", "-", 1)
	return p.upload(ctx, index, p.ref.Name+":"+tag+"@"+index.Digest.String(), bytes.NewReader(data))
}

func marshalIndex(manifests []ocispec.Descriptor, annotations map[string]string) (ocispec.Descriptor, []byte, error) {
	data, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests, Annotations: annotations,
	})
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(data), Size: int64(len(data))}, data, err
}

// mountable returns what tells the library which other repositories of the same registry have a blob, as far as we know: it need not
// be sent then.
func (p *pusher) mountable() func(digest.Digest) map[string]string {
	const label = "containerd.io/distribution.source." // and the host, without its port
	repositories := map[digest.Digest][]string{}
	host := p.ref.Host()
	s := p.store
	s.mu.RLock()
	for key, rec := range s.refs {
		repository, ok := strings.CutPrefix(nameOf(key), host+"/")
		if !ok || isUntagged(key) || nameOf(key) == p.ref.Name {
			continue
		}
		img := s.images[rec.Manifest.Digest]
		for _, d := range append([]ocispec.Descriptor{img.ConfigDesc}, img.Layers...) {
			if !slices.Contains(repositories[d.Digest], repository) {
				repositories[d.Digest] = append(repositories[d.Digest], repository)
			}
		}
	}
	s.mu.RUnlock()
	u, err := url.Parse("registry://" + host)
	if err != nil {
		return func(digest.Digest) map[string]string { return nil }
	}
	return func(d digest.Digest) map[string]string {
		if len(repositories[d]) == 0 {
			return nil
		}
		return map[string]string{label + u.Hostname(): strings.Join(repositories[d], ",")}
	}
}

// push sends one blob or manifest of the store.
func (p *pusher) push(ctx context.Context, desc ocispec.Descriptor, name string) error {
	ra, err := p.store.content.ReaderAt(ctx, ocispec.Descriptor{Digest: desc.Digest, Size: desc.Size})
	if err != nil {
		return err
	}
	defer ra.Close()
	return p.upload(ctx, desc, name, io.NewSectionReader(ra, 0, desc.Size))
}

func (p *pusher) upload(ctx context.Context, desc ocispec.Descriptor, name string, body io.ReadSeeker) error {
	desc.URLs, desc.Data = nil, nil
	err := retry(ctx, func() error { return p.transfer(ctx, desc, name, body) })
	if err != nil && desc.Annotations != nil && ctx.Err() == nil {
		desc.Annotations = nil // the other repository may be somebody else's
		err = retry(ctx, func() error { return p.transfer(ctx, desc, name, body) })
	}
	return p.explain(ctx, err)
}

func (p *pusher) transfer(ctx context.Context, desc ocispec.Descriptor, name string, body io.ReadSeeker) error {
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return err
	}
	to, err := p.resolver.Pusher(ctx, name)
	if err != nil {
		return err
	}
	w, err := to.Push(ctx, desc)
	if errdefs.IsAlreadyExists(err) {
		p.report(desc, p.existing(ctx, desc), desc.Size)
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	// The library begins anew after a cut connection, and then seeks to the start.
	err = content.Copy(ctx, w, &upMeter{ReadSeeker: body, p: p, desc: desc}, desc.Size, desc.Digest)
	if errors.Is(err, io.ErrClosedPipe) {
		err = fmt.Errorf("the connection was cut: %w", io.ErrUnexpectedEOF)
	}
	if err == nil {
		p.report(desc, "done", desc.Size)
	}
	return err
}

// existing tells a blob that the registry had from one that it took from another of its repositories.
func (p *pusher) existing(ctx context.Context, desc ocispec.Descriptor) string {
	st, err := p.tracker.GetStatus(remotes.MakeRefKey(ctx, desc))
	if err == nil && st.PushStatus.MountedFrom != "" {
		return "mounted"
	}
	return "exists"
}

func (p *pusher) report(desc ocispec.Descriptor, status string, done int64) {
	if p.progress == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.progress(Transfer{ID: desc.Digest.String(), Status: status, Done: done, Total: desc.Size})
}

// explain says what a failure means for a push, where that is not what it means for a pull.
func (p *pusher) explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	host, code := p.ref.Host(), statusOf(err)
	switch tidied := tidy(err); {
	case ctx.Err() != nil:
	case code == http.StatusRequestEntityTooLarge:
		return hint.With(fmt.Errorf("registry %s: too large: %w: %w", host, tidied, errdefs.ErrInvalidArgument), "a proxy before the registry limits the size of requests: tell who runs it")
	case code == http.StatusNotFound, code == http.StatusMethodNotAllowed:
		return hint.With(fmt.Errorf("registry %s takes no images at %s: %w: %w", host, p.ref.Name, tidied, errdefs.ErrFailedPrecondition), "create the repository there, or check the name")
	case errors.Is(err, docker.ErrInvalidAuthorization), code == http.StatusUnauthorized:
		return hint.With(fmt.Errorf("registry %s: pushing needs other credentials: %w: %w", host, tidied, errdefs.ErrUnauthenticated), "log in: atoll login %s", host)
	case code == http.StatusForbidden, code == http.StatusTooManyRequests:
	case code >= 400 && code < 500:
		return hint.With(fmt.Errorf("registry %s refuses it: %w: %w", host, tidied, errdefs.ErrInvalidArgument), "its message says why; tell who runs it")
	}
	return p.store.explain(ctx, err, p.ref)
}

// upMeter reads what is sent and reports how far it is.
type upMeter struct {
	io.ReadSeeker
	p      *pusher
	desc   ocispec.Descriptor
	done   int64
	latest time.Time
}

func (m *upMeter) Read(b []byte) (int, error) {
	n, err := m.ReadSeeker.Read(b)
	m.done += int64(n)
	if now := time.Now(); now.Sub(m.latest) >= progressEvery {
		m.latest = now
		m.p.report(m.desc, "uploading", m.done)
	}
	return n, err
}

func (m *upMeter) Seek(offset int64, whence int) (int64, error) {
	n, err := m.ReadSeeker.Seek(offset, whence)
	m.done = n
	return n, err
}
