//go:build linux

package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/machine"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type machines struct{ Options }

func (s *machines) Create(ctx context.Context, req *connect.Request[atollv1.CreateMachineRequest]) (*connect.Response[atollv1.CreateMachineResponse], error) {
	asked, err := s.Profiles.Apply(req.Msg.GetSpec())
	if err != nil {
		return nil, err
	}
	spec, err := specFrom(asked)
	if err != nil {
		return nil, err
	}
	m, warnings, err := s.Machines.Create(ctx, spec)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.CreateMachineResponse{Machine: machineTo(m), Warnings: warnings}), nil
}

func (s *machines) Start(ctx context.Context, req *connect.Request[atollv1.StartMachineRequest]) (*connect.Response[atollv1.StartMachineResponse], error) {
	start := s.Machines.Start
	if req.Msg.GetReprovision() {
		start = func(ctx context.Context, name string) (machine.Machine, []string, error) {
			return s.Machines.Reprovision(ctx, name, requestOrNil(req.Msg.GetProvisioning()))
		}
	}
	m, warnings, err := start(ctx, req.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.StartMachineResponse{Machine: machineTo(m), Warnings: warnings}), nil
}

func (s *machines) Stop(ctx context.Context, req *connect.Request[atollv1.StopMachineRequest]) (*connect.Response[atollv1.StopMachineResponse], error) {
	var grace *time.Duration
	if t := req.Msg.GetTimeout(); t != nil {
		d := t.AsDuration()
		grace = &d
	}
	m, err := s.Machines.Stop(ctx, req.Msg.GetMachine(), grace)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.StopMachineResponse{Machine: machineTo(m)}), nil
}

func (s *machines) Kill(ctx context.Context, req *connect.Request[atollv1.KillMachineRequest]) (*connect.Response[atollv1.KillMachineResponse], error) {
	if err := s.Machines.Kill(ctx, req.Msg.GetMachine(), req.Msg.GetSignal()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.KillMachineResponse{}), nil
}

func (s *machines) Remove(ctx context.Context, req *connect.Request[atollv1.RemoveMachineRequest]) (*connect.Response[atollv1.RemoveMachineResponse], error) {
	id, err := s.Machines.Remove(ctx, req.Msg.GetMachine(), req.Msg.GetForce())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.RemoveMachineResponse{Id: string(id)}), nil
}

func (s *machines) Wait(ctx context.Context, req *connect.Request[atollv1.WaitMachineRequest]) (*connect.Response[atollv1.WaitMachineResponse], error) {
	m, err := s.Machines.Wait(ctx, req.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(exitTo(m)), nil
}

func (s *machines) List(_ context.Context, req *connect.Request[atollv1.ListMachinesRequest]) (*connect.Response[atollv1.ListMachinesResponse], error) {
	filter, err := s.Machines.ParseFilters(req.Msg.GetFilters())
	if err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	res := &atollv1.ListMachinesResponse{}
	for _, m := range s.Machines.List() {
		if (req.Msg.GetAll() || filter.All || m.State.Alive()) && filter.Keeps(&m) {
			res.Machines = append(res.Machines, machineTo(m))
		}
	}
	return connect.NewResponse(res), nil
}

func (s *machines) Get(_ context.Context, req *connect.Request[atollv1.GetMachineRequest]) (*connect.Response[atollv1.GetMachineResponse], error) {
	m, err := s.Machines.Get(req.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.GetMachineResponse{Machine: machineTo(m)}), nil
}

func (s *machines) Logs(ctx context.Context, req *connect.Request[atollv1.LogsRequest], out *connect.ServerStream[atollv1.LogsResponse]) error {
	if req.Msg.GetBoot() {
		return s.bootLog(ctx, req.Msg, out)
	}
	if req.Msg.GetProvisioning() {
		return s.provisionLog(req.Msg, out)
	}
	r, err := s.Machines.Logs(req.Msg.GetMachine())
	if err != nil {
		return err
	}
	defer r.Close()
	want := newSelection(req.Msg)
	send := func(rec outlog.Record) error {
		return out.Send(&atollv1.LogsResponse{
			Stream: atollv1.Stream(rec.Stream), Data: rec.Data, Time: timestamppb.New(rec.Time), Boot: rec.Boot, Seq: rec.Seq,
		})
	}
	tail := newTail(req.Msg)
	for {
		rec, err := r.Next(ctx, false)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if !want.has(rec) {
			continue
		}
		if tail.n >= 0 {
			tail.add(rec)
		} else if err := send(rec); err != nil {
			return err
		}
	}
	for _, rec := range tail.records() {
		if err := send(rec); err != nil {
			return err
		}
	}
	if !req.Msg.GetFollow() {
		return nil
	}
	ctx, cancel := want.context(ctx)
	defer cancel()
	for {
		rec, err := r.Next(ctx, true)
		if errors.Is(err, io.EOF) && r.Continues(ctx) {
			continue
		}
		if errors.Is(err, io.EOF) || want.over(ctx) {
			return nil
		}
		if err != nil {
			return err
		}
		if !want.has(rec) {
			continue
		}
		if err := send(rec); err != nil {
			return err
		}
	}
}

// selection is the part of the output that was asked for.
type selection struct {
	since, until time.Time // zero: without end
	after        outlog.Position
}

func newSelection(req *atollv1.LogsRequest) selection {
	s := selection{after: outlog.Position{Boot: req.GetAfterBoot(), Seq: req.GetAfterSeq()}}
	if t := req.GetSince(); t != nil {
		s.since = t.AsTime()
	}
	if t := req.GetUntil(); t != nil {
		s.until = t.AsTime()
	}
	return s
}

func (s selection) has(r outlog.Record) bool {
	return r.Position().After(s.after) && !r.Time.Before(s.since) && (s.until.IsZero() || !r.Time.After(s.until))
}

var errUntil = errors.New("the time until which was asked for has come")

// context ends when nothing that comes can be wanted any more.
func (s selection) context(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.until.IsZero() {
		return context.WithCancel(ctx)
	}
	return context.WithDeadlineCause(ctx, s.until, errUntil)
}

func (s selection) over(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errUntil) }

// tail keeps the last n lines of records.
type tail struct {
	n     int64 // -1: all
	lines int64
	kept  []outlog.Record
}

func newTail(req *atollv1.LogsRequest) *tail {
	if req.GetTailAll() || req.GetTail() < 0 {
		return &tail{n: -1}
	}
	return &tail{n: req.GetTail()}
}

func (t *tail) add(r outlog.Record) {
	t.kept = append(t.kept, r)
	if t.n < 0 {
		return
	}
	t.lines += int64(bytes.Count(r.Data, []byte("\n")))
	for len(t.kept) > 1 {
		head := int64(bytes.Count(t.kept[0].Data, []byte("\n")))
		if t.lines-head < t.n+1 {
			break
		}
		t.lines -= head
		t.kept = t.kept[1:]
	}
}

func (t *tail) records() []outlog.Record {
	if t.n < 0 || len(t.kept) == 0 {
		return t.kept
	}
	if t.n == 0 {
		return nil
	}
	total := t.lines
	if last := t.kept[len(t.kept)-1].Data; len(last) > 0 && last[len(last)-1] != '\n' {
		total++ // a last line without its newline
	}
	for skip := total - t.n; skip > 0 && len(t.kept) > 0; {
		head := t.kept[0].Data
		i := bytes.IndexByte(head, '\n')
		if i < 0 {
			t.kept = t.kept[1:]
			continue
		}
		t.kept[0].Data = head[i+1:]
		skip--
		if len(t.kept[0].Data) == 0 {
			t.kept = t.kept[1:]
		}
	}
	return t.kept
}

func (s *machines) bootLog(_ context.Context, req *atollv1.LogsRequest, out *connect.ServerStream[atollv1.LogsResponse]) error {
	m, err := s.Machines.Get(req.GetMachine())
	if err != nil {
		return err
	}
	f, err := os.Open(s.Machines.ConsolePath(m))
	if errors.Is(err, os.ErrNotExist) {
		return nil // it has not been started yet
	}
	if err != nil {
		return fmt.Errorf("reading the console of machine %q: %w", m.Spec.Name, err)
	}
	defer f.Close()
	if n := req.GetTail(); !req.GetTailAll() && n >= 0 {
		if err := seekLines(f, n); err != nil {
			return fmt.Errorf("reading the console of machine %q: %w", m.Spec.Name, err)
		}
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if err := out.Send(&atollv1.LogsResponse{Stream: atollv1.Stream_STREAM_STDOUT, Data: buf[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the console of machine %q: %w", m.Spec.Name, err)
		}
	}
}

// seekLines leaves f before its last n lines.
func seekLines(f *os.File, n int64) error {
	const most = 1 << 20 // of the console's end: a guest may have written any amount
	start := int64(0)
	if st, err := f.Stat(); err == nil && st.Size() > most {
		start = st.Size() - most
	}
	data := make([]byte, most)
	read, err := f.ReadAt(data, start)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	data = data[:read]
	at := len(data)
	if at > 0 && data[at-1] == '\n' {
		at--
	}
	for ; n > 0 && at >= 0; n-- {
		at = bytes.LastIndexByte(data[:max(at, 0)], '\n')
	}
	_, err = f.Seek(start+int64(at+1), io.SeekStart)
	return err
}
