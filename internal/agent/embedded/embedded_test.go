package embedded

import (
	"testing"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

func TestBinary(t *testing.T) {
	if _, _, err := Binary("mips"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	agent, id, err := Binary(builtFor)
	if err != nil {
		if !errdefs.IsNotFound(err) || hint.Of(err) == "" {
			t.Errorf("not built in, and no hint: %v", err)
		}
		return
	}
	if len(agent) == 0 || len(id) != 64 {
		t.Errorf("agent of %d bytes, id %q", len(agent), id)
	}
}
