// Package ignition turns Ignition configs (specification 3.0.0 to 3.7.0-experimental) and Butane configs into what the guest gets. The
// official libraries parse, validate, translate and merge; this room fetches what a config refers to, refuses by name what Atoll does not
// implement, and fills a plan. docs/provisioning-ignition.md lists every field. It knows no machines: when a config is applied is
// others' business. Imported by provision, and by cli for Butane's local files. Its functions may be called from several goroutines.
package ignition

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/plan"
)

// Options are what Apply needs of its surroundings.
type Options struct {
	// Transport makes the requests, with the host's proxy and certificate authorities. It is cloned where a config has its own of them.
	// nil: http.DefaultTransport's settings.
	Transport *http.Transport
	// Spool is the directory for what was fetched, which the plan reads when it is sent. It is made where it is not there (0700); its
	// files are 0600. The caller removes it, also after an error.
	Spool string
}

// mostDocument bounds a config, also one that another refers to.
const mostDocument = 32 << 20

// Is tells an Ignition or Butane config from other user-data. A config with faults in it is one nevertheless.
func Is(raw []byte) bool { return isJSON(raw) || IsButane(raw) }

func isJSON(raw []byte) bool {
	text := strings.TrimLeft(string(raw[:min(len(raw), mostDocument)]), " \t\r\n")
	if !strings.HasPrefix(text, "{") {
		return false
	}
	var top map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &top); err != nil {
		return strings.Contains(text, `"ignition"`)
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
	text := raw[:min(len(raw), mostDocument)]
	return !otherHead.Match(text) && variantLine.Match(text)
}

// Check finds every fault that can be found without the network: in the config, in those that it embeds as data, and what is not
// implemented.
func Check(raw []byte) (warnings []string, err error) {
	return nil, nil
}

// Apply fetches what the config refers to and adds what it says to p. After an error p is as before.
func Apply(ctx context.Context, raw []byte, p *plan.Plan, o Options) error {
	return nil
}

// invalid is the error for faults that a person mends in the config.
func invalid(what string, faults []string) error {
	return hint.With(fmt.Errorf("%s:\n  %s: %w", what, strings.Join(faults, "\n  "), errdefs.ErrInvalidArgument),
		"mend the config; docs/provisioning-ignition.md lists what is implemented")
}
