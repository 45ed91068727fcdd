//go:build linux

package build

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
)

// CacheRecord is one piece of the build cache.
type CacheRecord struct {
	ID          string
	Type        string // regular, source.local, exec.cachemount, …
	Description string
	Size        int64
	InUse       bool
	Shared      bool // its bytes are in the image store, too, or in another record
	CreatedAt   time.Time
	LastUsedAt  time.Time // zero: never
}

// PruneOptions say what Prune removes. The zero value: the layers, contexts and cache mounts that no running build uses.
type PruneOptions struct {
	All       bool          // BuildKit's own records, too
	UnusedFor time.Duration // only what was not used for so long
	Keep      int64         // leave so many bytes
}

// neverBuilt tells whether there is no cache: then no builder, which needs root, has to be started to look into it.
func (b *Builder) neverBuilt() bool {
	_, err := os.Stat(filepath.Join(b.o.Dir, child.CacheFile))
	return errors.Is(err, fs.ErrNotExist)
}

// rested returns a child that holds nothing of builds that are over.
func (b *Builder) rested(ctx context.Context) (*process, error) {
	if err := b.letGo(); err != nil {
		return nil, err
	}
	return b.process(ctx)
}

// Usage lists the build cache, the largest first.
func (b *Builder) Usage(ctx context.Context) ([]CacheRecord, error) {
	if b.neverBuilt() {
		return nil, nil
	}
	p, err := b.rested(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the build cache: %w", err)
	}
	infos, err := p.client.DiskUsage(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the build cache: %w", err)
	}
	var records []CacheRecord
	for _, i := range infos {
		records = append(records, record(*i))
	}
	slices.SortStableFunc(records, func(x, y CacheRecord) int { return cmp.Compare(y.Size, x.Size) })
	return records, nil
}

// Prune removes parts of the build cache and returns them. What a running build uses stays.
func (b *Builder) Prune(ctx context.Context, o PruneOptions) ([]CacheRecord, error) {
	if o.UnusedFor < 0 || o.Keep < 0 {
		return nil, fmt.Errorf("pruning the build cache: a negative time or size: %w", errdefs.ErrInvalidArgument)
	}
	if b.neverBuilt() {
		return nil, nil
	}
	p, err := b.rested(ctx)
	if err != nil {
		return nil, fmt.Errorf("pruning the build cache: %w", err)
	}
	removed := make(chan client.UsageInfo)
	var records []CacheRecord
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range removed {
			records = append(records, record(i))
		}
	}()
	options := []client.PruneOption{client.WithKeepOpt(o.UnusedFor, 0, o.Keep, 0)}
	if o.All {
		options = append(options, client.PruneAll)
	}
	err = p.client.Prune(ctx, removed, options...)
	close(removed)
	<-done
	if err != nil {
		return nil, fmt.Errorf("pruning the build cache: %w", err)
	}
	return records, nil
}

func record(i client.UsageInfo) CacheRecord {
	r := CacheRecord{
		ID: i.ID, Type: string(i.RecordType), Description: i.Description, Size: i.Size, InUse: i.InUse, Shared: i.Shared, CreatedAt: i.CreatedAt,
	}
	if i.LastUsedAt != nil {
		r.LastUsedAt = *i.LastUsedAt
	}
	return r
}
