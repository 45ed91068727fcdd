// Package embedded holds the guest's agent, for each architecture that this build of Atoll can run guests of, as `make build`
// put it there. A leaf; safe for concurrent use.
package embedded

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

var identify = sync.OnceValues(func() (string, error) {
	data, err := files.ReadFile(dir + "atoll-agent")
	if err != nil {
		return "", err
	}
	// make writes the digest beside the binary, so that nobody has to compute it at run time.
	if known, err := files.ReadFile(dir + "agent.sha256"); err == nil {
		if id, _, _ := strings.Cut(strings.TrimSpace(string(known)), " "); len(id) == 2*sha256.Size {
			return id, nil
		}
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
})

// Binary returns the agent for an architecture in Go's words, and its SHA-256 in hex.
func Binary(arch string) (agent []byte, id string, err error) {
	if arch != builtFor {
		return nil, "", fmt.Errorf("finding the guest's agent: this build has it for %s only, not for %q: %w", builtFor, arch, errdefs.ErrNotFound)
	}
	id, err = identify()
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("finding the guest's agent: it was not built into this binary: %w", errdefs.ErrNotFound)
		return nil, "", hint.With(err, "build Atoll with: make build")
	}
	if err != nil {
		return nil, "", fmt.Errorf("finding the guest's agent: %w", err)
	}
	agent, err = files.ReadFile(dir + "atoll-agent")
	return agent, id, err
}
