//go:build linux

// Package server is the RPC door: api types in, the nouns' calls, api types out. It takes no decisions.
// Imported by daemon. A Server is safe for concurrent use.
package server

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/atollvm/atoll/api/atoll/v1/atollv1connect"
	"github.com/atollvm/atoll/internal/base"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/profile"
	"github.com/atollvm/atoll/internal/rootdisk"
	"github.com/atollvm/atoll/internal/rpcerr"
	"github.com/opencontainers/go-digest"
)

// Version says which build this is.
type Version struct {
	Version string
	Commit  string
	Home    string
}

// Options is what the door opens to.
type Options struct {
	Machines *machine.Machines
	Images   *image.Store
	Disks    Disks
	Builds   *build.Builder
	// Isolation is where the RUN steps of a build run that does not say so itself; empty: on the host.
	Isolation string
	Bases     *base.Builder
	Kernels   *kernel.Store
	Profiles  *profile.Store
	Doctor    func(ctx context.Context) []Check
	Events    *event.Bus
	Version   Version
	Shutdown  func() // ends the daemon
	Log       *slog.Logger
}

// Disks makes root disks.
type Disks interface {
	Get(img digest.Digest) (rootdisk.Root, error)
	Users() (map[string]int, error)
	// Make makes an image's root disk, unless it is there; progress may be nil.
	Make(ctx context.Context, img digest.Digest, progress func(done int64)) (rootdisk.Root, error)
	// Flat writes all of an image as one disk, in a file without a name; the caller closes it.
	Flat(ctx context.Context, img digest.Digest) (*os.File, error)
	// Attach makes the image's root disks a RootDiskArtifact that refers to it; Adopt takes those that came with it, where any did.
	Attach(ctx context.Context, img digest.Digest) error
	Adopt(ctx context.Context, img digest.Digest) error
}

// RootDiskArtifact is the type of the artifact that the root disks of an image are in a registry.
const RootDiskArtifact = "application/vnd.atoll.rootdisk.v1"

// Check is one finding of the doctor.
type Check struct {
	Name    string
	Level   Level
	Message string
	Hint    string
}

// Level grades a Check.
type Level int

// The levels, as on the wire.
const (
	OK   Level = 1
	Warn Level = 2
	Fail Level = 3
)

// Handler serves the whole API.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	errs := connect.WithInterceptors(&errorInterceptor{o.Log})
	mux.Handle(atollv1connect.NewMachineServiceHandler(&machines{o}, errs))
	mux.Handle(atollv1connect.NewImageServiceHandler(&images{o}, errs))
	mux.Handle(atollv1connect.NewBuildServiceHandler(&builds{o}, errs))
	mux.Handle(atollv1connect.NewBaseServiceHandler(&bases{o}, errs))
	mux.Handle(atollv1connect.NewKernelServiceHandler(&kernels{o}, errs))
	mux.Handle(atollv1connect.NewProfileServiceHandler(&profiles{o}, errs))
	mux.Handle(atollv1connect.NewSystemServiceHandler(&system{o}, errs))
	return mux
}

// errorInterceptor gives every error its class and hint on the wire.
type errorInterceptor struct{ log *slog.Logger }

func (i *errorInterceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		began := time.Now()
		res, err := next(ctx, req)
		i.log.Debug("call", "procedure", req.Spec().Procedure, "took", time.Since(began), "err", err)
		return res, rpcerr.ToConnect(err)
	}
}

func (i *errorInterceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i *errorInterceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		began := time.Now()
		err := next(ctx, conn)
		i.log.Debug("stream", "procedure", conn.Spec().Procedure, "took", time.Since(began), "err", err)
		return rpcerr.ToConnect(err)
	}
}
