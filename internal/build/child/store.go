//go:build linux

package child

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/atollvm/atoll/internal/image"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/hashicorp/yamux"
	"github.com/moby/buildkit/util/resolver"
	"github.com/moby/buildkit/util/resolver/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// storeHost stands for the parent's registry in URLs; no name server knows it.
const storeHost = "store.atoll.invalid"

// maxManifest is the size that the distribution specification asks registries to accept at least.
const maxManifest = 4 << 20

// store is the daemon's image store as BuildKit sees it: an images.Store that knows what a tag stands for, and a registry host for
// the content. It has both so that BuildKit's own resolve modes hold: "local" asks here first, "pull" asks the registry for the tag.
type store struct {
	client *http.Client
	remote docker.RegistryHosts
}

var _ images.Store = (*store)(nil)

// registryConfig puts settings, by host[:port], in BuildKit's words: it names mirrors by host and path.
func registryConfig(settings map[string]image.Registry) map[string]config.RegistryConfig {
	all := map[string]config.RegistryConfig{}
	yes, no := true, false
	for host, r := range settings {
		c := all[host]
		if r.CA != "" {
			c.RootCAs, c.PlainHTTP = []string{r.CA}, &no // also on loopback, where BuildKit begins with plain HTTP
		}
		if r.Insecure {
			c.Insecure, c.PlainHTTP = &yes, &yes // TLS first: the two together are what makes BuildKit fall back
		}
		for _, m := range r.Mirrors {
			u, err := url.Parse(m)
			if err != nil {
				continue // the settings were checked when they were read
			}
			c.Mirrors = append(c.Mirrors, strings.TrimSuffix(u.Host+u.Path, "/"))
			if u.Scheme == "http" {
				mirror := all[u.Host]
				mirror.PlainHTTP = &yes
				all[u.Host] = mirror
			}
		}
		if plain := all[host].PlainHTTP; plain != nil {
			c.PlainHTTP = plain
		}
		all[host] = c
	}
	return all
}

func newStore(session *yamux.Session, registries map[string]image.Registry) *store {
	transport := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return session.Open() },
	}
	return &store{client: &http.Client{Transport: transport}, remote: resolver.NewRegistryConfig(registryConfig(registries))}
}

// hosts lists where content of a registry is looked for: our store, then the registry itself.
func (s *store) hosts(domain string) ([]docker.RegistryHost, error) {
	remote, err := s.remote(domain)
	if err != nil {
		return nil, err
	}
	ours := docker.RegistryHost{
		Client: &http.Client{Transport: storeOrOut{store: s.client.Transport, remote: remote}},
		Host:   storeHost,
		Scheme: "http",
		Path:   "/v2",
		// Tags are Get's, or the registry's, whose own answer is then the one that is reported.
		Capabilities: docker.HostCapabilityPull,
	}
	return append([]docker.RegistryHost{ours}, remote...), nil
}

// storeOrOut sends requests for the store to it. BuildKit fetches tokens for the other hosts with the first host's client, so what is
// not for the store goes out as that host's own requests do. A token server that is none of the hosts is taken for the registry's,
// which is the last of them.
type storeOrOut struct {
	store  http.RoundTripper
	remote []docker.RegistryHost
}

func (t storeOrOut) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Host == storeHost {
		return t.store.RoundTrip(r)
	}
	i := slices.IndexFunc(t.remote, func(h docker.RegistryHost) bool { return h.Host == r.URL.Host })
	if i < 0 {
		i = len(t.remote) - 1
	}
	return t.remote[i].Client.Transport.RoundTrip(r)
}

// Get resolves a tag in the store.
func (s *store) Get(ctx context.Context, name string) (images.Image, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return images.Image{}, err
	}
	tagged, ok := reference.TagNameOnly(named).(reference.NamedTagged)
	if !ok {
		return images.Image{}, fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
	}
	u := url.URL{
		Scheme:   "http",
		Host:     storeHost,
		Path:     "/v2/" + reference.Path(named) + "/manifests/" + tagged.Tag(),
		RawQuery: url.Values{"ns": {reference.Domain(named)}}.Encode(),
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return images.Image{}, err
	}
	req.Header.Set("Accept", strings.Join([]string{
		ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest,
		images.MediaTypeDockerSchema2ManifestList, images.MediaTypeDockerSchema2Manifest,
	}, ", "))
	resp, err := s.client.Do(req)
	if err != nil {
		return images.Image{}, fmt.Errorf("asking the image store for %s: %w", name, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return images.Image{}, fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
	default:
		return images.Image{}, fmt.Errorf("asking the image store for %s: %s", name, resp.Status)
	}
	manifest, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest))
	if err != nil {
		return images.Image{}, fmt.Errorf("asking the image store for %s: %w", name, err)
	}
	return images.Image{Name: name, Target: ocispec.Descriptor{
		MediaType: resp.Header.Get("Content-Type"),
		Digest:    digest.FromBytes(manifest),
		Size:      int64(len(manifest)),
	}}, nil
}

// List names no image: none of them holds on to the build cache.
func (*store) List(context.Context, ...string) ([]images.Image, error) { return nil, nil }

// Create, Update and Delete are refused: the parent names images.
func (*store) Create(context.Context, images.Image) (images.Image, error) {
	return images.Image{}, errdefs.ErrNotImplemented
}

func (*store) Update(context.Context, images.Image, ...string) (images.Image, error) {
	return images.Image{}, errdefs.ErrNotImplemented
}

func (*store) Delete(context.Context, string, ...images.DeleteOpt) error {
	return errdefs.ErrNotImplemented
}
