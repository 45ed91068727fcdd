// Package client is the Go client of the atoll daemon. It is what the atoll command itself uses: whatever the command can do, a
// program can do with this package.
//
//	c, err := client.New("unix:///var/lib/atoll/atoll.sock")
//	if err != nil {
//		return err
//	}
//	defer c.Close()
//	res, err := c.Machines.List(ctx, connect.NewRequest(&atollv1.ListMachinesRequest{All: true}))
//
// Requests and answers are the generated messages of package api/atoll/v1. Errors have the classes of
// github.com/containerd/errdefs, so that errdefs.IsNotFound(err) holds for a machine that is not there.
package client

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/api/atoll/v1/atollv1connect"
	"github.com/atollvm/atoll/internal/rpcerr"
)

// Client talks to one daemon. It is safe for concurrent use; one stream is not: send from one goroutine and receive from one.
type Client struct {
	Machines atollv1connect.MachineServiceClient
	Images   atollv1connect.ImageServiceClient
	Build    atollv1connect.BuildServiceClient
	Bases    atollv1connect.BaseServiceClient
	Kernels  atollv1connect.KernelServiceClient
	Profiles atollv1connect.ProfileServiceClient
	System   atollv1connect.SystemServiceClient

	transport *http.Transport
}

// New returns a client of the daemon at host, which is unix:// and the absolute path of its socket. It opens no connection: the
// first call does, and Ping tells whether a daemon answers.
func New(host string) (*Client, error) {
	path, err := socketPath(host)
	if err != nil {
		return nil, err
	}
	// HTTP/2 without TLS: Exec and Attach talk both ways at once, which HTTP/1 cannot do.
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	transport := &http.Transport{
		Protocols: &p,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}
	h, errs := &http.Client{Transport: transport}, connect.WithInterceptors(errorMapper{})
	const base = "http://atoll" // the name goes into the Host header only
	return &Client{
		Machines:  atollv1connect.NewMachineServiceClient(h, base, errs),
		Images:    atollv1connect.NewImageServiceClient(h, base, errs),
		Build:     atollv1connect.NewBuildServiceClient(h, base, errs),
		Bases:     atollv1connect.NewBaseServiceClient(h, base, errs),
		Kernels:   atollv1connect.NewKernelServiceClient(h, base, errs),
		Profiles:  atollv1connect.NewProfileServiceClient(h, base, errs),
		System:    atollv1connect.NewSystemServiceClient(h, base, errs),
		transport: transport,
	}, nil
}

func socketPath(host string) (string, error) {
	path, ok := strings.CutPrefix(host, "unix://")
	switch {
	case ok && filepath.IsAbs(path):
		return path, nil
	case ok:
		return "", fmt.Errorf("daemon address %q: the path of the socket must be absolute, as in unix:///run/atoll.sock: %w", host, errdefs.ErrInvalidArgument)
	case strings.HasPrefix(host, "https://"):
		return "", fmt.Errorf("daemon address %q: https is not supported yet: %w", host, errdefs.ErrNotImplemented)
	}
	return "", fmt.Errorf("daemon address %q: want unix:// and a path: %w", host, errdefs.ErrInvalidArgument)
}

// Ping asks the daemon for its version and returns nil when it answers.
func (c *Client) Ping(ctx context.Context) error {
	_, err := c.System.Version(ctx, connect.NewRequest(&atollv1.VersionRequest{}))
	return err
}

// Close lets go of idle connections. Calls that are under way go on.
func (c *Client) Close() error {
	c.transport.CloseIdleConnections()
	return nil
}

// errorMapper gives every error the class, the text and the hint that it had in the daemon.
type errorMapper struct{}

func (errorMapper) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if err != nil {
			return nil, rpcerr.FromConnect(err)
		}
		return res, nil
	}
}

func (errorMapper) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		return errorMappingConn{next(ctx, spec)}
	}
}

func (errorMapper) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

type errorMappingConn struct{ connect.StreamingClientConn }

func (c errorMappingConn) Send(m any) error { return rpcerr.FromConnect(c.StreamingClientConn.Send(m)) }
func (c errorMappingConn) Receive(m any) error {
	return rpcerr.FromConnect(c.StreamingClientConn.Receive(m))
}
func (c errorMappingConn) CloseRequest() error {
	return rpcerr.FromConnect(c.StreamingClientConn.CloseRequest())
}
func (c errorMappingConn) CloseResponse() error {
	return rpcerr.FromConnect(c.StreamingClientConn.CloseResponse())
}

var _ connect.Interceptor = errorMapper{}
