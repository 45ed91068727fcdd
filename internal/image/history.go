package image

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"
)

// Step is one step of an image's making.
type Step struct {
	ID        digest.Digest // of the image, at the last step; the others have none
	Layer     digest.Digest // what it made; "": nothing but configuration
	Created   time.Time
	CreatedBy string
	Comment   string
	Size      int64 // of the layer as it is kept, compressed
}

// History returns the steps of an image's making, the last one first. Layers that the image's own history does not tell of come with
// no words.
func (s *Store) History(ctx context.Context, name string) (Image, []Step, error) {
	img, err := s.Resolve(ctx, name, "")
	if err != nil {
		return Image{}, nil, err
	}
	layers := img.Layers
	var steps []Step
	for _, h := range img.Config.History {
		st := Step{CreatedBy: h.CreatedBy, Comment: h.Comment}
		if h.Created != nil {
			st.Created = *h.Created
		}
		if !h.EmptyLayer && len(layers) > 0 {
			st.Layer, st.Size = layers[0].Digest, layers[0].Size
			layers = layers[1:]
		}
		steps = append([]Step{st}, steps...)
	}
	for _, l := range layers {
		steps = append([]Step{{Layer: l.Digest, Size: l.Size, Created: img.Created}}, steps...)
	}
	if len(steps) > 0 {
		steps[0].ID = img.Digest
	}
	return img, steps, nil
}
