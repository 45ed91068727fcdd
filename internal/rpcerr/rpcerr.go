// Package rpcerr carries errors over Connect: their class as a code, their text unchanged, and their hint as a detail.
// The server calls ToConnect at its door and the client calls FromConnect at its own; no other room sees a *connect.Error.
// A leaf; safe for concurrent use.
package rpcerr

import (
	"context"
	"errors"
	"io"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/hint"
)

// classes pairs each class with its code. Where two share a code the first is what comes out on the other side.
var classes = []struct {
	class error
	code  connect.Code
}{
	{errdefs.ErrNotFound, connect.CodeNotFound},
	{errdefs.ErrAlreadyExists, connect.CodeAlreadyExists},
	{errdefs.ErrInvalidArgument, connect.CodeInvalidArgument},
	{errdefs.ErrFailedPrecondition, connect.CodeFailedPrecondition},
	{errdefs.ErrUnavailable, connect.CodeUnavailable},
	{errdefs.ErrPermissionDenied, connect.CodePermissionDenied},
	{errdefs.ErrResourceExhausted, connect.CodeResourceExhausted},
	{errdefs.ErrConflict, connect.CodeAborted},
	{errdefs.ErrAborted, connect.CodeAborted},
	{errdefs.ErrNotImplemented, connect.CodeUnimplemented},
	{errdefs.ErrOutOfRange, connect.CodeOutOfRange},
	{errdefs.ErrDataLoss, connect.CodeDataLoss},
	{errdefs.ErrUnauthenticated, connect.CodeUnauthenticated},
	{context.Canceled, connect.CodeCanceled},
	{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
	{errdefs.ErrInternal, connect.CodeInternal},
}

// ToConnect returns err as a handler should return it. An error without a class is CodeInternal; nil stays nil, and so does
// what is a *connect.Error already.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	if ce := (*connect.Error)(nil); errors.As(err, &ce) {
		return err
	}
	code := connect.CodeInternal
	resolved := errdefs.Resolve(err)
	for _, c := range classes {
		if errors.Is(resolved, c.class) {
			code = c.code
			break
		}
	}
	ce := connect.NewError(code, err)
	if text := hint.Of(err); text != "" {
		if d, err := connect.NewErrorDetail(&atollv1.Hint{Text: text}); err == nil {
			ce.AddDetail(d)
		}
	}
	return ce
}

// FromConnect returns what the server gave to ToConnect, as far as the wire carries it: the text, the class and the hint.
// Errors that did not come from Connect, such as a stream's io.EOF, pass unchanged.
func FromConnect(err error) error {
	ce := (*connect.Error)(nil)
	if !errors.As(err, &ce) || errors.Is(err, io.EOF) {
		return err
	}
	w := &wireError{text: ce.Message(), class: errdefs.ErrUnknown, cause: err}
	for _, c := range classes {
		if ce.Code() == c.code {
			w.class = c.class
			break
		}
	}
	for _, d := range ce.Details() {
		if v, err := d.Value(); err == nil {
			if h, ok := v.(*atollv1.Hint); ok {
				return hint.With(w, "%s", h.GetText())
			}
		}
	}
	return w
}

// wireError has the text of the far side's error, and its class. The cause stays in the chain for what only this side can know,
// such as a socket that is not there.
type wireError struct {
	text  string
	class error
	cause error
}

func (w *wireError) Error() string   { return w.text }
func (w *wireError) Unwrap() []error { return []error{w.class, w.cause} }
