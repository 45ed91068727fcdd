package image

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"
	"unicode"

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

// quiet takes away the library's own logger, which would write to the daemon's stderr.
func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// resolver is made anew for each pull and push, so that a login takes effect at once.
func (s *Store) resolver(tracker docker.StatusTracker) remotes.Resolver {
	// What does not answer the first time is not asked again within one pull: a dead mirror would cost ten seconds for each layer.
	dead := &deadHosts{}
	return docker.NewResolver(docker.ResolverOptions{
		Headers: http.Header{"User-Agent": {"atoll"}},
		Tracker: tracker,
		Hosts:   func(domain string) ([]docker.RegistryHost, error) { return s.hosts(domain, dead) },
	})
}

const (
	pullOnly   = docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityReferrers
	everything = pullOnly | docker.HostCapabilityPush
)

// hosts lists where content of a registry is looked for: its mirrors, then the registry itself.
func (s *Store) hosts(domain string, dead *deadHosts) ([]docker.RegistryHost, error) {
	var all []docker.RegistryHost
	for _, m := range s.registries.of(domain).Mirrors {
		u, err := url.Parse(m)
		if err != nil || u.Host == "" {
			return nil, fmt.Errorf("registry %s: mirror %q is no URL: %w", domain, m, errdefs.ErrInvalidArgument)
		}
		client, err := s.registries.client(u.Host)
		if err != nil {
			return nil, err
		}
		client = &http.Client{Transport: mirrorTransport{client.Transport, dead}}
		all = append(all, s.host(client, u.Host, u.Scheme, path.Join("/", u.Path, "v2"), pullOnly))
	}
	client, err := s.registries.client(domain)
	if err != nil {
		return nil, err
	}
	scheme := "https"
	if plain, err := s.registries.plainHTTP(domain); err != nil {
		return nil, err
	} else if plain {
		scheme = "http"
	}
	address, err := docker.DefaultHost(domain)
	if err != nil {
		return nil, err
	}
	return append(all, s.host(client, address, scheme, "/v2", everything)), nil
}

func (s *Store) host(client *http.Client, address, scheme, path string, can docker.HostCapabilities) docker.RegistryHost {
	auth := docker.NewDockerAuthorizer(docker.WithAuthClient(client), docker.WithAuthCreds(s.credentials), docker.WithAuthHeader(http.Header{"User-Agent": {"atoll"}}))
	return docker.RegistryHost{Client: client, Authorizer: auth, Host: address, Scheme: scheme, Path: path, Capabilities: can}
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
	host = credentialKey(host)
	c, err := credentialStore(file, host).Get(host)
	if err != nil {
		return "", "", fmt.Errorf("reading credentials for %s: %w", host, err)
	}
	if c.IdentityToken != "" {
		return "", c.IdentityToken, nil
	}
	return c.Username, c.Password, nil
}

// credentialKey is what docker login calls a registry.
func credentialKey(host string) string {
	if host == "registry-1.docker.io" || host == "docker.io" {
		return "https://index.docker.io/v1/"
	}
	return host
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

// answer is a registry's refusal on one line: the library's has one for each of the registry's own messages, and every query.
type answer struct {
	cause error
	text  string
}

func (a *answer) Error() string { return a.text }
func (a *answer) Unwrap() error { return a.cause }

// tidy makes the library's error about an answer of a registry readable.
func tidy(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) {
		return err
	}
	target := status.RequestURL
	if u, err := url.Parse(target); err == nil {
		u.RawQuery = ""
		target = u.Redacted()
	}
	text := fmt.Sprintf("%s %s: %s", status.RequestMethod, target, status.Status)
	var body struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	if json.Unmarshal(status.Body, &body) == nil {
		for _, e := range body.Errors {
			text += fmt.Sprintf(" (%s)", cmp.Or(e.Message, e.Code))
		}
	}
	return &answer{err, printable(text)}
}

// printable is a stranger's text, fit for a line of an error.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
	if len(s) > 1000 {
		s = strings.ToValidUTF8(s[:1000], "") + "…"
	}
	return s
}

// explain gives a failure of a registry its class and the next step.
func (s *Store) explain(ctx context.Context, err error, r ref.Ref) error {
	err = tidy(err)
	host, status := r.Host(), statusOf(err)
	login := "log in: atoll login " + host
	var netErr net.Error
	var cert *tls.CertificateVerificationError
	var redirect *url.Error
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
		return hint.With(fmt.Errorf("registry %s speaks plain HTTP: %w: %w", host, err, errdefs.ErrFailedPrecondition),
			"if that is meant: insecure = true under [registry.%q] in ATOLL_HOME/config.toml", host)
	case errors.As(err, &cert):
		return hint.With(fmt.Errorf("registry %s: %w: %w", host, err, errdefs.ErrFailedPrecondition),
			"name the file of its certificate authority: ca under [registry.%q] in ATOLL_HOME/config.toml", host)
	case errors.As(err, &redirect) && strings.Contains(redirect.Error(), "redirect"):
		return hint.With(fmt.Errorf("registry %s: %w: %w", host, err, errdefs.ErrUnavailable), "the registry sends requests in circles: tell who runs it")
	case status >= 500:
		return hint.With(fmt.Errorf("registry %s fails: %w: %w", host, err, errdefs.ErrUnavailable), "try again later")
	case status >= 400:
		return hint.With(fmt.Errorf("registry %s: %w: %w", host, err, errdefs.ErrUnavailable), "check that there is a registry at %s", host)
	case errors.As(err, &netErr), errors.Is(err, io.ErrUnexpectedEOF):
		return hint.With(fmt.Errorf("registry %s: %w: %w", host, err, errdefs.ErrUnavailable), "check that this host reaches %s; a pull goes on where it was interrupted", host)
	}
	return err
}
