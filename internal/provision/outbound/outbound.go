// Package outbound guards the requests that documents have the host make. What comes back lands in a guest, and networks keep the host's
// loopback and its link-local neighbours, such as a cloud's metadata service, from guests. It owns which addresses may be reached; who
// requests what is others' business. A leaf, imported by the languages of provision. A Guard may be used from several goroutines.
package outbound

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// Guard is the rule of one document: link-local addresses are never reached, and loopback only where the operator's own document names it,
// not where a document that was fetched does, a redirect, or a name in the DNS. A proxy of the host's settings is where its owner says.
type Guard struct {
	mu      sync.Mutex      // guards the rest
	named   map[string]bool // host:port on loopback
	proxies map[string]bool
}

// New returns a guard that allows no loopback.
func New() *Guard { return &Guard{named: map[string]bool{}, proxies: map[string]bool{}} }

// Allow takes notice of a URL that the operator wrote. It must name loopback by an address or as localhost to reach it.
func (g *Guard) Allow(u *url.URL) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if kind, _ := kindOf(u.Hostname()); kind == loopback {
		g.named[hostPort(u)] = true
	}
}

// Transport returns a clone of base that obeys the guard. base's own proxies may be anywhere; for one that a document sets, see Allow.
func (g *Guard) Transport(base *http.Transport) *http.Transport {
	t := base.Clone()
	if base.Proxy != nil {
		t.Proxy = g.trusted(base.Proxy)
	}
	return g.Bind(t)
}

// Bind has a transport obey the guard, its proxies too.
func (g *Guard) Bind(t *http.Transport) *http.Transport {
	choose := t.Proxy
	t.Proxy = func(r *http.Request) (*url.URL, error) {
		// Where there is a proxy, this is all that the host sees of where the request goes.
		if kind, _ := kindOf(r.URL.Hostname()); !g.allows(kind, hostPort(r.URL), false) {
			return nil, refused(r.URL.Hostname())
		}
		if choose == nil {
			return nil, nil
		}
		return choose(r)
	}
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		d := net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, Control: func(_, at string, _ syscall.RawConn) error {
			return g.check(addr, at)
		}}
		return d.DialContext(ctx, network, addr)
	}
	return t
}

// trusted remembers the proxies that are chosen.
func (g *Guard) trusted(choose func(*http.Request) (*url.URL, error)) func(*http.Request) (*url.URL, error) {
	return func(r *http.Request) (*url.URL, error) {
		u, err := choose(r)
		if err == nil && u != nil {
			g.mu.Lock()
			g.proxies[hostPort(u)] = true
			g.mu.Unlock()
		}
		return u, err
	}
}

// check takes a connection to addr at the address that its name has turned out to have.
func (g *Guard) check(addr, at string) error {
	host, _, err := net.SplitHostPort(at)
	if err != nil {
		return fmt.Errorf("address %q: %w: %w", at, err, errdefs.ErrInvalidArgument)
	}
	kind, ok := kindOf(host)
	if !ok {
		return fmt.Errorf("address %q: %w", at, errdefs.ErrInvalidArgument)
	}
	if !g.allows(kind, addr, true) {
		return refused(host)
	}
	return nil
}

func (g *Guard) allows(k kind, hostPort string, dialled bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	hostPort = strings.ToLower(hostPort)
	return k == elsewhere || dialled && g.proxies[hostPort] || k == loopback && g.named[hostPort]
}

func refused(host string) error {
	err := fmt.Errorf("%s is an address of the host itself or of its link, which machines must not reach: %w", host, errdefs.ErrPermissionDenied)
	return hint.With(err, "serve it at another address; on loopback only what your own document names by address is fetched, not what a fetched one or a redirect does")
}

type kind int

const (
	elsewhere kind = iota
	loopback       // the host itself
	local          // on its link
)

// metadataV6 is where a cloud has its metadata service besides link-local: a secret of the host's, too.
var metadataV6 = netip.MustParseAddr("fd00:ec2::254")

// kindOf says what a host is as it is written; ok: it is an address.
func kindOf(host string) (_ kind, ok bool) {
	a, err := netip.ParseAddr(host)
	if err != nil {
		name := strings.TrimSuffix(strings.ToLower(host), ".")
		if name == "localhost" || strings.HasSuffix(name, ".localhost") {
			return loopback, false
		}
		return elsewhere, false
	}
	a = a.Unmap().WithZone("")
	switch {
	case a.IsLoopback(), a.IsUnspecified(): // to connect to none means to oneself
		return loopback, true
	case a.IsLinkLocalUnicast(), a.IsMulticast(), a == metadataV6:
		return local, true
	}
	return elsewhere, true
}

// hostPort is how a transport dials a URL's server.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "socks5": "1080", "socks5h": "1080"}[strings.ToLower(u.Scheme)]
	}
	if port == "" {
		port = "80"
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}
