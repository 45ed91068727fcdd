//go:build linux

package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/build"
	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/ref"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type builds struct{ Options }

type buildStream = connect.BidiStream[atollv1.BuildRequest, atollv1.BuildResponse]

func (s *builds) Build(ctx context.Context, stream *buildStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return fmt.Errorf("building: the first message is not a start: %w", errdefs.ErrInvalidArgument)
	}
	tags, err := parseTags(start.GetTags())
	if err != nil {
		return err
	}
	c := &buildCall{stream: stream, agents: agents{conns: map[uint32]*agentConn{}}}
	c.agents.send = c.send
	defer c.agents.end()
	req, err := c.request(start)
	if err != nil {
		return err
	}
	req.Isolation = cmp.Or(req.Isolation, s.Isolation)
	if start.GetContextStream() {
		req.ContextStream = c
	} else {
		go c.receive()
	}
	status := c.status
	if start.GetQuiet() {
		status = c.warnings
	}
	if question := start.GetCall(); question != "" {
		report, err := s.Builds.Ask(ctx, req, question, status)
		if err != nil {
			return err
		}
		return c.send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Report{Report: &atollv1.BuildReport{
			Text: report.Text, Json: report.JSON, ExitCode: int32(report.ExitCode),
		}}})
	}
	// Until the image has its name, this hold keeps its blobs.
	release := s.Images.Hold()
	defer release()
	res, err := s.Builds.Build(ctx, req, status)
	if err != nil {
		return err
	}
	result := &atollv1.BuildResult{Solve: durationpb.New(res.Solve), Metadata: res.Metadata, Digest: res.Metadata["containerimage.digest"]}
	if !req.NoImage {
		if err := s.keep(ctx, result, res, tags); err != nil {
			return err
		}
	}
	for i, o := range start.GetOutputs() {
		if o.GetType() == "disk" {
			if err := s.sendDisk(ctx, c.output(i), res); err != nil {
				return err
			}
		}
	}
	return c.send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Result{Result: result}})
}

func parseTags(tags []string) ([]ref.Ref, error) {
	var refs []ref.Ref
	for _, t := range tags {
		r, err := ref.Parse(t)
		if err != nil {
			return nil, fmt.Errorf("tag %q: %w", t, err)
		}
		refs = append(refs, r)
	}
	return refs, nil
}

// keep names the image and makes its root disk, so that the first run finds it.
func (s *builds) keep(ctx context.Context, result *atollv1.BuildResult, res build.Result, tags []ref.Ref) error {
	names := []string{""} // without a tag the image is kept by its digest
	if len(tags) > 0 {
		names = nil
	}
	for _, t := range tags {
		names = append(names, t.String())
		result.References = append(result.References, t.Familiar())
	}
	for _, name := range names {
		if _, err := s.Images.Put(ctx, name, res.Manifest); err != nil {
			return fmt.Errorf("keeping the image built: %w", err)
		}
	}
	began := time.Now()
	if _, err := s.Disks.Make(ctx, res.Manifest.Digest, nil); err != nil {
		return err
	}
	result.Digest, result.RootDisk = res.Manifest.Digest.String(), durationpb.New(time.Since(began))
	s.Events.Publish(event.Event{Type: event.Build, Action: "build", ID: result.Digest, Attributes: map[string]string{"name": first(result.References)}})
	return nil
}

// sendDisk sends the image as one disk.
func (s *builds) sendDisk(ctx context.Context, out io.WriteCloser, res build.Result) error {
	f, err := s.Disks.Flat(ctx, res.Manifest.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(out, f); err != nil {
		return fmt.Errorf("sending the root disk: %w", err)
	}
	return out.Close()
}

// buildCall is one client at one build. As an io.Reader it is the context that the client streams.
type buildCall struct {
	stream *buildStream
	agents agents

	mu sync.Mutex // a stream takes one message at a time

	rest  []byte // of the last piece of the context
	ended bool
}

func (c *buildCall) send(r *atollv1.BuildResponse) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stream.Send(r)
}

func (c *buildCall) status(status *build.Status) {
	data, err := json.Marshal(status)
	if err == nil {
		_ = c.send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Status{Status: data}}) // a client that is gone ends ctx
	}
}

// warnings are all that a quiet client hears.
func (c *buildCall) warnings(status *build.Status) {
	if len(status.Warnings) > 0 {
		c.status(&build.Status{Warnings: status.Warnings})
	}
}

// request is start as the build room has it.
func (c *buildCall) request(start *atollv1.BuildStart) (build.Request, error) {
	if dir := start.GetContextDir(); dir != "" && (!filepath.IsAbs(dir) || start.GetDockerfile() != "" && !filepath.IsAbs(start.GetDockerfile())) {
		return build.Request{}, fmt.Errorf("building %q: context and Dockerfile are given by absolute paths: %w", dir, errdefs.ErrInvalidArgument)
	}
	r := build.Request{
		ContextDir: start.GetContextDir(), ContextURL: start.GetContextUrl(),
		Dockerfile: start.GetDockerfile(), DockerfileText: start.GetDockerfileText(), Target: start.GetTarget(),
		BuildArgs: start.GetBuildArgs(), Labels: start.GetLabels(), Contexts: start.GetBuildContexts(),
		NoCache: start.GetNoCache(), NoCacheStages: start.GetNoCacheStages(), Pull: start.GetPull(), Platform: start.GetPlatform(),
		Isolation: start.GetIsolation(),
		Network:   start.GetNetwork(), AddHosts: start.GetAddHosts(), ShmSize: start.GetShmBytes(), Ulimits: start.GetUlimits(),
		Secrets: start.GetSecrets(), Agents: map[string]build.Dial{},
		CacheTo: cacheOptions(start.GetCacheTo()), CacheFrom: cacheOptions(start.GetCacheFrom()),
		Timeout: start.GetTimeout().AsDuration(), Quiet: start.GetQuiet(),
	}
	for _, id := range start.GetSsh() {
		r.Agents[id] = func(context.Context) (io.ReadWriteCloser, error) { return c.agents.open(id) }
	}
	// Who wants files and gives no name wants no image.
	r.NoImage = len(start.GetOutputs()) > 0 && len(start.GetTags()) == 0
	for i, o := range start.GetOutputs() {
		switch o.GetType() {
		case "disk":
			r.NoImage = false
		case "oci", "docker", "tar":
			attrs := map[string]string{}
			if o.GetType() != "tar" && len(start.GetTags()) > 0 {
				attrs["name"] = strings.Join(start.GetTags(), ",")
			}
			for k, v := range o.GetAttributes() {
				attrs[k] = v
			}
			r.Outputs = append(r.Outputs, build.Output{Type: o.GetType(), Attrs: attrs, Open: func() (io.WriteCloser, error) { return c.output(i), nil }})
		default:
			return r, fmt.Errorf("output type %q: want disk, oci, docker or tar: %w", o.GetType(), errdefs.ErrInvalidArgument)
		}
	}
	return r, nil
}

func cacheOptions(options []*atollv1.CacheOption) []build.CacheOption {
	var out []build.CacheOption
	for _, o := range options {
		attrs := o.GetAttributes()
		if attrs == nil {
			attrs = map[string]string{}
		}
		out = append(out, build.CacheOption{Type: o.GetType(), Attrs: attrs})
	}
	return out
}

// Read gives the context that the client streams. After its end what comes is for the agents.
func (c *buildCall) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.ended {
			return 0, io.EOF
		}
		req, err := c.stream.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the client went away: %w", errdefs.ErrAborted)
			}
			return 0, err
		}
		switch k := req.GetKind().(type) {
		case *atollv1.BuildRequest_Context:
			c.rest = k.Context
		case *atollv1.BuildRequest_ContextEnd:
			c.ended = true
			go c.receive()
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// receive ends with the stream, and so with the call.
func (c *buildCall) receive() {
	for {
		req, err := c.stream.Receive()
		if err != nil {
			c.agents.end()
			return
		}
		if data := req.GetAgent(); data != nil {
			c.agents.take(data)
		}
	}
}

// output writes a file at the client.
func (c *buildCall) output(index int) io.WriteCloser {
	return &outputWriter{call: c, index: uint32(index)}
}

type outputWriter struct {
	call  *buildCall
	index uint32
}

func (o *outputWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		piece := p[:min(len(p), chunk)]
		if err := o.call.send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Output{Output: &atollv1.OutputData{Index: o.index, Data: piece}}}); err != nil {
			return written, err
		}
		written += len(piece)
		p = p[len(piece):]
	}
	return written, nil
}

func (*outputWriter) Close() error { return nil }

// agents are the connections to the client's SSH agents.
type agents struct {
	send func(*atollv1.BuildResponse) error

	mu    sync.Mutex // guards the rest
	last  uint32
	conns map[uint32]*agentConn
	ended bool
}

// agentConn is one connection: what the agent answers comes out of a pipe.
type agentConn struct {
	agents *agents
	number uint32
	*io.PipeReader
	answers *io.PipeWriter
}

var errAgentGone = fmt.Errorf("SSH agent: the client went away: %w", errdefs.ErrUnavailable)

func (a *agents) open(id string) (io.ReadWriteCloser, error) {
	a.mu.Lock()
	if a.ended {
		a.mu.Unlock()
		return nil, errAgentGone
	}
	a.last++
	c := &agentConn{agents: a, number: a.last}
	c.PipeReader, c.answers = io.Pipe()
	a.conns[c.number] = c
	a.mu.Unlock()
	return c, c.transmit(&atollv1.AgentData{Id: id})
}

// take passes on what an agent said.
func (a *agents) take(data *atollv1.AgentData) {
	a.mu.Lock()
	c := a.conns[data.GetConnection()]
	if data.GetClose() {
		delete(a.conns, data.GetConnection())
	}
	a.mu.Unlock()
	if c == nil {
		return
	}
	_, _ = c.answers.Write(data.GetData()) // a reader that is gone wants no answer
	if data.GetClose() {
		c.answers.Close()
	}
}

func (a *agents) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
	for _, c := range a.conns {
		c.answers.CloseWithError(errAgentGone)
	}
	clear(a.conns)
}

func (c *agentConn) transmit(d *atollv1.AgentData) error {
	d.Connection = c.number
	return c.agents.send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Agent{Agent: d}})
}

func (c *agentConn) Write(p []byte) (int, error) {
	return len(p), c.transmit(&atollv1.AgentData{Data: append([]byte(nil), p...)})
}

// CloseWrite says that nothing follows; answers may.
func (c *agentConn) CloseWrite() error { return c.transmit(&atollv1.AgentData{Close: true}) }

func (c *agentConn) Close() error {
	c.agents.mu.Lock()
	delete(c.agents.conns, c.number)
	c.agents.mu.Unlock()
	return errors.Join(c.PipeReader.Close(), c.transmit(&atollv1.AgentData{Close: true}))
}

func (s *builds) DiskUsage(ctx context.Context, _ *connect.Request[atollv1.BuildDiskUsageRequest]) (*connect.Response[atollv1.BuildDiskUsageResponse], error) {
	records, err := s.Builds.Usage(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.BuildDiskUsageResponse{Records: cacheRecords(records)}), nil
}

func (s *builds) Prune(ctx context.Context, r *connect.Request[atollv1.PruneBuildRequest]) (*connect.Response[atollv1.PruneBuildResponse], error) {
	records, err := s.Builds.Prune(ctx, build.PruneOptions{All: r.Msg.GetAll(), UnusedFor: r.Msg.GetUnusedFor().AsDuration(), Keep: r.Msg.GetKeepBytes()})
	if err != nil {
		return nil, err
	}
	res := &atollv1.PruneBuildResponse{Records: cacheRecords(records)}
	for _, r := range records {
		res.ReclaimedBytes += r.Size
	}
	return connect.NewResponse(res), nil
}

func cacheRecords(records []build.CacheRecord) []*atollv1.BuildCacheRecord {
	var out []*atollv1.BuildCacheRecord
	for _, r := range records {
		o := &atollv1.BuildCacheRecord{
			Id: r.ID, Type: r.Type, Description: r.Description, SizeBytes: r.Size, InUse: r.InUse, Shared: r.Shared, CreatedAt: timestamppb.New(r.CreatedAt),
		}
		if !r.LastUsedAt.IsZero() {
			o.LastUsedAt = timestamppb.New(r.LastUsedAt)
		}
		out = append(out, o)
	}
	return out
}

func first(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return names[0]
}
