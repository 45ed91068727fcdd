package ignition

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	latest "github.com/coreos/ignition/v2/config/v3_7_experimental"
	"github.com/coreos/ignition/v2/config/v3_7_experimental/types"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/coreos/ignition/v2/config/validate"
)

// mostDocuments bounds how many configs one may consist of, which also ends those that refer to themselves.
const mostDocuments = 64

// renderer makes one config of a document and those that it refers to, as Ignition's own engine does: replace is followed, and what is
// merged comes over what was there. It belongs to one goroutine.
type renderer struct {
	fetch    *fetcher
	offline  bool // configs elsewhere are not requested, and are taken for empty
	warnings []string

	faults    []string
	documents int
	skipped   bool // a config was not requested
	outside   int  // how many of the configs that led here were fetched
}

// whole renders raw and checks what comes out. The faults of all documents are gathered; another error is one of fetching.
func (r *renderer) whole(ctx context.Context, raw []byte) (types.Config, error) {
	config, err := r.parse(raw, "")
	if err != nil {
		return types.Config{}, err
	}
	r.fetch.allow(config)
	if err := r.settings(ctx, config); err != nil {
		return types.Config{}, err
	}
	if config, err = r.render(ctx, config); err != nil {
		return types.Config{}, err
	}
	if len(r.faults) > 0 {
		return types.Config{}, invalid("the config", r.faults)
	}
	if !r.skipped && r.documents > 1 {
		// What is right alone may contradict another: one path as a file here and as a link there.
		if _, faults := sorted(validate.ValidateWithContext(config, nil)); len(faults) > 0 {
			return types.Config{}, invalid("the merged configs", faults)
		}
	}
	return config, nil
}

func (r *renderer) render(ctx context.Context, config types.Config) (types.Config, error) {
	if res := config.Ignition.Config.Replace; res.Source != nil {
		child, err := r.referred(ctx, res)
		if err != nil {
			return types.Config{}, err
		}
		if err := r.settings(ctx, child); err != nil {
			return types.Config{}, err
		}
		return r.renderOf(ctx, res, child)
	}
	merged := config
	for _, res := range config.Ignition.Config.Merge {
		child, err := r.referred(ctx, res)
		if err != nil {
			return types.Config{}, err
		}
		// Its own settings hold while it refers to further ones.
		if err := r.settings(ctx, latest.Merge(merged, child)); err != nil {
			return types.Config{}, err
		}
		if child, err = r.renderOf(ctx, res, child); err != nil {
			return types.Config{}, err
		}
		merged = latest.Merge(merged, child)
	}
	return merged, nil
}

// renderOf renders the config that came from res.
func (r *renderer) renderOf(ctx context.Context, res types.Resource, config types.Config) (types.Config, error) {
	if !isData(res) {
		r.outside++
		defer func() { r.outside-- }()
	}
	return r.render(ctx, config)
}

// referred reads a config that another one names.
func (r *renderer) referred(ctx context.Context, res types.Resource) (types.Config, error) {
	if r.offline && !isData(res) {
		r.skipped = true
		return types.Config{}, nil
	}
	where := "config " + sourceName(res)
	raw, err := r.fetch.document(ctx, res)
	if err != nil {
		return types.Config{}, fmt.Errorf("fetching %s: %w", where, err)
	}
	config, err := r.parse(raw, where+": ")
	if err == nil && isData(res) && r.outside == 0 {
		r.fetch.allow(config)
	}
	return config, err
}

func (r *renderer) parse(raw []byte, where string) (types.Config, error) {
	if r.documents++; r.documents > mostDocuments {
		return types.Config{}, hint.With(fmt.Errorf("the config consists of more than %d configs: %w", mostDocuments, errdefs.ErrInvalidArgument), "look for a config that refers to itself")
	}
	config, warnings, faults := parse(raw)
	for _, w := range warnings {
		r.warnings = append(r.warnings, where+w)
	}
	for _, f := range faults {
		r.faults = append(r.faults, where+f)
	}
	if len(faults) > 0 && !r.offline {
		return types.Config{}, invalid("the config", r.faults) // nothing is requested for a config that will not be applied
	}
	return config, nil
}

// settings makes the requests that follow as config has it.
func (r *renderer) settings(ctx context.Context, config types.Config) error {
	if r.offline {
		return nil
	}
	return r.fetch.configure(ctx, config.Ignition)
}
