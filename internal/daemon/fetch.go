//go:build linux

package daemon

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/url"
	"os"

	"github.com/atollvm/atoll/internal/config"
	"golang.org/x/net/http/httpproxy"
)

// fetching makes the requests of documents that machines are provisioned with, through the proxy of the settings and with their
// certificate authorities. One that cannot be read is left out: it must not keep the daemon from starting.
func fetching(s config.Settings, log *slog.Logger) *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	p := httpproxy.FromEnvironment()
	p.HTTPProxy, p.HTTPSProxy, p.NoProxy = cmp.Or(s.Proxy.HTTP, p.HTTPProxy), cmp.Or(s.Proxy.HTTPS, p.HTTPSProxy), cmp.Or(s.Proxy.No, p.NoProxy)
	proxy := p.ProxyFunc()
	t.Proxy = func(r *http.Request) (*url.URL, error) { return proxy(r.URL) }
	if len(s.TLS.CA) == 0 {
		return t
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, path := range s.TLS.CA {
		pem, err := os.ReadFile(path)
		if err != nil {
			log.Error("reading a certificate authority", "path", path, "err", err)
			continue
		}
		pool.AppendCertsFromPEM(pem) // that it holds some is checked with the settings
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool}
	return t
}
