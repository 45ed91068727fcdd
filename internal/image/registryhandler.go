package image

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/ref"
)

// Handler serves the store as a read-only registry (the OCI distribution API), for the builder to take FROM images from before it asks a
// real one. The host of a name comes in the query parameter ns, as containerd's mirrors have it; without one it is docker.io.
func (s *Store) Handler() http.Handler { return http.HandlerFunc(s.serve) }

func (s *Store) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
		return
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "no such endpoint")
		return
	}
	if path == "" {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, "{}")
		return
	}
	parts := strings.Split(path, "/")
	if len(parts) < 3 {
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "no such endpoint")
		return
	}
	host := r.URL.Query().Get("ns")
	if host == "" {
		host = "docker.io"
	}
	name, kind, id := host+"/"+strings.Join(parts[:len(parts)-2], "/"), parts[len(parts)-2], parts[len(parts)-1]
	switch kind {
	case "manifests":
		s.serveManifest(w, r, name, id)
	case "blobs":
		s.serveBlob(w, r, name, id)
	default:
		refuse(w, http.StatusNotFound, "UNSUPPORTED", "no such endpoint")
	}
}

func (s *Store) serveManifest(w http.ResponseWriter, r *http.Request, name, id string) {
	sep := ":"
	if strings.Contains(id, ":") {
		sep = "@"
	}
	parsed, err := ref.Parse(name + sep + id)
	if err != nil {
		refuse(w, http.StatusNotFound, "NAME_INVALID", err.Error())
		return
	}
	s.mu.RLock()
	rec, ok := s.lookupLocked(parsed)
	s.mu.RUnlock()
	if !ok {
		if desc, ok := s.keptOf(parsed.Name, parsed.Digest); ok {
			s.serveContent(w, r, desc, "MANIFEST_UNKNOWN")
			return
		}
		refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN", parsed.String()+" is not in the store")
		return
	}
	// By tag the whole index where there was one: a builder for another platform then sees that its manifest is not here.
	desc := rec.Source
	if parsed.Digest == rec.Manifest.Digest {
		desc = rec.Manifest
	}
	s.serveContent(w, r, desc, "MANIFEST_UNKNOWN")
}

func (s *Store) serveBlob(w http.ResponseWriter, r *http.Request, name, id string) {
	d, err := digest.Parse(id)
	if err != nil {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", err.Error())
		return
	}
	if !s.has(r.Context(), name, d) {
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", name+"@"+id+" is not in the store")
		return
	}
	s.serveContent(w, r, ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d}, "BLOB_UNKNOWN")
}

// keptOf finds another platform's manifest of an image of that name.
func (s *Store) keptOf(name string, d digest.Digest) (ocispec.Descriptor, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for key, rec := range s.refs {
		if nameOf(key) != name {
			continue
		}
		for _, k := range rec.Kept {
			if k.Digest == d {
				return k, true
			}
		}
	}
	return ocispec.Descriptor{}, false
}

// has says whether an image of that name has the blob.
func (s *Store) has(ctx context.Context, name string, d digest.Digest) bool {
	var kept []ocispec.Descriptor
	s.mu.RLock()
	for key, rec := range s.refs {
		if nameOf(key) != name {
			continue
		}
		img := s.images[rec.Manifest.Digest]
		if d == rec.Manifest.Digest || d == rec.Source.Digest || d == img.ConfigDesc.Digest || isLayer(img.Layers, d) {
			s.mu.RUnlock()
			return true
		}
		kept = append(kept, rec.Kept...)
	}
	s.mu.RUnlock()
	for _, k := range kept {
		if k.Digest == d {
			return true
		}
		if doc, err := s.document(ctx, k); err == nil && (doc.Config != nil && doc.Config.Digest == d || isLayer(doc.Layers, d)) {
			return true
		}
	}
	return false
}

func isLayer(layers []ocispec.Descriptor, d digest.Digest) bool {
	return slices.ContainsFunc(layers, func(l ocispec.Descriptor) bool { return l.Digest == d })
}

func (s *Store) serveContent(w http.ResponseWriter, r *http.Request, desc ocispec.Descriptor, code string) {
	ra, err := s.content.ReaderAt(r.Context(), desc)
	if err != nil {
		refuse(w, http.StatusNotFound, code, err.Error())
		return
	}
	defer ra.Close()
	h := w.Header()
	h.Set("Content-Type", desc.MediaType)
	h.Set("Docker-Content-Digest", desc.Digest.String())
	h.Set("Etag", `"`+desc.Digest.String()+`"`)
	http.ServeContent(w, r, "", time.Time{}, newSeeker(ra))
}

func newSeeker(ra content.ReaderAt) io.ReadSeeker { return io.NewSectionReader(ra, 0, ra.Size()) }

// refuse answers with an error as the distribution specification writes it.
func refuse(w http.ResponseWriter, status int, code, message string) {
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string][]entry{"errors": {{code, message}}})
}
