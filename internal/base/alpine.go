package base

import (
	"context"
)

type alpine struct{}

func (alpine) plan(ctx context.Context, b *Builder, base Base, o Options, progress func(string)) (*plan, error) {
	return nil, nil
}
