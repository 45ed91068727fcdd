package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

// Login asks a registry (host[:port]) whether it takes user and secret. Nothing is stored.
func (s *Store) Login(ctx context.Context, host, user, secret string) error {
	r, err := ref.Parse(host + "/x")
	if err != nil || r.Host() != host {
		return hint.With(fmt.Errorf("registry %q: %w", host, errdefs.ErrInvalidArgument), "write its host and port alone, such as registry.example.com:5000")
	}
	if err := s.login(quiet(ctx), host, user, secret); err != nil {
		if statusOf(err) == http.StatusNotFound {
			return hint.With(fmt.Errorf("logging in to %s: no registry answers there: %w: %w", host, tidy(err), errdefs.ErrNotFound), "check host and port")
		}
		err = s.explain(ctx, err, ref.Ref{Name: host + "/"})
		if errdefs.IsUnauthorized(err) {
			err = hint.With(fmt.Errorf("registry %s refuses this name and password: %w", host, errdefs.ErrUnauthenticated), "some registries want an access token for the password")
		}
		return fmt.Errorf("logging in to %s: %w", host, err)
	}
	return nil
}

func (s *Store) login(ctx context.Context, host, user, secret string) error {
	hosts, err := s.hosts(host, &deadHosts{})
	if err != nil {
		return err
	}
	h := hosts[len(hosts)-1] // the registry itself, no mirror
	auth := docker.NewDockerAuthorizer(docker.WithAuthClient(h.Client), docker.WithAuthCreds(func(string) (string, string, error) { return user, secret, nil }))
	var responses []*http.Response
	for range 2 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Scheme+"://"+h.Host+h.Path+"/", nil)
		if err != nil {
			return err
		}
		req.Header.Set("User-Agent", "atoll")
		if err := auth.Authorize(ctx, req); err != nil {
			return err
		}
		resp, err := h.Client.Do(req)
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16))
		resp.Body.Close()
		switch {
		case resp.StatusCode == http.StatusOK:
			return nil
		case resp.StatusCode != http.StatusUnauthorized || len(responses) > 0:
			return remoteerrors.NewUnexpectedStatusErr(resp)
		}
		responses = append(responses, resp)
		if err := auth.AddResponses(ctx, responses); err != nil {
			if errdefs.IsNotImplemented(err) {
				return errors.Join(docker.ErrInvalidAuthorization, err)
			}
			return err
		}
	}
	return nil
}
