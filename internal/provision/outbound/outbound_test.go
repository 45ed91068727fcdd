package outbound

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

func parse(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestOnlyWhatTheOperatorNamesIsReachedOnLoopback(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if to := r.URL.Query().Get("to"); to != "" {
			http.Redirect(w, r, to, http.StatusFound)
		}
	}))
	defer s.Close()
	g := New()
	g.Allow(parse(t, s.URL))
	g.Allow(parse(t, "http://169.254.169.254/"))
	c := &http.Client{Transport: g.Transport(http.DefaultTransport.(*http.Transport))}
	port := parse(t, other.URL).Port()
	for target, want := range map[string]bool{
		s.URL: true, s.URL + "/?to=/again": true, s.URL + "/?to=" + other.URL: false, s.URL + "/?to=http://169.254.169.254/latest": false,
		other.URL: false, "http://localhost:" + port: false, "http://[::ffff:127.0.0.1]:" + port: false, "http://0.0.0.0:" + port: false,
		"http://169.254.169.254/": false, "http://[fe80::1]/": false, "http://[fd00:ec2::254]/": false, "http://224.0.0.1/": false,
	} {
		resp, err := c.Get(target)
		if err == nil {
			resp.Body.Close()
		}
		if want != (err == nil) || err != nil && (!errdefs.IsPermissionDenied(err) || hint.Of(err) == "") {
			t.Errorf("%s: %v", target, err)
		}
	}
}

func TestANameIsTakenForTheAddressThatItHas(t *testing.T) {
	g := New()
	g.Allow(parse(t, "http://config.example.org/"))
	for at, want := range map[string]bool{"192.0.2.1:80": true, "127.0.0.1:80": false, "[::1]:80": false, "[fe80::1%eth0]:80": false, "169.254.169.254:80": false, "x": false} {
		if err := g.check("config.example.org:80", at); (err == nil) != want {
			t.Errorf("%s: %v", at, err)
		}
	}
}

func TestAProxyIsWhereTheHostsOwnerSays(t *testing.T) {
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked = append(asked, r.URL.String()) }))
	defer proxy.Close()
	base := http.DefaultTransport.(*http.Transport).Clone()
	base.Proxy = http.ProxyURL(parse(t, proxy.URL))
	c := &http.Client{Transport: New().Transport(base)}
	if resp, err := c.Get("http://config.example.org/a"); err != nil {
		t.Error(err)
	} else {
		resp.Body.Close()
	}
	for _, target := range []string{"http://169.254.169.254/", "http://localhost/", proxy.URL} {
		if _, err := c.Get(target); !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", target, err)
		}
	}
	if got := strings.Join(asked, " "); got != "http://config.example.org/a" {
		t.Errorf("the proxy was asked for %s", got)
	}
	// One that a document sets is bound as all else is, unless the operator's own does.
	g := New()
	bound := &http.Client{Transport: g.Bind(base.Clone())}
	if _, err := bound.Get("http://config.example.org/a"); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a proxy of a fetched document: %v", err)
	}
	g.Allow(parse(t, proxy.URL))
	if resp, err := bound.Get("http://config.example.org/a"); err != nil {
		t.Error(err)
	} else {
		resp.Body.Close()
	}
}
