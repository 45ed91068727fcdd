package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/credentials"
	"github.com/sirupsen/logrus"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/ref"
)

const (
	dialTimeout  = 10 * time.Second
	stallTimeout = time.Minute // without one byte from the registry
)

// newClient returns the HTTP client for all registries.
func newClient() *http.Client {
	t := docker.DefaultHTTPTransport(nil)
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return stallingConn{c}, nil
	}
	return &http.Client{Transport: t}
}

// stallingConn fails a read that gets nothing for long, else a dead registry would hold a pull for ever.
type stallingConn struct{ net.Conn }

func (c stallingConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(stallTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

// quiet takes away the library's own logger, which would write to the daemon's stderr.
func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// resolver is made anew for each pull, so that a login takes effect at once.
func (s *Store) resolver() remotes.Resolver {
	auth := docker.NewDockerAuthorizer(docker.WithAuthClient(s.client), docker.WithAuthCreds(s.credentials))
	return docker.NewResolver(docker.ResolverOptions{
		Headers: http.Header{"User-Agent": {"atoll"}},
		Hosts: docker.ConfigureDefaultRegistries(
			docker.WithClient(s.client), docker.WithAuthorizer(auth), docker.WithPlainHTTP(s.plainHTTP)),
	})
}

func (s *Store) plainHTTP(host string) (bool, error) {
	if slices.Contains(s.insecure, host) {
		return true, nil
	}
	return docker.MatchLocalhost(host)
}

// credentials returns user and secret for a registry from Docker's configuration: a file, or a credential helper.
func (s *Store) credentials(host string) (string, string, error) {
	if s.dockerConfigDir == "" {
		return "", "", nil
	}
	file, err := config.Load(s.dockerConfigDir)
	if err != nil {
		return "", "", err
	}
	if host == "registry-1.docker.io" {
		host = "https://index.docker.io/v1/" // the key that docker login writes
	}
	c, err := credentialStore(file, host).Get(host)
	if err != nil {
		return "", "", fmt.Errorf("reading credentials for %s: %w", host, err)
	}
	if c.IdentityToken != "" {
		return "", c.IdentityToken, nil
	}
	return c.Username, c.Password, nil
}

// credentialStore does what the file's own GetCredentialsStore does, but reads no environment and prints nothing.
func credentialStore(file *configfile.ConfigFile, host string) credentials.Store {
	helper := file.CredentialsStore
	if h, ok := file.CredentialHelpers[host]; ok {
		helper = h
	}
	if helper != "" {
		return credentials.NewNativeStore(file, helper)
	}
	return credentials.NewFileStore(file)
}

func statusOf(err error) int {
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		return status.StatusCode
	}
	return 0
}

func timedOut(err error) bool {
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return false // ten seconds were enough
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// explain gives a failure of a registry its class and the next step.
func (s *Store) explain(ctx context.Context, err error, r ref.Ref) error {
	host, status := r.Host(), statusOf(err)
	login := fmt.Sprintf("log in (docker login %s), or put the credentials into %s", host, filepath.Join(s.dockerConfigDir, config.ConfigFileName))
	var netErr net.Error
	var cert *tls.CertificateVerificationError
	switch {
	case ctx.Err() != nil, hint.Of(err) != "": // not by errors.Is: a dial that timed out also is a context.DeadlineExceeded
		return err
	case errors.Is(err, docker.ErrInvalidAuthorization), status == http.StatusUnauthorized:
		return hint.With(fmt.Errorf("registry %s: there is no such image, or it needs other credentials: %w: %w", host, err, errdefs.ErrUnauthenticated), "%s", login)
	case status == http.StatusForbidden:
		return hint.With(fmt.Errorf("registry %s refuses access: %w: %w", host, err, errdefs.ErrPermissionDenied), "%s", login)
	case status == http.StatusTooManyRequests:
		return hint.With(fmt.Errorf("registry %s: too many requests: %w: %w", host, err, errdefs.ErrUnavailable), "wait, or %s", login)
	// The library has no error of its own for this one and gives it the class of a missing image.
	case strings.Contains(err.Error(), "rejecting") && strings.Contains(err.Error(), "byte manifest"):
		return fmt.Errorf("registry %s: manifest too large: %s: %w", host, err, errdefs.ErrInvalidArgument)
	case errdefs.IsNotImplemented(err) && strings.Contains(err.Error(), "manifest.v1"):
		return errSchema1
	case errdefs.IsNotFound(err):
		return hint.With(fmt.Errorf("registry %s has no such image (manifest unknown): %w", host, err), "check name and tag of %s", r.Familiar())
	case errors.Is(err, http.ErrSchemeMismatch):
		return hint.With(fmt.Errorf("registry %s speaks plain HTTP: %w: %w", host, err, errdefs.ErrFailedPrecondition), "add %s to the insecure registries", host)
	case errors.As(err, &cert):
		return hint.With(fmt.Errorf("registry %s: %w: %w", host, err, errdefs.ErrFailedPrecondition), "install the certificate authority of %s on this host", host)
	case status >= 500:
		return hint.With(fmt.Errorf("registry %s fails: %w: %w", host, err, errdefs.ErrUnavailable), "try again later")
	case errors.As(err, &netErr), errors.Is(err, io.ErrUnexpectedEOF):
		return hint.With(fmt.Errorf("registry %s: %w: %w", host, err, errdefs.ErrUnavailable), "check that this host reaches %s; a pull goes on where it was interrupted", host)
	}
	return err
}
