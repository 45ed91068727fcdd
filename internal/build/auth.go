//go:build linux

package build

import (
	"context"
	"fmt"
	"sync"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/moby/buildkit/session/auth"
	"google.golang.org/grpc"
)

// credentials answers the child's questions for registry passwords from Docker's credential files. The child itself fetches tokens
// with them.
type credentials struct {
	auth.UnimplementedAuthServer

	mu   sync.Mutex // one credential helper at a time
	file *configfile.ConfigFile
}

func (c *credentials) Register(s *grpc.Server) { auth.RegisterAuthServer(s, c) }

func (c *credentials) Credentials(_ context.Context, r *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	key := r.Host
	if key == "registry-1.docker.io" {
		key = "https://index.docker.io/v1/" // Docker Hub's name in these files
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.file.GetAuthConfig(key)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", r.Host, err)
	}
	if a.IdentityToken != "" {
		return &auth.CredentialsResponse{Secret: a.IdentityToken}, nil
	}
	return &auth.CredentialsResponse{Username: a.Username, Secret: a.Password}, nil
}
