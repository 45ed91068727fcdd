package ignition

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/coreos/ignition/v2/config/v3_7_experimental/types"
	"github.com/klauspost/compress/gzip"
	"github.com/vincent-petithory/dataurl"
	"golang.org/x/net/http/httpproxy"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/outbound"
)

const (
	headerTimeout = 10 * time.Second // Ignition's default of timeouts.httpResponseHeaders
	firstPause    = 200 * time.Millisecond
	longestPause  = 5 * time.Second
	// Where a config sets no timeouts.httpTotal, Ignition tries for ever. A start that never ends tells nobody why.
	patience      = 30 * time.Second
	stall         = 30 * time.Second // a transfer that brings nothing for so long is broken
	mostRedirects = 10
	// mostContent bounds what all files of a config take in the spool, unpacked.
	mostContent = 4 << 30
	// mostInMemory is how large a content may be to stay out of the spool.
	mostInMemory = 64 << 10
)

// fetcher gets what configs refer to. Its requests are as the last configure said. It belongs to one goroutine.
type fetcher struct {
	base     *http.Transport
	guard    *outbound.Guard
	alive    func()
	client   *http.Client
	total    time.Duration
	patience time.Duration
	spool    string
	left     int64 // that contents may still take
	discard  bool  // contents are verified and not kept
	bundles  map[string][]byte
}

func newFetcher(o Options) *fetcher {
	base := o.Transport
	if base == nil {
		base = http.DefaultTransport.(*http.Transport)
	}
	f := &fetcher{base: base, guard: outbound.New(), alive: o.Alive, patience: patience, spool: o.Spool, left: mostContent, bundles: map[string][]byte{}}
	if f.alive == nil {
		f.alive = func() {}
	}
	f.client = newClient(f.guard.Transport(base))
	return f
}

// allow takes notice of what the operator's own config names.
func (f *fetcher) allow(c types.Config) {
	named := []*string{c.Ignition.Proxy.HTTPProxy, c.Ignition.Proxy.HTTPSProxy, c.Ignition.Config.Replace.Source}
	sources := append(slices.Clone(c.Ignition.Config.Merge), c.Ignition.Security.TLS.CertificateAuthorities...)
	for _, file := range c.Storage.Files {
		sources = append(append(sources, file.Contents), file.Append...)
	}
	for _, res := range sources {
		named = append(named, res.Source)
	}
	for _, s := range named {
		if u, err := url.Parse(value(s)); err == nil && u.Host != "" {
			f.guard.Allow(u)
		}
	}
}

func newClient(t *http.Transport) *http.Client {
	t.DisableCompression = true // what is verified and unpacked is what was asked for
	return &http.Client{Transport: t, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) >= mostRedirects {
			return fmt.Errorf("more than %d redirects", mostRedirects)
		}
		req.Header = http.Header{} // the config's headers are for the server that it names
		return nil
	}}
}

func (f *fetcher) close() { f.client.CloseIdleConnections() }

// configure makes later requests with the timeouts, the proxy and the certificate authorities of a config.
func (f *fetcher) configure(ctx context.Context, c types.Ignition) error {
	t := f.guard.Transport(f.base)
	f.total = 0
	if n := c.Timeouts.HTTPTotal; n != nil {
		f.total = time.Duration(*n) * time.Second
	}
	if p := c.Proxy; p.HTTPProxy != nil || p.HTTPSProxy != nil {
		var no []string
		for _, item := range p.NoProxy {
			no = append(no, string(item))
		}
		of := (&httpproxy.Config{HTTPProxy: value(p.HTTPProxy), HTTPSProxy: value(p.HTTPSProxy), NoProxy: strings.Join(no, ",")}).ProxyFunc()
		t = f.base.Clone()
		t.Proxy = func(req *http.Request) (*url.URL, error) { return of(req.URL) }
		t = f.guard.Bind(t)
	}
	t.ResponseHeaderTimeout = headerTimeout
	if n := c.Timeouts.HTTPResponseHeaders; n != nil {
		t.ResponseHeaderTimeout = time.Duration(*n) * time.Second
	}
	// The bundles are requested as the config has it but for themselves.
	f.close()
	f.client = newClient(t)
	if len(c.Security.TLS.CertificateAuthorities) == 0 {
		return nil
	}
	pool, err := f.roots()
	if err != nil {
		return err
	}
	for _, res := range c.Security.TLS.CertificateAuthorities {
		if err := f.trust(ctx, pool, res); err != nil {
			return fmt.Errorf("certificate authority %s: %w", sourceName(res), err)
		}
	}
	t = t.Clone()
	if t.TLSClientConfig == nil {
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	t.TLSClientConfig.RootCAs = pool
	f.close()
	f.client = newClient(t)
	return nil
}

// roots are the authorities that the caller trusts.
func (f *fetcher) roots() (*x509.CertPool, error) {
	if t := f.base.TLSClientConfig; t != nil && t.RootCAs != nil {
		return t.RootCAs.Clone(), nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("reading the system's certificate authorities: %w", err)
	}
	return pool, nil
}

func (f *fetcher) trust(ctx context.Context, pool *x509.CertPool, res types.Resource) error {
	bundle, ok := f.bundles[value(res.Source)]
	if !ok {
		var err error
		if bundle, err = f.document(ctx, res); err != nil {
			return err
		}
		f.bundles[value(res.Source)] = bundle
	}
	for rest := bundle; len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return fmt.Errorf("it is no PEM: %w", errdefs.ErrInvalidArgument)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		pool.AddCert(cert)
	}
	return nil
}

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

func isData(res types.Resource) bool { return strings.HasPrefix(value(res.Source), "data:") }

// sourceName names a source to a person.
func sourceName(res types.Resource) string {
	u, err := url.Parse(value(res.Source))
	if err != nil {
		return "of an unreadable URL"
	}
	return shown(u)
}

// document gets a small source into memory.
func (f *fetcher) document(ctx context.Context, res types.Resource) ([]byte, error) {
	c, err := f.get(ctx, res, mostDocument, func() *spill { return &spill{most: mostDocument} })
	return c.data, err
}

// content gets a source of a file, into the spool where it is large.
func (f *fetcher) content(ctx context.Context, res types.Resource) (content, error) {
	c, err := f.get(ctx, res, f.left, func() *spill { return &spill{dir: f.spool, most: mostInMemory, none: f.discard} })
	f.left -= c.size
	return c, err
}

// content is what a source had, unpacked and verified: in memory, or in a file of the spool.
type content struct {
	data []byte
	path string
	size int64
}

func (f *fetcher) get(ctx context.Context, res types.Resource, most int64, open func() *spill) (content, error) {
	if value(res.Source) == "" {
		return content{}, nil
	}
	if isData(res) {
		d, err := dataurl.DecodeString(*res.Source)
		if err != nil {
			return content{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return take(bytes.NewReader(d.Data), res, most, open)
	}
	if f.total > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, f.total, fmt.Errorf("it takes longer than timeouts.httpTotal, %s", f.total))
		defer cancel()
	}
	first, pause := time.Now(), firstPause
	for {
		c, err := f.try(ctx, res, most, open)
		var again *passing
		if err == nil || !errors.As(err, &again) {
			return c, err
		}
		if ctx.Err() != nil {
			return content{}, unavailable(fmt.Errorf("%w; last: %w", context.Cause(ctx), again.error))
		}
		if f.total == 0 && time.Since(first)+pause > f.patience {
			return content{}, unavailable(fmt.Errorf("tried for %s: %w", time.Since(first).Round(time.Second), again.error))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, longestPause)
	}
}

func unavailable(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	return hint.With(fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable), "the host fetches it, not the guest: check the URL and that the host reaches it (proxy and tls.ca in config.toml)")
}

// passing is an error that may be gone at the next attempt.
type passing struct{ error }

func (p *passing) Unwrap() error { return p.error }

func (f *fetcher) try(ctx context.Context, res types.Resource, most int64, open func() *spill) (content, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, *res.Source, nil)
	if err != nil {
		return content{}, fmt.Errorf("%w: %w", bare(err), errdefs.ErrInvalidArgument)
	}
	// Servers choose by these what they answer with.
	req.Header.Set("User-Agent", "Ignition/2.27.0 (atoll)")
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("Accept", "application/vnd.coreos.ignition+json;version=3.6.0, */*;q=0.1")
	headers, err := res.HTTPHeaders.Parse()
	if err != nil {
		return content{}, fmt.Errorf("httpHeaders: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for name, values := range headers {
		// As Ignition has it: of several values the last one.
		req.Header.Set(name, values[len(values)-1])
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return content{}, classed(err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 500:
		return content{}, &passing{errors.New(resp.Status)}
	case resp.StatusCode == http.StatusNotFound:
		return content{}, hint.With(fmt.Errorf("%s: %w", resp.Status, errdefs.ErrNotFound), "check the URL")
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent:
		return content{}, hint.With(fmt.Errorf("%s: %w", resp.Status, errdefs.ErrFailedPrecondition), "check the URL, and what the server wants in httpHeaders")
	}
	watch := time.AfterFunc(stall, func() { cancel(fmt.Errorf("nothing came for %s", stall)) })
	defer watch.Stop()
	body := &watchedBody{Reader: resp.Body, alive: func() { watch.Reset(stall); f.alive() }}
	c, err := take(body, res, most, open)
	if body.err != nil && ctx.Err() != nil {
		return content{}, &passing{context.Cause(ctx)}
	}
	if body.err != nil {
		return content{}, &passing{bare(body.err)}
	}
	return c, err
}

// classed tells what may pass from what will not.
func classed(err error) error {
	err = bare(err)
	var unknown *tls.CertificateVerificationError
	if errors.As(err, &unknown) {
		return hint.With(fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition), "name its authority in ignition.security.tls.certificateAuthorities, or in tls.ca of the host's config.toml")
	}
	if errdefs.IsPermissionDenied(err) { // by the guard
		return err
	}
	var dns *net.DNSError
	if errors.As(err, &dns) && dns.IsNotFound {
		return unavailable(err)
	}
	return &passing{err}
}

// bare is an error of net/http without its URL, which may hold what is secret.
func bare(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// watchedBody remembers that reading failed, and says when something came.
type watchedBody struct {
	io.Reader
	alive func()
	err   error
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if n > 0 {
		b.alive()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// take unpacks, bounds, verifies and keeps what r has. The hash is that of the unpacked content (Ignition's specification, verification).
func take(r io.Reader, res types.Resource, most int64, open func() *spill) (_ content, err error) {
	sum, want, err := verification(res.Verification)
	if err != nil {
		return content{}, err
	}
	if value(res.Compression) == "gzip" {
		packed, err := gzip.NewReader(r)
		if err != nil {
			return content{}, noGzip(err)
		}
		r = packed
	}
	to := open()
	defer func() { err = errors.Join(err, to.close(err != nil)) }()
	size, err := io.Copy(io.MultiWriter(to, sum), io.LimitReader(r, most+1))
	switch {
	case to.err != nil:
		return content{}, hint.With(fmt.Errorf("keeping it in %s: %w: %w", to.dir, to.err, errdefs.ErrResourceExhausted), "check the free space there")
	case err != nil:
		return content{}, noGzip(err)
	case size > most:
		return content{}, hint.With(fmt.Errorf("it has more than the %d bytes that are left to this config: %w", most, errdefs.ErrResourceExhausted), "put large data into the image or on a volume")
	}
	if got := hex.EncodeToString(sum.Sum(nil)); want != "" && got != strings.ToLower(want) {
		return content{}, hint.With(fmt.Errorf("its hash is %s, and the config wants %s: %w", got, want, errdefs.ErrDataLoss), "mend verification.hash if the source was changed on purpose")
	}
	return to.content(size), nil
}

func noGzip(err error) error {
	return hint.With(fmt.Errorf("unpacking it: %w: %w", err, errdefs.ErrDataLoss), "compression is for a source that is one whole gzip file")
}

// verification returns what hashes, and the wanted sum; where nothing is wanted, a hash that nobody asks.
func verification(v types.Verification) (hash.Hash, string, error) {
	function, want, err := v.HashParts()
	if err != nil {
		return nil, "", fmt.Errorf("verification.hash: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	switch function {
	case "sha256", "":
		return sha256.New(), want, nil
	case "sha512":
		return sha512.New(), want, nil
	}
	return nil, "", fmt.Errorf("verification.hash: %q is not known: %w", function, errdefs.ErrInvalidArgument)
}

// spill keeps what is written to it in memory, and in a file of dir once it is more than most.
type spill struct {
	dir  string
	most int
	buf  bytes.Buffer
	file *os.File
	none bool // keep nothing
	err  error
}

func (s *spill) Write(p []byte) (n int, err error) {
	switch {
	case s.none:
		return len(p), nil
	case s.file == nil && s.buf.Len()+len(p) <= s.most:
		return s.buf.Write(p)
	case s.file == nil:
		s.err = s.open()
	}
	if s.err == nil {
		n, s.err = s.file.Write(p)
	}
	return n, s.err
}

func (s *spill) open() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	file, err := os.CreateTemp(s.dir, "content-") // 0600
	if err != nil {
		return err
	}
	s.file = file
	_, err = s.file.Write(s.buf.Bytes())
	s.buf = bytes.Buffer{}
	return err
}

func (s *spill) content(size int64) content {
	if s.file != nil {
		return content{path: s.file.Name(), size: size}
	}
	return content{data: s.buf.Bytes(), size: size}
}

func (s *spill) close(discard bool) error {
	if s.file == nil {
		return nil
	}
	err := s.file.Close()
	if discard {
		err = errors.Join(err, os.Remove(s.file.Name()))
	}
	return err
}
