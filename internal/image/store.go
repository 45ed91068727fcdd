// Package image keeps OCI images: their content by digest, their references, what refers to them; and the ways from and to registries and
// archives, and from here to the builder. What is made of an image (root disks) and who runs it (machines) it only knows through SetInUse and OnDelete.
// A Store is safe for concurrent use; one process owns its directory.
package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
	"github.com/atollvm/atoll/internal/state"
)

// Bounds of what strangers send and we read into memory. The distribution specification asks registries to take manifests of 4 MiB.
const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	maxEntries  = 512 // layers of a manifest, manifests of an index
	maxNesting  = 3   // of indexes
)

// Image is one image of one platform. What the slices and RawConfig point to is shared: do not change it.
type Image struct {
	Digest       digest.Digest // of the platform's manifest: the image's ID
	References   []string      // normalized, sorted; none: untagged
	Platform     ocispec.Platform
	Created      time.Time
	Size         int64 // of the config and the layers as they are kept, compressed
	Config       dockerspec.DockerOCIImage
	RawConfig    []byte // the config's JSON, unchanged
	Layers       []ocispec.Descriptor
	ManifestDesc ocispec.Descriptor
	ConfigDesc   ocispec.Descriptor
}

// record is what one reference stands for. An untagged image has a record too, under its digest.
type record struct {
	Manifest ocispec.Descriptor
	Source   ocispec.Descriptor // what the registry has under the reference: the manifest or an index of several platforms
	// Kept are the other manifests (and indexes) below Source that are here with all they need: other platforms, attestations.
	Kept []ocispec.Descriptor `json:",omitempty"`
}

// Options configure a Store.
type Options struct {
	Dir             string // blobs/sha256/<hex> and unfinished transfers
	DB              *state.DB
	DockerConfigDir string              // has config.json with registry credentials; "": none
	Registries      map[string]Registry // by host[:port], as in references; those on loopback are spoken to in plain HTTP
	Proxy           Proxy
	CA              []string // PEM files, trusted beside the system's
	Events          *event.Bus
	Log             *slog.Logger
}

// Registry is how one registry is reached.
type Registry struct {
	Mirrors  []string // base URLs, tried in this order before the registry itself; for pulls only
	Insecure bool     // TLS whose certificate nobody checks, or plain HTTP
	CA       string   // PEM file with the registry's own certificate authority
}

// Proxy is what requests go through. Empty fields come from the environment.
type Proxy struct {
	HTTP, HTTPS, No string
}

// Store is an image store.
type Store struct {
	dir             string
	dockerConfigDir string
	registries      *registries
	content         content.Store
	records         *state.Collection[record]
	artifacts       *state.Collection[artifact]
	events          *event.Bus
	log             *slog.Logger
	ingests         atomic.Uint64 // makes names of ingests differ

	// change is held while records or blobs go or come; before mu. It guards the holds.
	change   sync.Mutex
	holds    int
	holdSeq  uint64                     // counts holds ever taken
	deferred map[digest.Digest]struct{} // untagged images to collect at the last release
	sweepDue bool                       // blobs of no image are to be deleted at the last release
	gcDue    bool                       // a whole GC is due at the last release

	mu       sync.RWMutex // guards the rest, for moments only: Resolve waits for nothing else
	refs     map[string]record
	images   map[digest.Digest]*Image
	inUse    func(digest.Digest) []string
	onDelete []func(digest.Digest)
}

// Open opens or creates the store.
func Open(o Options) (*Store, error) {
	// The library's Walk fails as long as there is no blob.
	if err := os.MkdirAll(filepath.Join(o.Dir, "blobs"), 0o755); err != nil {
		return nil, fmt.Errorf("opening image store: %w", err)
	}
	c, err := local.NewStore(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("opening image store %s: %w", o.Dir, err)
	}
	records, err := state.Of[record](o.DB, "images")
	if err != nil {
		return nil, fmt.Errorf("opening image store %s: %w", o.Dir, err)
	}
	s := &Store{
		dir: o.Dir, dockerConfigDir: o.DockerConfigDir, registries: newRegistries(o),
		content: c, records: records, events: o.Events, log: o.Log,
		deferred: map[digest.Digest]struct{}{},
		images:   map[digest.Digest]*Image{},
		inUse:    func(digest.Digest) []string { return nil },
	}
	if s.artifacts, err = state.Of[artifact](o.DB, "artifacts"); err != nil {
		return nil, fmt.Errorf("opening image store %s: %w", o.Dir, err)
	}
	if s.refs, err = records.All(); err != nil {
		return nil, fmt.Errorf("opening image store %s: %w", o.Dir, err)
	}
	for key, r := range s.refs {
		if s.images[r.Manifest.Digest] != nil {
			continue
		}
		img, err := s.decode(context.Background(), r.Manifest)
		if err != nil {
			// Someone took its files away: forgetting it makes the next pull mend it.
			s.log.Warn("image is incomplete, forgetting it", "reference", key, "error", err)
			delete(s.refs, key)
			if err := records.Delete(key); err != nil {
				return nil, err
			}
			continue
		}
		s.images[r.Manifest.Digest] = img
	}
	return s, nil
}

// SetInUse tells the store how to ask who uses an image (by name, such as machines). The function is called without any lock held.
func (s *Store) SetInUse(f func(digest.Digest) []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inUse = f
}

// OnDelete adds a function that is called after an image has been deleted, to remove what was made of it.
func (s *Store) OnDelete(f func(digest.Digest)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onDelete = append(s.onDelete, f)
}

// Content is the store of blobs. Who writes to it takes a Hold until Put has made an image of the blobs.
func (s *Store) Content() content.Store { return s.content }

// Blob opens a blob for reading from its start.
func (s *Store) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("opening blob %s: %w", desc.Digest, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(ra), ra}, nil
}

// List returns all images, the newest first; untagged ones too.
func (s *Store) List(context.Context) ([]Image, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	seen := map[digest.Digest]bool{}
	var all []Image
	for _, r := range s.refs {
		if d := r.Manifest.Digest; !seen[d] {
			seen[d] = true
			all = append(all, s.imageLocked(d))
		}
	}
	slices.SortFunc(all, func(a, b Image) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.Digest, b.Digest))
	})
	return all, nil
}

// imageLocked returns an image with its references. It needs mu.
func (s *Store) imageLocked(d digest.Digest) Image {
	img := *s.images[d]
	for key, r := range s.refs {
		if r.Manifest.Digest == d && !isUntagged(key) {
			img.References = append(img.References, key)
		}
	}
	slices.Sort(img.References)
	return img
}

// isUntagged tells the key of an untagged image from a reference, which always has a slash.
func isUntagged(key string) bool { return !strings.Contains(key, "/") }

// Resolve finds an image of this store by reference, ID or 12 and more digits of its ID. It never asks a registry. With a platform
// (os/arch[/variant]) the image must be for that one; "" takes any.
func (s *Store) Resolve(ctx context.Context, name, platform string) (Image, error) {
	img, err := s.find(name)
	if err != nil || platform == "" {
		return img, err
	}
	want, err := parsePlatform(platform)
	if err != nil {
		return Image{}, err
	}
	if !matches(want, img.Platform) {
		for _, desc := range s.recordFor(name, img).Kept {
			if desc.Platform != nil && matches(want, *desc.Platform) {
				if other, err := s.decode(ctx, desc); err == nil {
					return *other, nil
				}
			}
		}
		return Image{}, hint.With(fmt.Errorf("image %q is for %s, not for %s: %w", name, platforms.Format(img.Platform), platforms.Format(want), errdefs.ErrNotFound),
			"atoll pull --platform %s %s", platforms.Format(want), name)
	}
	return img, nil
}

var idPrefix = regexp.MustCompile(`^(?:sha256:)?([0-9a-f]{1,64})$`)

func (s *Store) find(name string) (Image, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, parseErr := ref.Parse(name)
	id := idPrefix.FindStringSubmatch(name)
	if whole := id != nil && (len(id[1]) == 64 || strings.Contains(name, ":")); parseErr == nil && !whole { // no name stands in an ID's way
		if rec, ok := s.lookupLocked(r); ok {
			return s.imageLocked(rec.Manifest.Digest), nil
		}
	}
	if id == nil {
		if parseErr != nil {
			return Image{}, parseErr
		}
		return Image{}, hint.With(fmt.Errorf("image %q: %w", name, errdefs.ErrNotFound), "atoll pull %s", r.Familiar())
	}
	found := map[digest.Digest]bool{}
	for _, rec := range s.refs {
		if strings.HasPrefix(rec.Manifest.Digest.Encoded(), id[1]) {
			found[rec.Manifest.Digest] = true
		}
	}
	switch len(found) {
	case 0:
		next := "atoll image ls shows the images there are"
		if parseErr == nil && len(id[1]) < 12 { // rather a name
			next = "atoll pull " + r.Familiar()
		}
		return Image{}, hint.With(fmt.Errorf("image %q: %w", name, errdefs.ErrNotFound), "%s", next)
	case 1:
		for d := range found {
			return s.imageLocked(d), nil
		}
	}
	return Image{}, hint.With(fmt.Errorf("image ID %q: %d images begin so: %w", name, len(found), errdefs.ErrInvalidArgument), "give more digits of the ID")
}

// lookupLocked finds what a reference stands for. One with a digest is also met by any image of that name and digest. It needs mu.
func (s *Store) lookupLocked(r ref.Ref) (record, bool) {
	if r.Digest == "" {
		rec, ok := s.refs[r.String()]
		return rec, ok
	}
	for key, rec := range s.refs {
		if (rec.Manifest.Digest == r.Digest || rec.Source.Digest == r.Digest) && nameOf(key) == r.Name {
			return rec, true
		}
	}
	return record{}, false
}

// nameOf returns the name in a key of refs.
func nameOf(key string) string {
	name, _, _ := strings.Cut(key, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	return name
}

// Put makes an image of content that is in the store already: of a manifest, or of an index that has one which is here whole (this
// host's platform where there is a choice). Without a reference the image stays untagged, until GC finds it unused.
func (s *Store) Put(ctx context.Context, reference string, manifest ocispec.Descriptor) (Image, error) {
	defer s.Hold()()
	img, err := s.put(ctx, reference, manifest)
	if err != nil {
		return Image{}, fmt.Errorf("storing image %s: %w", cmp.Or(reference, manifest.Digest.String()), err)
	}
	return img, nil
}

func (s *Store) put(ctx context.Context, reference string, manifest ocispec.Descriptor) (Image, error) {
	key := manifest.Digest.String()
	if reference != "" {
		r, err := parseTag(reference)
		if err != nil {
			return Image{}, err
		}
		key = r.String()
	}
	rec, img, err := s.adopt(ctx, manifest)
	if err != nil {
		return Image{}, err
	}
	if reference == "" {
		key = img.Digest.String()
	}
	if err := s.set(key, rec, img); err != nil {
		return Image{}, err
	}
	if reference != "" {
		s.publish("tag", img.Digest, key)
	}
	return s.image(img.Digest), nil
}

func (s *Store) image(d digest.Digest) Image {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.imageLocked(d)
}

// Tag gives an image another reference.
func (s *Store) Tag(_ context.Context, source, target string) error {
	r, err := parseTag(target)
	if err != nil {
		return err
	}
	defer s.Hold()()
	img, err := s.find(source)
	if err != nil {
		return err
	}
	rec := s.recordOf(img)
	if err := s.set(r.String(), rec, &img); err != nil {
		return fmt.Errorf("tagging image %s: %w", img.Digest, err)
	}
	s.publish("tag", img.Digest, r.String())
	return nil
}

// recordOf returns a record of the image: with it a new reference keeps the index that the image came from.
func (s *Store) recordOf(img Image) record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, rec := range s.refs {
		if rec.Manifest.Digest == img.Digest {
			return rec
		}
	}
	return record{Manifest: img.ManifestDesc, Source: img.ManifestDesc}
}

func parseTag(s string) (ref.Ref, error) {
	r, err := ref.Parse(s)
	if err == nil && r.Digest != "" {
		err = hint.With(fmt.Errorf("image reference %q: a digest cannot be chosen: %w", s, errdefs.ErrInvalidArgument), "write name:tag")
	}
	if name, _, _ := strings.Cut(s, ":"); err == nil && digest.Algorithm(name).Available() {
		err = hint.With(fmt.Errorf("image reference %q: it would be taken for a digest: %w", s, errdefs.ErrInvalidArgument), "choose another name than %s", name)
	}
	return r, err
}

// set lets key stand for the image of rec. An image that loses its last reference by it becomes untagged.
func (s *Store) set(key string, rec record, img *Image) error {
	s.change.Lock()
	defer s.change.Unlock()
	return s.setLocked(key, rec, img)
}

// setLocked is set; it needs change. The writes are in such an order that a crash between them loses no image.
func (s *Store) setLocked(key string, rec record, img *Image) error {
	if key == rec.Manifest.Digest.String() && s.isTagged(rec.Manifest.Digest, "") {
		return nil // it has a reference already
	}
	s.mu.RLock()
	old, replaced := s.refs[key]
	s.mu.RUnlock()
	if replaced && old.Manifest.Digest != rec.Manifest.Digest && !s.isTagged(old.Manifest.Digest, key) {
		if err := s.write(old.Manifest.Digest.String(), old); err != nil {
			return err
		}
	}
	bare := *img
	bare.References = nil
	s.mu.Lock()
	s.images[bare.Digest] = &bare
	s.mu.Unlock()
	if err := s.write(key, rec); err != nil {
		return err
	}
	if !isUntagged(key) {
		return s.erase(rec.Manifest.Digest.String())
	}
	return nil
}

// isTagged says whether the image has a reference other than the given one.
func (s *Store) isTagged(d digest.Digest, but string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for key, r := range s.refs {
		if r.Manifest.Digest == d && !isUntagged(key) && key != but {
			return true
		}
	}
	return false
}

// write and erase change one record on disk and then in memory. They need change.
func (s *Store) write(key string, rec record) error {
	if err := s.records.Put(key, rec); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs[key] = rec
	return nil
}

func (s *Store) erase(key string) error {
	if err := s.records.Delete(key); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.refs, key)
	return nil
}

func (s *Store) publish(action string, d digest.Digest, reference string) {
	attributes := map[string]string{}
	if reference != "" {
		r, err := ref.Parse(reference)
		if err != nil {
			panic("image: stored reference: " + err.Error())
		}
		attributes["name"] = r.Familiar()
	}
	s.events.Publish(event.Event{Type: event.Image, Action: action, ID: d.String(), Attributes: attributes})
}

// document is a manifest or an index: what it is, its content says, not its header.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	ArtifactType  string               `json:"artifactType"`
	Subject       *ocispec.Descriptor  `json:"subject"`
	Annotations   map[string]string    `json:"annotations"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
}

// document reads a manifest or an index.
func (s *Store) document(ctx context.Context, desc ocispec.Descriptor) (document, error) {
	var doc document
	data, err := s.read(ctx, desc, maxManifest)
	if err != nil {
		return doc, err
	}
	return parseDocument(desc, data)
}

// parseDocument checks what somebody calls a manifest or an index.
func parseDocument(desc ocispec.Descriptor, data []byte) (document, error) {
	var doc document
	if err := json.Unmarshal(data, &doc); err != nil {
		return doc, fmt.Errorf("manifest %s: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if doc.SchemaVersion == 1 {
		return doc, errSchema1
	}
	// Bytes that are both would be one image to us and another one to the next tool (CVE-2021-41190).
	if isManifest := doc.Config != nil; isManifest == (doc.Manifests != nil) {
		return doc, fmt.Errorf("manifest %s is neither that of an image nor an index: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	if n := max(len(doc.Layers), len(doc.Manifests)); n > maxEntries {
		return doc, fmt.Errorf("manifest %s has %d entries, more than %d: %w", desc.Digest, n, maxEntries, errdefs.ErrInvalidArgument)
	}
	entries := slices.Concat(doc.Layers, doc.Manifests)
	if doc.Config != nil {
		if doc.Config.Size > maxConfig {
			return doc, tooLarge(*doc.Config, maxConfig)
		}
		entries = append(entries, *doc.Config)
	}
	for _, d := range entries {
		if err := checkDescriptor(d); err != nil {
			return doc, fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
	}
	return doc, nil
}

var errSchema1 = hint.With(fmt.Errorf("manifest of schema 1, a format given up in 2017: %w", errdefs.ErrNotImplemented), "push the image again with a current tool")

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	if d.Size < 0 {
		return fmt.Errorf("blob %s: size %d: %w", d.Digest, d.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

// read returns a whole small blob.
func (s *Store) read(ctx context.Context, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, tooLarge(desc, limit)
	}
	desc.Data = nil // the store's bytes are the verified ones
	ra, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if ra.Size() > limit {
		return nil, tooLarge(desc, limit)
	}
	if desc.Size > 0 && ra.Size() != desc.Size {
		return nil, fmt.Errorf("blob %s has %d bytes, its descriptor says %d: %w", desc.Digest, ra.Size(), desc.Size, errdefs.ErrDataLoss)
	}
	data := make([]byte, ra.Size())
	if _, err := ra.ReadAt(data, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading blob %s: %w", desc.Digest, err)
	}
	return data, nil
}

func tooLarge(desc ocispec.Descriptor, limit int64) error {
	return fmt.Errorf("%s %s of %d bytes is too large, more than %d: %w", cmp.Or(desc.MediaType, "blob"), desc.Digest, desc.Size, limit, errdefs.ErrInvalidArgument)
}

// decode reads the manifest and the config of an image.
func (s *Store) decode(ctx context.Context, desc ocispec.Descriptor) (*Image, error) {
	doc, err := s.document(ctx, desc)
	if err != nil {
		return nil, err
	}
	if doc.Config == nil {
		return nil, fmt.Errorf("%s is an index, not the manifest of one image: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	if err := checkImage(doc); err != nil {
		return nil, err
	}
	raw, err := s.read(ctx, *doc.Config, maxConfig)
	if err != nil {
		return nil, err
	}
	img := &Image{
		Digest: desc.Digest, RawConfig: raw, Layers: doc.Layers, ConfigDesc: *doc.Config, Size: doc.Config.Size,
		ManifestDesc: ocispec.Descriptor{MediaType: manifestType(doc, desc), Digest: desc.Digest, Size: desc.Size},
	}
	if err := json.Unmarshal(raw, &img.Config); err != nil {
		return nil, fmt.Errorf("image config %s: %w: %w", doc.Config.Digest, err, errdefs.ErrInvalidArgument)
	}
	img.Platform = platforms.Normalize(img.Config.Platform)
	if img.Config.Created != nil {
		img.Created = *img.Config.Created
	}
	for _, l := range img.Layers {
		img.Size += l.Size
	}
	return img, nil
}

func checkImage(doc document) error {
	if !images.IsConfigType(doc.Config.MediaType) {
		return hint.With(fmt.Errorf("an artifact of type %q, not an image: %w", doc.Config.MediaType, errdefs.ErrInvalidArgument), "only container images can be run")
	}
	for _, l := range doc.Layers {
		if !images.IsLayerType(l.MediaType) {
			return fmt.Errorf("layer %s of type %q: %w", l.Digest, l.MediaType, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func manifestType(doc document, desc ocispec.Descriptor) string {
	switch {
	case doc.MediaType != "":
		return doc.MediaType
	case images.IsManifestType(desc.MediaType), images.IsIndexType(desc.MediaType):
		return desc.MediaType
	case doc.Config == nil:
		return ocispec.MediaTypeImageIndex
	}
	return ocispec.MediaTypeImageManifest
}

func parsePlatform(s string) (ocispec.Platform, error) {
	p, err := platforms.Parse(s)
	if err != nil {
		return p, hint.With(fmt.Errorf("platform %q: %w: %w", s, err, errdefs.ErrInvalidArgument), "write os/arch, such as linux/amd64")
	}
	return p, nil
}

// matches says whether an image for have runs on want. An image made from nothing may not say what it is for.
func matches(want, have ocispec.Platform) bool {
	return have.OS == "" && have.Architecture == "" || platforms.OnlyStrict(want).Match(have)
}
