package image

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"golang.org/x/net/http/httpproxy"

	"github.com/atollvm/atoll/internal/hint"
)

const (
	dialTimeout  = 10 * time.Second
	stallTimeout = time.Minute // without one byte from or to the registry
	// A registry that asks for patience gets it so often and so long at most.
	maxPatience  = 30 * time.Second
	patientTries = 3
)

// registries are the settings of all registries, and an HTTP client for each. Safe for concurrent use.
type registries struct {
	settings map[string]Registry
	ca       []string
	proxy    func(*url.URL) (*url.URL, error)

	mu      sync.Mutex // guards clients
	clients map[string]*http.Client
}

func newRegistries(o Options) *registries {
	p := httpproxy.FromEnvironment()
	p.HTTPProxy, p.HTTPSProxy, p.NoProxy = cmp.Or(o.Proxy.HTTP, p.HTTPProxy), cmp.Or(o.Proxy.HTTPS, p.HTTPSProxy), cmp.Or(o.Proxy.No, p.NoProxy)
	return &registries{settings: maps.Clone(o.Registries), ca: o.CA, proxy: p.ProxyFunc(), clients: map[string]*http.Client{}}
}

// of returns the settings of a registry; Docker Hub is known by the name that references have.
func (r *registries) of(host string) Registry {
	if host == "registry-1.docker.io" {
		host = "docker.io"
	}
	return r.settings[host]
}

// plainHTTP says whether a registry is spoken to in plain HTTP from the start. One on loopback is, unless settings speak of its TLS.
func (r *registries) plainHTTP(host string) (bool, error) {
	set := r.of(host)
	if set.Insecure || set.CA != "" {
		return false, nil
	}
	return docker.MatchLocalhost(host)
}

// client returns the HTTP client for a registry. A fault in its settings is an error each time, until it is mended.
func (r *registries) client(host string) (*http.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.clients[host]; c != nil {
		return c, nil
	}
	set := r.of(host)
	config, err := r.tls(set)
	if err != nil {
		return nil, fmt.Errorf("registry %s: %w", host, err)
	}
	t := docker.DefaultHTTPTransport(config)
	t.Proxy = func(req *http.Request) (*url.URL, error) { return r.proxy(req.URL) }
	t.ResponseHeaderTimeout = stallTimeout // a registry answers an upload when it has stored all of it
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return stallingConn{c}, nil
	}
	var transport http.RoundTripper = t
	if set.Insecure {
		transport = docker.NewHTTPFallback(t)
	}
	c := &http.Client{Transport: patient{transport}}
	r.clients[host] = c
	return c, nil
}

func (r *registries) tls(set Registry) (*tls.Config, error) {
	files := r.ca
	if set.CA != "" {
		files = append(files[:len(files):len(files)], set.CA)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: set.Insecure}
	if len(files) == 0 {
		return config, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("reading the system's certificate authorities: %w", err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err == nil && !pool.AppendCertsFromPEM(data) {
			err = errors.New("no certificate in it")
		}
		if err != nil {
			return nil, hint.With(fmt.Errorf("reading certificate authority %s: %w: %w", name, err, errdefs.ErrFailedPrecondition), "mend ca in ATOLL_HOME/config.toml")
		}
	}
	config.RootCAs = pool
	return config, nil
}

// stallingConn fails where nothing moves for long, else a dead registry would hold a transfer for ever. What is written counts too:
// while a blob goes up, nothing comes down.
type stallingConn struct{ net.Conn }

func (c stallingConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(stallTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c stallingConn) Write(b []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(stallTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// patient does as a registry asks that is busy: 429 and 503 with Retry-After are waited for, within bounds.
type patient struct{ http.RoundTripper }

func (p patient) RoundTrip(r *http.Request) (*http.Response, error) {
	for i := 1; ; i++ {
		resp, err := p.RoundTripper.RoundTrip(r)
		if err != nil || i == patientTries || r.Body != nil && r.Body != http.NoBody {
			return resp, err
		}
		pause, ok := retryAfter(resp)
		if !ok {
			return resp, nil
		}
		select {
		case <-r.Context().Done():
			return resp, nil
		case <-time.After(pause):
			resp.Body.Close()
		}
	}
}

func retryAfter(resp *http.Response) (time.Duration, bool) {
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return 0, false
	}
	header := resp.Header.Get("Retry-After")
	seconds, err := strconv.Atoi(header)
	pause := time.Duration(seconds) * time.Second
	if err != nil {
		at, err := http.ParseTime(header)
		if err != nil {
			return 0, false
		}
		pause = max(0, time.Until(at))
	}
	return pause, pause >= 0 && pause <= maxPatience
}

// deadHosts are the mirrors that could not be reached during one pull.
type deadHosts struct {
	mu   sync.Mutex // guards errs
	errs map[string]error
}

// mirrorTransport asks a mirror that could not be reached no second time.
type mirrorTransport struct {
	http.RoundTripper
	dead *deadHosts
}

func (t mirrorTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	t.dead.mu.Lock()
	err := t.dead.errs[r.URL.Host]
	t.dead.mu.Unlock()
	if err != nil {
		return nil, err
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" && r.Context().Err() == nil {
		t.dead.mu.Lock()
		defer t.dead.mu.Unlock()
		if t.dead.errs == nil {
			t.dead.errs = map[string]error{}
		}
		t.dead.errs[r.URL.Host] = err
	}
	return resp, err
}
