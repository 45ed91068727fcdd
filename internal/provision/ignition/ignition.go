// Package ignition turns Ignition configs (specification 3.0.0 to 3.7.0-experimental) and Butane configs into what the guest gets. The
// official library parses, validates, translates and merges; this room fetches what a config refers to, refuses by name what Atoll does
// not implement, and fills a plan. docs/provisioning-ignition.md lists every field. It knows no machines: when a config is applied is
// others' business. Imported by provision, and by cli for Butane's local files. Its functions may be called from several goroutines.
package ignition

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/coreos/ignition/v2/config/v3_7_experimental/types"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// Options are what Apply needs of its surroundings.
type Options struct {
	// Transport makes the requests, with the host's proxy and certificate authorities. Apply works on clones of it. nil: Go's default.
	Transport *http.Transport
	// Spool is the directory for what was fetched, which the plan reads when it is sent. It is made where it is not there (0700); its
	// files are 0600. The caller removes it, also after an error.
	Spool string
	Alive func() // is called when bytes come; nil: nobody asks
}

// mostDocument bounds a config and a bundle of certificates.
const mostDocument = 32 << 20

// Is tells an Ignition or Butane config from other user-data. A config with faults in it is one nevertheless.
func Is(raw []byte) bool { return isIgnition(raw) || IsButane(raw) }

func isIgnition(raw []byte) bool {
	if text := bytes.TrimLeft(raw, " \t\r\n"); !bytes.HasPrefix(text, []byte("{")) || len(text) > mostDocument {
		return false
	}
	var top map[string]json.RawMessage
	if err := json.Unmarshal(raw, &top); err != nil {
		return bytes.Contains(raw, []byte(`"ignition"`))
	}
	_, ok := top["ignition"]
	return ok
}

var (
	variantLine = regexp.MustCompile(`(?m)^["']?variant["']?[ \t]*:`)
	otherHead   = regexp.MustCompile(`^(#cloud-|#!|#include|#upstart-|#part-handler|## template:|(?i:content-type|mime-version):)`)
)

// IsButane tells a Butane config, by its variant, from all else.
func IsButane(raw []byte) bool {
	return len(raw) <= mostDocument && !otherHead.Match(raw) && variantLine.Match(raw)
}

// Check finds every fault that can be found without the network: in the config, in those that it embeds as data, and what is not
// implemented.
func Check(raw []byte) (warnings []string, err error) {
	f := newFetcher(Options{})
	f.discard = true
	r := &renderer{offline: true, fetch: f}
	config, err := r.whole(context.Background(), raw)
	if err != nil {
		return nil, err
	}
	for i, file := range config.Storage.Files {
		// What has to be requested is left for Apply.
		file.Append = slices.DeleteFunc(slices.Clone(file.Append), func(res types.Resource) bool { return !isData(res) })
		if !isData(file.Contents) {
			file.Contents = types.Resource{}
		}
		config.Storage.Files[i] = file
	}
	if _, err := download(context.Background(), f, config); err != nil {
		return nil, err
	}
	return r.warnings, nil
}

// KernelArgs are those that a config adds to the kernel's command line, as far as that can be told without the network; none of one
// that has faults.
func KernelArgs(raw []byte) (args []string) {
	f := newFetcher(Options{})
	f.discard = true
	config, err := (&renderer{offline: true, fetch: f}).whole(context.Background(), raw)
	if err != nil {
		return nil
	}
	for _, a := range config.KernelArguments.ShouldExist {
		args = append(args, string(a))
	}
	return args
}

// Apply fetches what the config refers to and adds what it says to p. After an error p is as before.
func Apply(ctx context.Context, raw []byte, p *plan.Plan, o Options) error {
	f := newFetcher(o)
	defer f.close()
	return applyWith(ctx, f, raw, p)
}

func applyWith(ctx context.Context, f *fetcher, raw []byte, p *plan.Plan) error {
	r := &renderer{fetch: f}
	config, err := r.whole(ctx, raw)
	if err != nil {
		return err
	}
	d, err := download(ctx, f, config)
	if err != nil {
		return err
	}
	d.addTo(p)
	p.Warnings = append(p.Warnings, r.warnings...)
	return nil
}

// invalid is the error for faults that a person mends in the config.
func invalid(what string, faults []string) error {
	err := fmt.Errorf("%s: %w", faults[0], errdefs.ErrInvalidArgument)
	if len(faults) > 1 {
		err = fmt.Errorf("%w: %d faults in %s:\n  %s", errdefs.ErrInvalidArgument, len(faults), what, strings.Join(faults, "\n  "))
	}
	return hint.With(err, "mend the config; docs/provisioning-ignition.md says what each field does here, and what is not implemented")
}
