package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

func TestBothWays(t *testing.T) {
	tests := []struct {
		class error
		code  connect.Code
		back  error // nil: class
	}{
		{class: errdefs.ErrNotFound, code: connect.CodeNotFound},
		{class: errdefs.ErrAlreadyExists, code: connect.CodeAlreadyExists},
		{class: errdefs.ErrInvalidArgument, code: connect.CodeInvalidArgument},
		{class: errdefs.ErrFailedPrecondition, code: connect.CodeFailedPrecondition},
		{class: errdefs.ErrUnavailable, code: connect.CodeUnavailable},
		{class: errdefs.ErrPermissionDenied, code: connect.CodePermissionDenied},
		{class: errdefs.ErrResourceExhausted, code: connect.CodeResourceExhausted},
		{class: errdefs.ErrConflict, code: connect.CodeAborted},
		{class: errdefs.ErrAborted, code: connect.CodeAborted, back: errdefs.ErrConflict},
		{class: errdefs.ErrNotImplemented, code: connect.CodeUnimplemented},
		{class: context.Canceled, code: connect.CodeCanceled},
		{class: context.DeadlineExceeded, code: connect.CodeDeadlineExceeded},
		{class: errdefs.ErrInternal, code: connect.CodeInternal},
		{class: errors.New("no class"), code: connect.CodeInternal, back: errdefs.ErrInternal},
	}
	for _, tt := range tests {
		t.Run(tt.class.Error(), func(t *testing.T) {
			in := fmt.Errorf(`starting machine "web": %w`, hint.With(tt.class, "try 100%% harder"))
			out := ToConnect(in)
			if got := connect.CodeOf(out); got != tt.code {
				t.Errorf("code = %v, want %v", got, tt.code)
			}
			back := FromConnect(out)
			if back.Error() != in.Error() {
				t.Errorf("text = %q, want %q", back, in)
			}
			want := tt.back
			if want == nil {
				want = tt.class
			}
			if got := errdefs.Resolve(back); !errors.Is(got, want) {
				t.Errorf("class = %v, want %v", got, want)
			}
			if got := hint.Of(back); got != "try 100% harder" {
				t.Errorf("hint = %q", got)
			}
		})
	}
}

func TestPassThrough(t *testing.T) {
	if ToConnect(nil) != nil || FromConnect(nil) != nil {
		t.Error("nil did not stay nil")
	}
	if err := FromConnect(io.EOF); !errors.Is(err, io.EOF) {
		t.Errorf("io.EOF became %v", err)
	}
	ce := connect.NewError(connect.CodeNotFound, errors.New("x"))
	if !errors.Is(ToConnect(ce), ce) {
		t.Error("a *connect.Error was wrapped again")
	}
}
