package metadata

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var web = Document{
	MachineID: "0123456789abcdef0123456789abcdef", InstanceID: "i-0123456789abcdef0", Name: "web", Hostname: "web.example",
	Image: "docker.io/library/nginx:1", Arch: "amd64", CPUs: 2, MemoryBytes: 1 << 30, Created: time.Date(2024, 2, 29, 1, 2, 3, 0, time.UTC), Host: "h1",
	Interfaces: []Interface{{
		MAC: "02:00:00:00:01:02", Network: "default", Address: netip.MustParsePrefix("10.215.1.2/16"),
		Gateway: netip.MustParseAddr("10.215.0.1"), DNS: []netip.Addr{netip.MustParseAddr("10.215.0.1")}, MTU: 1500,
	}},
	PublicKeys: []string{"ssh-ed25519 AAAA one", `ssh-rsa BBBB "two": #2`},
	Labels:     map[string]string{"tier": "front", "a/b": "slash"},
}

func serviceOf(t *testing.T, d Document) *Service {
	t.Helper()
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	s := NewService()
	if err := s.Set(data); err != nil {
		t.Fatal(err)
	}
	return s
}

func ask(s *Service, method, path string, headers ...string) *http.Response {
	r := httptest.NewRequest(method, "http://169.254.169.254"+path, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	data, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestTrees(t *testing.T) {
	d := web
	d.V1 = true
	s := serviceOf(t, d)
	const nic = "/latest/meta-data/network/interfaces/macs/02:00:00:00:01:02/"
	for _, tt := range []struct {
		path, kind, want string // want "": 404
	}{
		{"/", "text/plain", "2009-04-04\n2016-09-02\n2018-09-24\n2021-03-23\nlatest"},
		{"/latest", "text/plain", "dynamic/\nmeta-data/"},
		{"/latest/meta-data", "text/plain", "ami-id\nami-launch-index\nhostname\ninstance-action\ninstance-id\ninstance-life-cycle\ninstance-type\nlocal-hostname\nlocal-ipv4\nmac\nnetwork/\nplacement/\npublic-keys/\ntags/"},
		{"/latest/meta-data/instance-id", "text/plain", "i-0123456789abcdef0"},
		{"/2009-04-04/meta-data/instance-id", "text/plain", "i-0123456789abcdef0"},
		{"/2021-03-23/meta-data/instance-id", "text/plain", "i-0123456789abcdef0"},
		{"/2009-04-05/meta-data/instance-id", "", ""},
		{"/latest/meta-data/instance-id/", "", ""},
		{"/latest/meta-data/nothing", "", ""},
		{"/latest/meta-data/ami-id", "text/plain", "docker.io/library/nginx:1"},
		{"/latest/meta-data/hostname", "text/plain", "web.example"},
		{"/latest/meta-data/local-hostname", "text/plain", "web.example"},
		{"/latest/meta-data/local-ipv4", "text/plain", "10.215.1.2"},
		{"/latest/meta-data/mac", "text/plain", "02:00:00:00:01:02"},
		{"/latest/meta-data/instance-type", "text/plain", "c2-m1024"},
		{"/latest/meta-data/network/interfaces/macs/", "text/plain", "02:00:00:00:01:02/"},
		{nic + "local-ipv4s", "text/plain", "10.215.1.2"},
		{nic + "subnet-ipv4-cidr-block", "text/plain", "10.215.0.0/16"},
		{nic + "device-number", "text/plain", "0"},
		{"/latest/meta-data/placement/", "text/plain", "availability-zone\nhost-id\nregion"},
		{"/latest/meta-data/public-keys/", "text/plain", "0=key0\n1=key1"},
		{"/latest/meta-data/public-keys/1/", "text/plain", "openssh-key"},
		{"/latest/meta-data/public-keys/1/openssh-key", "text/plain", `ssh-rsa BBBB "two": #2`},
		{"/latest/meta-data/public-keys/2/openssh-key", "", ""},
		{"/latest/meta-data/tags/instance/", "text/plain", "tier"},
		{"/latest/user-data", "", ""},
		{"/latest/api/token/", "", ""},
		{"/../latest", "", ""},
		{"/nocloud", "", ""},
		{"/nocloud/", "text/plain", "meta-data\nnetwork-config\nuser-data\nvendor-data\n"},
		{"/nocloud/meta-data", "text/yaml", "instance-id: \"i-0123456789abcdef0\"\nlocal-hostname: \"web.example\"\npublic-keys:\n- \"ssh-ed25519 AAAA one\"\n- \"ssh-rsa BBBB \\\"two\\\": #2\"\n"},
		{"/nocloud/network-config", "text/yaml", "version: 2\nethernets:\n  nic0:\n    match: {macaddress: \"02:00:00:00:01:02\"}\n    dhcp4: true\n"},
		{"/nocloud/secrets", "", ""},
		{"/atoll/v1/name", "application/json", "\"web\"\n"},
		{"/atoll/v1/interfaces/0/address", "application/json", "\"10.215.1.2/16\"\n"},
		{"/atoll/v1/memory_bytes", "application/json", "1073741824\n"},
		{"/atoll/v1/labels", "application/json", "{\n  \"a/b\": \"slash\",\n  \"tier\": \"front\"\n}\n"},
		{"/atoll/v1/interfaces/1", "", ""},
		{"/atoll/v1/name/x", "", ""},
		{"/atoll/v12", "", ""},
		{"/atoll", "", ""},
	} {
		r := ask(s, "GET", tt.path)
		if tt.want == "" {
			if r.StatusCode != http.StatusNotFound {
				t.Errorf("%s: %s", tt.path, r.Status)
			}
			continue
		}
		if kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); r.StatusCode != http.StatusOK || kind != tt.kind {
			t.Errorf("%s: %s, %s", tt.path, r.Status, kind)
		}
		if diff := cmp.Diff(tt.want, body(t, r)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.path, diff)
		}
	}
	if r := ask(s, "HEAD", "/latest/meta-data/instance-id"); r.ContentLength != 19 || body(t, r) != "" || r.StatusCode != http.StatusOK {
		t.Errorf("HEAD: %s, %d bytes", r.Status, r.ContentLength)
	}
	var identity map[string]any
	if err := json.Unmarshal([]byte(body(t, ask(s, "GET", "/latest/dynamic/instance-identity/document"))), &identity); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"accountId": nil, "architecture": "x86_64", "availabilityZone": "atoll", "region": "atoll", "imageId": web.Image,
		"instanceId": web.InstanceID, "instanceType": "c2-m1024", "pendingTime": "2024-02-29T01:02:03Z", "privateIp": "10.215.1.2", "version": "2017-09-30"}
	if diff := cmp.Diff(want, identity); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
	var whole Document
	if err := json.Unmarshal([]byte(body(t, ask(s, "GET", "/atoll/v1/"))), &whole); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(d, whole, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("the whole document (-want +got):\n%s", diff)
	}
}

// A machine without network, keys or labels has the paths that are always there, and no empty directories.
func TestEmpty(t *testing.T) {
	s := serviceOf(t, Document{V1: true, InstanceID: "i-1"})
	for path, want := range map[string]int{
		"/latest/meta-data/instance-id": 200, "/latest/meta-data/public-keys/": 404, "/latest/meta-data/network/": 404, "/latest/meta-data/local-ipv4": 404,
		"/nocloud/network-config": 200, "/nocloud/vendor-data": 200, "/nocloud/user-data": 200, "/atoll/v1": 200, "/atoll/v1/interfaces/0": 404,
	} {
		if r := ask(s, "GET", path); r.StatusCode != want {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
}

func TestAccess(t *testing.T) {
	v2, v1 := web, web
	v1.V1 = true
	seed := web
	seed.NoCloud, seed.UserData, seed.VendorData = true, []byte("#!/bin/sh\n"), []byte("#cloud-config\n")
	services := map[string]*Service{"v2": serviceOf(t, v2), "v1": serviceOf(t, v1), "seed": serviceOf(t, seed)}
	if got := body(t, ask(services["seed"], "GET", "/nocloud/vendor-data")); got != "#cloud-config\n" {
		t.Errorf("vendor-data %q", got)
	}
	token := func(name string) string { return body(t, ask(services[name], "PUT", tokenPath, ttlHeader, "60")) }
	for _, tt := range []struct {
		service, method, path string
		headers               []string
		want                  int
	}{
		{"v2", "GET", "/", nil, 401},
		{"v2", "GET", "/latest/meta-data/", nil, 401},
		{"v2", "GET", "/nowhere", nil, 401},
		{"v2", "GET", "/atoll/v1", nil, 401},
		{"v2", "GET", "/nocloud/meta-data", nil, 401},
		{"v2", "GET", "/latest/meta-data/", []string{tokenHeader, token("v2")}, 200},
		{"v2", "HEAD", "/latest/meta-data/", []string{tokenHeader, token("v2")}, 200},
		{"v2", "GET", "/nowhere", []string{tokenHeader, token("v2")}, 404},
		{"v2", "GET", "/latest/meta-data/", []string{tokenHeader, token("v1")}, 401},
		{"v2", "GET", "/latest/meta-data/", []string{tokenHeader, "x"}, 401},
		{"v2", "GET", "/latest/meta-data/", []string{tokenHeader, token("v2"), "X-Forwarded-For", "10.0.0.1"}, 403},
		{"v2", "PUT", tokenPath, []string{ttlHeader, "60", "X-Forwarded-For", "10.0.0.1"}, 403},
		{"v2", "PUT", tokenPath, []string{ttlHeader, "60", "Forwarded", "for=10.0.0.1"}, 403},
		{"v1", "GET", "/latest/meta-data/", nil, 200},
		{"v1", "GET", "/latest/meta-data/", []string{tokenHeader, "x"}, 401},
		{"v1", "GET", "/latest/meta-data/", []string{"X-Forwarded-For", "10.0.0.1"}, 403},
		{"seed", "GET", "/nocloud/user-data", nil, 200},
		{"seed", "GET", "/latest/user-data", nil, 401},
		{"seed", "GET", "/nocloudy", nil, 401},
		{"seed", "GET", "/nocloud/user-data", []string{tokenHeader, "x"}, 401},
		{"v2", "PUT", tokenPath, nil, 400},
		{"v2", "PUT", tokenPath, []string{ttlHeader, "0"}, 400},
		{"v2", "PUT", tokenPath, []string{ttlHeader, "21601"}, 400},
		{"v2", "PUT", tokenPath, []string{ttlHeader, "1e3"}, 400},
		{"v2", "PUT", tokenPath, []string{ttlHeader, "21600"}, 200},
		{"v2", "GET", tokenPath, nil, 405},
		{"v2", "POST", tokenPath, []string{ttlHeader, "60"}, 405},
		{"v1", "PUT", "/latest/meta-data/instance-id", nil, 405},
		{"v1", "DELETE", "/latest", nil, 405},
	} {
		if r := ask(services[tt.service], tt.method, tt.path, tt.headers...); r.StatusCode != tt.want {
			t.Errorf("%s: %s %s %q: %s, want %d", tt.service, tt.method, tt.path, tt.headers, r.Status, tt.want)
		}
	}
	// A page in the guest's browser whose name was pointed here.
	r := httptest.NewRequest("GET", "http://evil.example/latest/", nil)
	w := httptest.NewRecorder()
	services["v1"].ServeHTTP(w, r)
	if w.Code != http.StatusForbidden {
		t.Errorf("asked by another name: %d", w.Code)
	}
}

func TestTokensEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serviceOf(t, web)
		token := body(t, ask(s, "PUT", tokenPath, ttlHeader, "60"))
		time.Sleep(59 * time.Second)
		if r := ask(s, "GET", "/latest", tokenHeader, token); r.StatusCode != http.StatusOK {
			t.Errorf("after 59 s: %s", r.Status)
		}
		time.Sleep(2 * time.Second)
		if r := ask(s, "GET", "/latest", tokenHeader, token); r.StatusCode != http.StatusUnauthorized {
			t.Errorf("after 61 s: %s", r.Status)
		}
	})
}

func TestSet(t *testing.T) {
	s := serviceOf(t, web)
	if err := s.Set(json.RawMessage(`{"name": 7}`)); err == nil {
		t.Error("a name that is a number was taken")
	}
	if r := ask(s, "GET", "/latest", tokenHeader, s.tokens.issue(time.Minute)); r.StatusCode != http.StatusOK {
		t.Errorf("after a document that was refused: %s", r.Status)
	}
}

func FuzzService(f *testing.F) {
	d := web
	d.V1 = true
	data, err := json.Marshal(d)
	if err != nil {
		f.Fatal(err)
	}
	s := NewService()
	if err := s.Set(data); err != nil {
		f.Fatal(err)
	}
	for _, path := range []string{"/", "//", "/latest/meta-data/", "/nocloud/../", "/atoll/v1/interfaces/-1", "/atoll/v1//", "/latest//"} {
		f.Add(path, "x")
	}
	f.Fuzz(func(t *testing.T, path, token string) {
		r := httptest.NewRequest("GET", "http://169.254.169.254/", nil)
		r.URL.Path = path
		r.Header.Set(tokenHeader, token)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if token != "" && w.Code != http.StatusUnauthorized {
			t.Errorf("%q was taken as a token: %d", token, w.Code)
		}
	})
}
