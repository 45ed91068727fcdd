//go:build linux

package server

import (
	"context"
	"fmt"
	"os"
	"path"
	"runtime"
	"strings"
	"time"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/event"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type system struct{ Options }

func (s *system) Version(context.Context, *connect.Request[atollv1.VersionRequest]) (*connect.Response[atollv1.VersionResponse], error) {
	return connect.NewResponse(&atollv1.VersionResponse{
		Version: s.Options.Version.Version, Commit: s.Options.Version.Commit, Home: s.Options.Version.Home,
		GoVersion: runtime.Version(), Platform: path.Join(runtime.GOOS, runtime.GOARCH), Pid: int32(os.Getpid()),
	}), nil
}

func (s *system) Doctor(ctx context.Context, _ *connect.Request[atollv1.DoctorRequest]) (*connect.Response[atollv1.DoctorResponse], error) {
	res := &atollv1.DoctorResponse{}
	for _, c := range s.Options.Doctor(ctx) {
		res.Checks = append(res.Checks, &atollv1.Check{Name: c.Name, Level: atollv1.Check_Level(c.Level), Message: c.Message, Hint: c.Hint})
	}
	return connect.NewResponse(res), nil
}

func (s *system) Prune(ctx context.Context, r *connect.Request[atollv1.PruneSystemRequest]) (*connect.Response[atollv1.PruneSystemResponse], error) {
	pruned, err := (&images{s.Options}).Prune(ctx, connect.NewRequest(&atollv1.PruneImagesRequest{All: r.Msg.GetAll()}))
	if err != nil {
		return nil, err
	}
	res := &atollv1.PruneSystemResponse{Images: pruned.Msg}
	records, err := s.Builds.Prune(ctx, build.PruneOptions{All: r.Msg.GetAll()})
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		res.BuildCacheBytes += r.Size
	}
	return connect.NewResponse(res), nil
}

func (s *system) Shutdown(context.Context, *connect.Request[atollv1.ShutdownRequest]) (*connect.Response[atollv1.ShutdownResponse], error) {
	s.Options.Shutdown()
	return connect.NewResponse(&atollv1.ShutdownResponse{}), nil
}

func (s *system) Events(ctx context.Context, req *connect.Request[atollv1.EventsRequest], out *connect.ServerStream[atollv1.Event]) error {
	wanted, err := filter(req.Msg.GetFilters())
	if err != nil {
		return err
	}
	var since time.Time
	if t := req.Msg.GetSince(); t != nil {
		since = t.AsTime()
	}
	r, past := s.Options.Events.Listen(since)
	defer r.Close()
	// The headers go out now, so that a client knows that it misses nothing from here on.
	if err := out.Send(nil); err != nil {
		return err
	}
	for _, e := range past {
		if err := send(out, e, wanted); err != nil {
			return err
		}
	}
	for {
		select {
		case e := <-r.C():
			if err := send(out, e, wanted); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func send(out *connect.ServerStream[atollv1.Event], e event.Event, wanted func(event.Event) bool) error {
	if !wanted(e) {
		return nil
	}
	return out.Send(&atollv1.Event{Seq: e.Seq, Time: timestamppb.New(e.Time), Type: string(e.Type), Action: e.Action, Id: e.ID, Attributes: e.Attributes})
}

// filter: filters of one key are alternatives, different keys must all hold.
func filter(filters []string) (func(event.Event) bool, error) {
	byKey := map[string][]string{}
	for _, f := range filters {
		k, v, ok := strings.Cut(f, "=")
		switch k {
		case "type", "action", "event", "machine", "image":
		default:
			ok = false
		}
		if !ok {
			return nil, fmt.Errorf("filter %q is not type=, action=, machine= or image=…: %w", f, errdefs.ErrInvalidArgument)
		}
		byKey[k] = append(byKey[k], v)
	}
	return func(e event.Event) bool {
		for k, values := range byKey {
			if !anyOf(values, func(v string) bool { return matches(e, k, v) }) {
				return false
			}
		}
		return true
	}, nil
}

func anyOf(values []string, ok func(string) bool) bool {
	for _, v := range values {
		if ok(v) {
			return true
		}
	}
	return false
}

func matches(e event.Event, key, value string) bool {
	switch key {
	case "type":
		return string(e.Type) == value
	case "action", "event":
		return e.Action == value || strings.HasPrefix(e.Action, value+": ") // health_status: healthy
	case "machine":
		return e.Type == event.Machine && (e.Attributes["name"] == value || strings.HasPrefix(e.ID, value))
	default:
		return e.Attributes["image"] == value || e.Type == event.Image && (e.Attributes["name"] == value || strings.HasPrefix(e.ID, value))
	}
}
