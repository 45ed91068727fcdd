package user

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
)

// The control protocol, JSON over HTTP on a unix socket that only the owner may open:
//
//	PUT    /v1/endpoints/{id}  network.Endpoint → network.Attachment, or 422 with a fault
//	DELETE /v1/endpoints/{id}
//	GET    /v1/endpoints       → the IDs
//	GET    /v1/watch           stays open as long as the helper lives and the driver cares
//	POST   /v1/shutdown        ends the helper if it has no endpoints
//
// Helpers outlive upgrades of the daemon, so fields and calls are only ever added.

// fault is an error on the wire. errhttp does not serve here: it has no status for "already exists".
type fault struct {
	Message string
	Class   string
	Hint    string
}

// classes are the ones that a helper's errors can have.
var classes = []error{errdefs.ErrAlreadyExists, errdefs.ErrFailedPrecondition, errdefs.ErrPermissionDenied, errdefs.ErrInvalidArgument}

func writeFault(w http.ResponseWriter, err error) {
	f := fault{Message: err.Error(), Hint: hint.Of(err)}
	for _, class := range classes {
		if errors.Is(err, class) {
			f.Class = class.Error()
		}
	}
	w.WriteHeader(http.StatusUnprocessableEntity)
	json.NewEncoder(w).Encode(f)
}

// error is the fault as it was on the other side.
func (f fault) error() error {
	err := errors.New(f.Message)
	for _, class := range classes {
		if f.Class == class.Error() { // its words end the message
			err = fmt.Errorf("%s: %w", strings.TrimSuffix(f.Message, ": "+f.Class), class)
		}
	}
	if f.Hint != "" {
		err = hint.With(err, "%s", f.Hint)
	}
	return err
}

// errNoHelper means that nobody serves the control socket.
var errNoHelper = errors.New("network helper is not running")

type client struct{ http *http.Client }

func newClient(socket string) *client {
	return &client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
}

func (c *client) close() { c.http.CloseIdleConnections() }

func (c *client) attach(ctx context.Context, e network.Endpoint) (network.Attachment, error) {
	var a network.Attachment
	return a, c.call(ctx, http.MethodPut, "endpoints/"+url.PathEscape(e.ID), e, &a)
}

func (c *client) detach(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "endpoints/"+url.PathEscape(id), nil, nil)
}

func (c *client) list(ctx context.Context) ([]string, error) {
	var ids []string
	return ids, c.call(ctx, http.MethodGet, "endpoints", nil, &ids)
}

func (c *client) shutdown(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "shutdown", nil, nil)
}

// watch returns a stream that ends with the helper.
func (c *client) watch(ctx context.Context) (io.ReadCloser, error) {
	return c.open(context.WithoutCancel(ctx), http.MethodGet, "watch", nil)
}

func (c *client) call(ctx context.Context, method, path string, in, out any) error {
	body, err := c.open(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("reading the network helper's answer: %w", err)
	}
	return nil
}

func (c *client) open(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	data, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://helper/v1/"+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF): // it has just ended
		return nil, errNoHelper
	case err != nil:
		return nil, fmt.Errorf("asking the network helper: %w", err)
	case resp.StatusCode < 300:
		return resp.Body, nil
	}
	defer resp.Body.Close()
	var f fault
	if err := json.NewDecoder(resp.Body).Decode(&f); err != nil {
		return nil, fmt.Errorf("asking the network helper: %s", resp.Status)
	}
	return nil, f.error()
}
