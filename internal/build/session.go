//go:build linux

package build

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/moby/buildkit/session/auth"
	"github.com/moby/buildkit/session/sshforward"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
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

// Dial opens a connection to an SSH agent.
type Dial func(context.Context) (io.ReadWriteCloser, error)

// agents carries the connections of RUN --mount=type=ssh, and of git over SSH, to their agents, by ID.
type agents map[string]Dial

func (a agents) Register(s *grpc.Server) { sshforward.RegisterSSHServer(s, a) }

func (a agents) find(id string) (Dial, error) {
	if id == "" {
		id = sshforward.DefaultID
	}
	dial, ok := a[id]
	if !ok {
		return nil, fmt.Errorf("SSH agent %q: %w", id, errdefs.ErrNotFound)
	}
	return dial, nil
}

func (a agents) CheckAgent(_ context.Context, r *sshforward.CheckAgentRequest) (*sshforward.CheckAgentResponse, error) {
	_, err := a.find(r.ID)
	return &sshforward.CheckAgentResponse{}, err
}

func (a agents) ForwardAgent(stream sshforward.SSH_ForwardAgentServer) error {
	var id string
	if md, ok := metadata.FromIncomingContext(stream.Context()); ok {
		if v := md[sshforward.KeySSHID]; len(v) > 0 {
			id = v[0]
		}
	}
	dial, err := a.find(id)
	if err != nil {
		return err
	}
	conn, err := dial(stream.Context())
	if err != nil {
		return err
	}
	return sshforward.Copy(stream.Context(), conn, stream, nil)
}
