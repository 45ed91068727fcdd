package ignition

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/ignition/v2/tests/register"
	_ "github.com/coreos/ignition/v2/tests/registry"
	"github.com/coreos/ignition/v2/tests/servers"
	"github.com/coreos/ignition/v2/tests/types"
	"golang.org/x/sync/errgroup"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/provision"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// Ignition's own black-box cases, at every version that they are registered for: the config goes through Check and Apply, what comes out
// through the agent's code onto a directory with the tree that the case begins with, and the result is compared with the tree that it
// ends with. What the case says of disks is none of ours: a config that asks for them has to be refused by name.
func TestBlackBox(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("files of other owners need root")
	}
	web := suiteServers(t)
	var mu sync.Mutex
	count := map[string]int{}
	var g errgroup.Group
	g.SetLimit(128) // they sleep more than they compute
	for kind, tests := range register.Tests {
		for _, test := range tests {
			g.Go(func() error {
				what, err := blackBox(t, kind, test, web)
				mu.Lock()
				defer mu.Unlock()
				count[what]++
				if err != nil {
					t.Errorf("%s: %v", test.Name, err)
				}
				return nil
			})
		}
	}
	g.Wait()
	t.Logf("of %d cases: %v", len(register.Tests[register.PositiveTest])+len(register.Tests[register.NegativeTest]), count)
	// A case more or less comes with another version of Ignition only.
	if want := map[string]int{"passed": 839, "refused": 484, "skipped": 76, "stricter": 6}; !maps.Equal(count, want) {
		t.Errorf("counted %v, want %v", count, want)
	}
}

const suiteAddress = "127.0.0.1:8080"

// suiteServers serves what the suite's own server does, wherever a free port is. Requests to the suite's port are led there.
func suiteServers(t *testing.T) *http.Transport {
	suite := &servers.HTTPServer{}
	mux := http.NewServeMux()
	for path, h := range map[string]http.HandlerFunc{
		"/contents": suite.Contents, "/contents_compressed": suite.ContentsCompressed, "/contents_headers": suite.ContentsHeaders,
		"/contents_headers_redirect": suite.ContentsRedirect, "/contents_headers_redirected": suite.ContentsRedirected, "/contents_headers_overwrite": suite.ContentsHeadersOverwrite,
		"/certificates": suite.Certificates, "/certificates_compressed": suite.CertificatesCompressed, "/certificates_headers": suite.CertificatesHeaders,
		"/certificates_headers_redirect": suite.CertificatesRedirect, "/certificates_headers_redirected": suite.CertificatesRedirected, "/certificates_headers_overwrite": suite.CertificatesHeadersOverwrite,
		"/config": suite.Config, "/config_compressed": suite.ConfigCompressed, "/config_headers": suite.ConfigHeaders,
		"/config_headers_redirect": suite.ConfigRedirect, "/config_headers_redirected": suite.ConfigRedirected, "/config_headers_overwrite": suite.ConfigHeadersOverwrite,
		"/caBundle": suite.CABundle,
	} {
		mux.HandleFunc(path, h)
	}
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	web := http.DefaultTransport.(*http.Transport).Clone()
	web.Proxy = func(r *http.Request) (*url.URL, error) {
		if r.URL.Host == suiteAddress {
			return url.Parse(s.URL)
		}
		return nil, nil
	}
	return web
}

// skips are the cases that are about what Atoll has not, by the beginning of their names.
var skips = map[string]string{
	"cmdline.":       "Ignition's URL of a config on the kernel's command line",
	"merge.multiple": "configs of the distribution, in Ignition's initramfs",
	"multidir.":      "configs of the distribution, in Ignition's initramfs",
	"preemption.":    "which of several places in Ignition's initramfs a config comes from",
	"general.empty":  "no config at all: nobody calls this room",
}

// differences are what the suite expects of its own stand-ins for useradd and groupadd, and Atoll does as the real ones do.
var differences = []struct{ file, theirs, ours, because string }{
	{"passwd", "test:x:1000:1000::/home/test:/bin/bash", "test:x:1000:1000::/home/test:/bin/sh", "the case's root has no bash"},
	{"passwd", "jenkins:x:1020:1001::/home/jenkins:/bin/bash", "jenkins:x:1020:1020::/home/jenkins:/bin/sh", "a user's group has the user's number where that is free"},
	{"group", "jenkins:x:1001:", "jenkins:x:1020:", "a user's group has the user's number where that is free"},
	{"group", "systemgroup:x:201:", "systemgroup:x:149:", "system groups are numbered downwards"},
	{"shadow", ":17331:0:99999", fmt.Sprintf(":%d:0:99999", time.Now().Unix()/86400), "the day on which a password was set"},
}

// stricter are cases that succeed with the suite's stand-ins only, and what they fail with here, by the beginning of their names.
var stricter = map[string]string{
	"groups.delete": "it is the primary group of the user", // groupdel(8) refuses that too, with exit code 8
}

func blackBox(t *testing.T, kind register.TestType, test types.Test, web *http.Transport) (string, error) {
	for beginning := range skips {
		if strings.HasPrefix(test.Name, beginning) {
			return "skipped", nil
		}
	}
	if err := test.ReplaceAllUUIDVars(); err != nil {
		return "failed", err
	}
	raw := []byte(test.Config)
	if strings.Contains(test.Name, "noproxy") { // then web's proxy, which leads to the suite's servers, is not asked
		to, err := web.Proxy(&http.Request{URL: &url.URL{Host: suiteAddress}})
		if err != nil {
			return "failed", err
		}
		raw = bytes.ReplaceAll(raw, []byte(suiteAddress), []byte(to.Host))
	}
	if fields := unimplemented(raw); len(fields) > 0 {
		_, err := Check(raw)
		for _, f := range fields {
			if err == nil || !strings.Contains(err.Error(), f) {
				return "failed", fmt.Errorf("the refusal is %v, without %q", err, f)
			}
		}
		p := plan.New()
		if err := Apply(context.Background(), raw, p, Options{Transport: web, Spool: t.TempDir()}); err == nil || len(p.GetFiles()) > 0 {
			return "failed", fmt.Errorf("applied nevertheless: %v", err)
		}
		return "refused", nil
	}
	err := apply(t, test, raw, web)
	for beginning, want := range stricter {
		if strings.HasPrefix(test.Name, beginning) && err != nil && strings.Contains(err.Error(), want) {
			return "stricter", nil
		}
	}
	switch {
	case kind == register.NegativeTest && err == nil:
		return "failed", errors.New("nothing failed")
	case kind == register.PositiveTest && err != nil:
		return "failed", err
	}
	return "passed", nil
}

// unimplemented finds in a config, by itself, what documents say is refused.
func unimplemented(raw []byte) []string {
	var c struct {
		Storage map[string][]json.RawMessage `json:"storage"`
	}
	json.Unmarshal(raw, &c)
	var found []string
	for _, field := range []string{"disks", "raid", "luks", "filesystems"} {
		if len(c.Storage[field]) > 0 {
			found = append(found, "storage."+field+" is not implemented")
		}
	}
	for _, m := range regexp.MustCompile(`"source": *"(tftp|s3|gs|arn):`).FindAllSubmatch(raw, -1) {
		found = append(found, fmt.Sprintf("scheme %s is not implemented", m[1]))
	}
	return found
}

func apply(t *testing.T, test types.Test, raw []byte, web *http.Transport) error {
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	if err := build(root, part(test.In), test.Config); err != nil {
		return fmt.Errorf("building the tree: %w", err)
	}
	if _, err := Check(raw); err != nil {
		return err
	}
	p := plan.New()
	if err := Apply(context.Background(), raw, p, Options{Transport: web, Spool: filepath.Join(root, "..", filepath.Base(root)+"-spool")}); err != nil {
		return err
	}
	p.First = true
	var stream bytes.Buffer
	for _, c := range p.Contents() {
		if err := send(&stream, c); err != nil {
			return err
		}
	}
	if err := provision.Apply(p.Provision, provision.Options{Root: root, Contents: &stream}); err != nil {
		return err
	}
	return compare(root, part(test.Out))
}

func send(w io.Writer, c plan.Content) error {
	r, err := c.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	return transport.WriteMsg(w, &agentv1.Content{Data: data, End: true})
}

func part(disks []types.Disk) *types.Partition {
	for _, d := range disks {
		for _, p := range d.Partitions {
			if p.Label == "ROOT" {
				return p
			}
		}
	}
	return &types.Partition{}
}

func build(root string, p *types.Partition, config string) error {
	for _, d := range p.Directories {
		if err := os.MkdirAll(filepath.Join(root, d.Directory), 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(root, d.Directory, d.Name), os.FileMode(d.Mode)); err != nil {
			return err
		}
	}
	for _, f := range p.Files {
		path := filepath.Join(root, f.Directory, f.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(f.Contents), os.FileMode(f.Mode)); err != nil {
			return err
		}
		if err := os.Chown(path, f.User, f.Group); err != nil {
			return err
		}
	}
	for _, l := range p.Links {
		path := filepath.Join(root, l.Directory, l.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		link := os.Symlink
		target := l.Target
		if l.Hard {
			link, target = os.Link, filepath.Join(root, l.Target)
		}
		if err := link(target, path); err != nil {
			return err
		}
	}
	// What the suite puts beside the case's files, and what makes a root one with systemd to us.
	dirs := []string{}
	if strings.Contains(config, "passwd") {
		dirs = []string{"home", "usr/bin", "usr/sbin", "usr/lib64", "etc"}
	}
	if strings.Contains(config, `"systemd"`) {
		dirs = append(dirs, "usr/lib/systemd/systemd")
	}
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func compare(root string, p *types.Partition) error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	check := func(n types.Node, kind uint32, mode int) string {
		path := filepath.Join(root, n.Directory, n.Name)
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			fault("%s: %w", path, err)
			return path
		}
		if kind != 0 && st.Mode&syscall.S_IFMT != kind {
			fault("%s has the mode %o", path, st.Mode)
		}
		if mode != 0 && st.Mode&0o7777 != uint32(mode)&0o7777 {
			fault("%s has the mode %o, want %o", path, st.Mode&0o7777, mode)
		}
		if st.Uid != uint32(n.User) || st.Gid != uint32(n.Group) {
			fault("%s is %d:%d's, want %d:%d", path, st.Uid, st.Gid, n.User, n.Group)
		}
		return path
	}
	for _, f := range p.Files {
		for _, d := range differences {
			if f.Name == d.file {
				f.Contents = strings.ReplaceAll(f.Contents, d.theirs, d.ours)
			}
		}
		// Ignition is built for the one or the other. Few distributions' sshd reads authorized_keys.d.
		if dir, ok := strings.CutSuffix(f.Directory, "/authorized_keys.d"); ok {
			f.Directory, f.Name = dir, "authorized_keys"
		}
		path := check(f.Node, 0, f.Mode)
		got, err := os.ReadFile(path)
		if f.Contents != "" && (err != nil || string(got) != f.Contents) {
			fault("%s has %q, want %q", path, got, f.Contents)
		}
	}
	for _, d := range p.Directories {
		check(d.Node, syscall.S_IFDIR, d.Mode)
	}
	for _, l := range p.Links {
		if l.Hard {
			a, errA := os.Lstat(filepath.Join(root, l.Directory, l.Name))
			b, errB := os.Lstat(filepath.Join(root, l.Target))
			if errA != nil || errB != nil || !os.SameFile(a, b) {
				fault("%s is no link to %s", l.Name, l.Target)
			}
			check(l.Node, 0, 0)
			continue
		}
		path := check(l.Node, syscall.S_IFLNK, 0)
		if got, err := os.Readlink(path); err != nil || got != l.Target {
			fault("%s leads to %q, %v, want %q", path, got, err, l.Target)
		}
	}
	for _, n := range p.RemovedNodes {
		if _, err := os.Lstat(filepath.Join(root, n.Directory, n.Name)); !errors.Is(err, os.ErrNotExist) {
			fault("%s/%s is still there", n.Directory, n.Name)
		}
	}
	return errors.Join(faults...)
}
