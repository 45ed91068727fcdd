package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/api/atoll/v1/atollv1connect"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/rpcerr"
)

// TestMain makes the test binary also the daemon that autostart starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "fake-daemon" {
		os.Exit(fakeDaemon(os.Args[2]))
	}
	os.Exit(m.Run())
}

func fakeDaemon(mode string) int {
	home := os.Getenv("ATOLL_HOME")
	f, err := os.OpenFile(filepath.Join(home, "starts"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 3
	}
	fmt.Fprintln(f, os.Getpid())
	if mode == "fail" {
		fmt.Fprintln(os.Stderr, "opening state: disk on fire")
		return 4
	}
	stop := make(chan struct{})
	s, err := newFake(stop).listen(filepath.Join(home, "atoll.sock"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 5
	}
	select {
	case <-stop:
	case <-time.After(30 * time.Second): // the test forgot
	}
	s.Close()
	return 0
}

// fake is a daemon that works, with machines that are functions. What an entrypoint or an exec's argv does is in guest.
type fake struct {
	atollv1connect.UnimplementedMachineServiceHandler // what no test here asks for

	mu          sync.Mutex // guards the rest
	machines    []*fakeMachine
	images      []*atollv1.Image
	pulled      []*atollv1.PullImageRequest
	built       *atollv1.BuildStart
	question    []byte // to an SSH agent
	answer      []byte
	cachePruned *atollv1.PruneBuildRequest
	loaded      []byte
	imported    *atollv1.ImportStart
	pruned      []*atollv1.PruneImagesRequest
	filters     []string
	logs        *atollv1.LogsRequest
	stopped     []*atollv1.StopMachineRequest
	execed      *atollv1.ExecStart
	events      *atollv1.EventsRequest
	eventsEnd   error // how the stream of events ends
	checks      []*atollv1.Check
	stop        chan struct{}
	restarted   *atollv1.StartMachineRequest // the last that was to reprovision
	sizes       []*atollv1.Size
}

type fakeMachine struct {
	*atollv1.Machine
	signals  chan string
	attached *guestIO
	started  chan struct{}
}

func newFake(stop chan struct{}) *fake {
	return &fake{stop: stop, images: []*atollv1.Image{{
		Digest: "sha256:" + strings.Repeat("ab", 32), References: []string{"hello:latest", "hello:1.0"}, SizeBytes: 3 << 20, Os: "linux", Architecture: "amd64",
		ConfigJson: []byte(`{"architecture":"amd64","config":{"Cmd":["serve","--all"],"Healthcheck":{"Test":["NONE"]}}}`),
	}}}
}

func (f *fake) listen(path string) (*http.Server, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	errs := connect.WithInterceptors(toConnect{})
	mux.Handle(atollv1connect.NewMachineServiceHandler(f, errs))
	mux.Handle(atollv1connect.NewImageServiceHandler(fakeImages{fake: f}, errs))
	mux.Handle(atollv1connect.NewBuildServiceHandler(fakeBuild{f}, errs))
	mux.Handle(atollv1connect.NewBaseServiceHandler(fakeBases{}, errs))
	mux.Handle(atollv1connect.NewKernelServiceHandler(fakeKernels{}, errs))
	mux.Handle(atollv1connect.NewSystemServiceHandler(fakeSystem{fake: f}, errs))
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: mux, Protocols: &p}
	go s.Serve(l)
	return s, nil
}

type toConnect struct{}

func (toConnect) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, r)
		if err != nil {
			return nil, rpcerr.ToConnect(err)
		}
		return res, nil
	}
}
func (toConnect) WrapStreamingClient(n connect.StreamingClientFunc) connect.StreamingClientFunc {
	return n
}
func (toConnect) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, c connect.StreamingHandlerConn) error { return rpcerr.ToConnect(next(ctx, c)) }
}

// guestIO is how a guest's process meets its streams.
type guestIO struct {
	stdin          chan []byte // closed at the end of input
	stdout, stderr func(string)
	once           sync.Once
}

func (g *guestIO) end() { g.once.Do(func() { close(g.stdin) }) }

// guest runs the commands that the fake's guests know.
func guest(argv []string, io *guestIO, signals <-chan string) (code int, failure string) {
	switch argv[0] {
	case "echo":
		io.stdout(strings.Join(argv[1:], " ") + "\n")
	case "warn":
		io.stderr(strings.Join(argv[1:], " ") + "\n")
	case "cat":
		for b := range io.stdin {
			io.stdout(string(b))
		}
	case "exit":
		code, _ = strconv.Atoi(argv[1])
	case "sleep": // until a signal
		io.stdout("sleeping\n")
		s := <-signals
		io.stdout("got " + s + "\n")
		return 128 + map[string]int{"INT": 2, "TERM": 15, "KILL": 9, "USR1": 10}[s], ""
	case "locked":
		return 126, argv[0] + ": permission denied"
	default:
		return 127, argv[0] + ": no such file"
	}
	return code, ""
}

// set changes a machine, and view copies it, so that an answer on its way is not changed.
func (f *fake) set(m *fakeMachine, change func()) *atollv1.Machine {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	return proto.CloneOf(m.Machine)
}

func (f *fake) view(m *fakeMachine) *atollv1.Machine { return f.set(m, func() {}) }

func hasReference(i *atollv1.Image, ref string) bool {
	return slices.Contains(i.References, ref) || slices.Contains(i.References, ref+":latest")
}

func (f *fake) find(name string) (*fakeMachine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.machines {
		if m.Spec.Name == name || strings.HasPrefix(m.Id, name) {
			return m, nil
		}
	}
	return nil, hint.With(fmt.Errorf("machine %q: %w", name, errdefs.ErrNotFound), "atoll ps -a lists them")
}

func (f *fake) Create(_ context.Context, r *connect.Request[atollv1.CreateMachineRequest]) (*connect.Response[atollv1.CreateMachineResponse], error) {
	spec := proto.CloneOf(r.Msg.GetSpec())
	f.mu.Lock()
	defer f.mu.Unlock()
	if spec.Name == "" {
		spec.Name = fmt.Sprintf("made_up_%d", len(f.machines))
	}
	if !slices.ContainsFunc(f.images, func(i *atollv1.Image) bool { return hasReference(i, spec.Image) }) {
		return nil, fmt.Errorf("image %q: %w", spec.Image, errdefs.ErrNotFound)
	}
	m := &fakeMachine{
		Machine: &atollv1.Machine{
			Id: fmt.Sprintf("%032x", 0xabcdef0000+len(f.machines)), Spec: spec, State: atollv1.MachineState_MACHINE_STATE_CREATED, ImageRef: spec.Image,
			Argv: append(slices.Clone(spec.Entrypoint), spec.Command...), CreatedAt: timestamppb.New(epoch.Add(time.Duration(len(f.machines)) * time.Minute)),
		},
		signals: make(chan string, 1), started: make(chan struct{}),
	}
	f.machines = append(f.machines, m)
	return connect.NewResponse(&atollv1.CreateMachineResponse{Machine: proto.CloneOf(m.Machine), Warnings: []string{"no KVM: emulated"}}), nil
}

func (f *fake) Start(_ context.Context, r *connect.Request[atollv1.StartMachineRequest]) (*connect.Response[atollv1.StartMachineResponse], error) {
	m, err := f.find(r.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	if r.Msg.GetReprovision() {
		f.set(m, func() { f.restarted = r.Msg })
	}
	if len(m.Argv) > 0 && !slices.Contains([]string{"echo", "warn", "cat", "exit", "sleep"}, m.Argv[0]) {
		code, failure := guest(m.Argv, nil, nil)
		if m.Spec.Name == "broken" {
			code = 0
		}
		f.set(m, func() { m.State, m.ExitCode = atollv1.MachineState_MACHINE_STATE_FAILED, int32(code) })
		return nil, hint.With(fmt.Errorf("starting machine %q: entrypoint: %s", m.Spec.Name, failure), "look at atoll logs --boot")
	}
	view := f.set(m, func() {
		m.State, m.StartedAt = atollv1.MachineState_MACHINE_STATE_RUNNING, timestamppb.New(epoch)
		m.Network = &atollv1.NetworkStatus{Address: "10.0.0.2/24", Ports: m.Spec.Ports}
		close(m.started)
	})
	return connect.NewResponse(&atollv1.StartMachineResponse{Machine: view, Warnings: []string{"no KVM: emulated"}}), nil
}

func (f *fake) Attach(ctx context.Context, s *connect.BidiStream[atollv1.AttachRequest, atollv1.AttachResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	m, err := f.find(first.GetStart().GetMachine())
	if err != nil {
		return err
	}
	var mu sync.Mutex
	send := func(r *atollv1.AttachResponse) error { mu.Lock(); defer mu.Unlock(); return s.Send(r) }
	if err := send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Attached{Attached: true}}); err != nil {
		return err
	}
	io := &guestIO{stdin: make(chan []byte, 100),
		stdout: func(t string) { send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Stdout{Stdout: []byte(t)}}) },
		stderr: func(t string) { send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Stderr{Stderr: []byte(t)}}) },
	}
	go func() {
		for {
			r, err := s.Receive()
			if err != nil {
				return
			}
			switch k := r.GetKind().(type) {
			case *atollv1.AttachRequest_Stdin:
				io.stdin <- k.Stdin
			case *atollv1.AttachRequest_CloseStdin:
				io.end()
			case *atollv1.AttachRequest_Resize:
				f.mu.Lock()
				f.sizes = append(f.sizes, k.Resize)
				f.mu.Unlock()
			}
		}
	}()
	var started chan struct{}
	f.set(m, func() { m.attached, started = io, m.started })
	select {
	case <-started:
	case <-ctx.Done():
		return ctx.Err()
	}
	if m.Argv[0] == "exit" && m.Argv[1] == "lost" {
		return nil
	}
	code, _ := guest(m.Argv, io, m.signals)
	f.set(m, func() {
		m.State, m.ExitCode, m.Reason, m.FinishedAt = atollv1.MachineState_MACHINE_STATE_STOPPED, int32(code), "exited", timestamppb.New(epoch)
	})
	return send(&atollv1.AttachResponse{Kind: &atollv1.AttachResponse_Exit{Exit: &atollv1.WaitMachineResponse{ExitCode: int32(code)}}})
}

func (f *fake) Exec(ctx context.Context, s *connect.BidiStream[atollv1.ExecRequest, atollv1.ExecResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	f.mu.Lock()
	f.execed = start
	f.mu.Unlock()
	m, err := f.find(start.GetMachine())
	if err != nil {
		return err
	}
	if f.view(m).State != atollv1.MachineState_MACHINE_STATE_RUNNING {
		return hint.With(fmt.Errorf("machine %q is not running: %w", start.Machine, errdefs.ErrFailedPrecondition), "atoll start %s", start.Machine)
	}
	io := &guestIO{stdin: make(chan []byte, 100),
		stdout: func(t string) { s.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Stdout{Stdout: []byte(t)}}) },
		stderr: func(t string) { s.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Stderr{Stderr: []byte(t)}}) },
	}
	s.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Started{Started: &atollv1.ExecStarted{Pid: 7}}})
	signals := make(chan string, 1)
	go func() {
		for {
			r, err := s.Receive()
			if err != nil {
				return
			}
			switch k := r.GetKind().(type) {
			case *atollv1.ExecRequest_Stdin:
				io.stdin <- k.Stdin
			case *atollv1.ExecRequest_CloseStdin:
				io.end()
			case *atollv1.ExecRequest_Signal:
				signals <- k.Signal
			}
		}
	}()
	code, failure := guest(start.Argv, io, signals)
	if failure != "" {
		s.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_Failure{Failure: failure}})
	}
	return s.Send(&atollv1.ExecResponse{Kind: &atollv1.ExecResponse_ExitCode{ExitCode: int32(code)}})
}

func (f *fake) Stop(_ context.Context, r *connect.Request[atollv1.StopMachineRequest]) (*connect.Response[atollv1.StopMachineResponse], error) {
	f.mu.Lock()
	f.stopped = append(f.stopped, r.Msg)
	f.mu.Unlock()
	m, err := f.find(r.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	view := f.set(m, func() { m.State, m.started = atollv1.MachineState_MACHINE_STATE_STOPPED, make(chan struct{}) })
	return connect.NewResponse(&atollv1.StopMachineResponse{Machine: view}), nil
}

func (f *fake) Kill(_ context.Context, r *connect.Request[atollv1.KillMachineRequest]) (*connect.Response[atollv1.KillMachineResponse], error) {
	m, err := f.find(r.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	m.signals <- cmp.Or(r.Msg.GetSignal(), "KILL")
	return connect.NewResponse(&atollv1.KillMachineResponse{}), nil
}

func (f *fake) Remove(_ context.Context, r *connect.Request[atollv1.RemoveMachineRequest]) (*connect.Response[atollv1.RemoveMachineResponse], error) {
	m, err := f.find(r.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	if live(f.view(m)) && !r.Msg.GetForce() {
		return nil, fmt.Errorf("machine %q runs: %w", m.Spec.Name, errdefs.ErrFailedPrecondition)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines = slices.DeleteFunc(f.machines, func(o *fakeMachine) bool { return o == m })
	return connect.NewResponse(&atollv1.RemoveMachineResponse{Id: m.Id}), nil
}

func (f *fake) Wait(_ context.Context, r *connect.Request[atollv1.WaitMachineRequest]) (*connect.Response[atollv1.WaitMachineResponse], error) {
	m, err := f.find(r.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.WaitMachineResponse{ExitCode: f.view(m).ExitCode}), nil
}

func (f *fake) List(_ context.Context, r *connect.Request[atollv1.ListMachinesRequest]) (*connect.Response[atollv1.ListMachinesResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	res := &atollv1.ListMachinesResponse{}
	for _, m := range f.machines {
		if r.Msg.GetAll() || live(m.Machine) {
			res.Machines = append(res.Machines, proto.CloneOf(m.Machine))
		}
	}
	return connect.NewResponse(res), nil
}

func (f *fake) Get(_ context.Context, r *connect.Request[atollv1.GetMachineRequest]) (*connect.Response[atollv1.GetMachineResponse], error) {
	m, err := f.find(r.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.GetMachineResponse{Machine: f.view(m)}), nil
}

func (f *fake) Logs(_ context.Context, r *connect.Request[atollv1.LogsRequest], s *connect.ServerStream[atollv1.LogsResponse]) error {
	f.mu.Lock()
	f.logs = r.Msg
	f.mu.Unlock()
	if _, err := f.find(r.Msg.GetMachine()); err != nil {
		return err
	}
	at := timestamppb.New(epoch)
	for _, m := range []*atollv1.LogsResponse{
		{Stream: atollv1.Stream_STREAM_STDOUT, Data: []byte("one\ntw"), Time: at},
		{Stream: atollv1.Stream_STREAM_STDERR, Data: []byte("oops\n"), Time: at},
		{Stream: atollv1.Stream_STREAM_STDOUT, Data: []byte("o\n"), Time: at},
	} {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	return nil
}

type fakeImages struct {
	atollv1connect.UnimplementedImageServiceHandler
	*fake
}

// The machine's methods of the same names are hidden by these.
func (f fakeImages) Get(_ context.Context, r *connect.Request[atollv1.GetImageRequest]) (*connect.Response[atollv1.GetImageResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range f.images {
		if hasReference(i, r.Msg.GetReference()) {
			return connect.NewResponse(&atollv1.GetImageResponse{Image: i}), nil
		}
	}
	return nil, fmt.Errorf("image %q: %w", r.Msg.GetReference(), errdefs.ErrNotFound)
}

func (f fakeImages) List(_ context.Context, r *connect.Request[atollv1.ListImagesRequest]) (*connect.Response[atollv1.ListImagesResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.filters = r.Msg.GetFilters()
	return connect.NewResponse(&atollv1.ListImagesResponse{Images: f.images}), nil
}

func (f fakeImages) Pull(ctx context.Context, r *connect.Request[atollv1.PullImageRequest], s *connect.ServerStream[atollv1.PullImageResponse]) error {
	f.mu.Lock()
	f.pulled = append(f.pulled, r.Msg)
	f.mu.Unlock()
	switch r.Msg.GetReference() {
	case "nowhere":
		return fmt.Errorf("pulling nowhere: %w", errdefs.ErrNotFound)
	case "slow":
		s.Send(&atollv1.PullImageResponse{Kind: &atollv1.PullImageResponse_Transfer{Transfer: &atollv1.Transfer{Id: "slow", Status: "downloading"}}})
		<-ctx.Done()
		return ctx.Err()
	}
	image := &atollv1.Image{Digest: "sha256:" + strings.Repeat("cd", 32), References: []string{r.Msg.GetReference()}}
	f.mu.Lock()
	f.images = append(f.images, image)
	f.mu.Unlock()
	s.Send(&atollv1.PullImageResponse{Kind: &atollv1.PullImageResponse_Transfer{Transfer: &atollv1.Transfer{Id: "sha256:" + strings.Repeat("ef", 32), Status: "done", TotalBytes: 1024}}})
	return s.Send(&atollv1.PullImageResponse{Kind: &atollv1.PullImageResponse_Image{Image: image}})
}

func (f fakeImages) Remove(_ context.Context, r *connect.Request[atollv1.RemoveImageRequest]) (*connect.Response[atollv1.RemoveImageResponse], error) {
	if r.Msg.GetReference() != "hello" {
		return nil, fmt.Errorf("image %q: %w", r.Msg.GetReference(), errdefs.ErrNotFound)
	}
	return connect.NewResponse(&atollv1.RemoveImageResponse{Untagged: []string{"hello"}, Deleted: []string{"sha256:ab"}}), nil
}

func (f fakeImages) Push(_ context.Context, r *connect.Request[atollv1.PushImageRequest], s *connect.ServerStream[atollv1.PushImageResponse]) error {
	if r.Msg.GetReference() != "hello" {
		return hint.With(fmt.Errorf("pushing %q: %w", r.Msg.GetReference(), errdefs.ErrNotFound), "atoll tag")
	}
	s.Send(&atollv1.PushImageResponse{Kind: &atollv1.PushImageResponse_Transfer{Transfer: &atollv1.Transfer{Id: "sha256:" + strings.Repeat("ef", 32), Status: "exists", TotalBytes: 1024}}})
	return s.Send(&atollv1.PushImageResponse{Kind: &atollv1.PushImageResponse_Pushed{Pushed: &atollv1.PushedImage{Digest: "sha256:90", MissingPlatforms: []string{"linux/arm64"}}}})
}

// Save writes two messages, the second of which never comes for the image "cut".
func (f fakeImages) Save(_ context.Context, r *connect.Request[atollv1.SaveImagesRequest], s *connect.ServerStream[atollv1.SaveImagesResponse]) error {
	if err := s.Send(&atollv1.SaveImagesResponse{Data: []byte(strings.Join(r.Msg.GetReferences(), "+"))}); err != nil {
		return err
	}
	if r.Msg.GetReferences()[0] == "cut" {
		return errors.New("the disk is broken")
	}
	return s.Send(&atollv1.SaveImagesResponse{Data: []byte(" as " + r.Msg.GetFormat())})
}

// Load names each word of what it is sent; it refuses at the first message what begins with "bad".
func (f fakeImages) Load(_ context.Context, s *connect.BidiStream[atollv1.LoadImagesRequest, atollv1.LoadImagesResponse]) error {
	var all []byte
	for {
		m, err := s.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		all = append(all, m.GetData()...)
		if bytes.HasPrefix(all, []byte("bad")) {
			return hint.With(fmt.Errorf("loading images: %w", errdefs.ErrInvalidArgument), "save it again")
		}
	}
	f.mu.Lock()
	f.loaded = all
	f.mu.Unlock()
	for _, word := range strings.Fields(string(all[:min(len(all), 100)])) {
		reference, _ := strings.CutPrefix(word, "id:")
		l := &atollv1.LoadedImage{Digest: "sha256:1d", Reference: reference}
		if reference != word {
			l.Reference = ""
		}
		s.Send(&atollv1.LoadImagesResponse{Kind: &atollv1.LoadImagesResponse_Loaded{Loaded: l}})
	}
	return nil
}

func (f fakeImages) Import(_ context.Context, s *connect.BidiStream[atollv1.ImportImageRequest, atollv1.ImportImageResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.imported = first.GetStart()
	f.mu.Unlock()
	for err == nil {
		_, err = s.Receive()
	}
	return s.Send(&atollv1.ImportImageResponse{Kind: &atollv1.ImportImageResponse_Image{Image: &atollv1.Image{Digest: "sha256:1337"}}})
}

func (f fakeImages) History(context.Context, *connect.Request[atollv1.ImageHistoryRequest]) (*connect.Response[atollv1.ImageHistoryResponse], error) {
	return connect.NewResponse(&atollv1.ImageHistoryResponse{Steps: []*atollv1.ImageStep{
		{Id: "sha256:" + strings.Repeat("ab", 32), CreatedAt: timestamppb.New(epoch), CreatedBy: "CMD  [\"serve\"]", References: []string{"hello:1.0"}},
		{CreatedAt: timestamppb.New(epoch), CreatedBy: "RUN " + strings.Repeat("long ", 20), SizeBytes: 3 << 20, Comment: "kit"},
	}}), nil
}

func (f fakeImages) Prune(_ context.Context, r *connect.Request[atollv1.PruneImagesRequest]) (*connect.Response[atollv1.PruneImagesResponse], error) {
	f.mu.Lock()
	f.pruned = append(f.pruned, r.Msg)
	f.mu.Unlock()
	return connect.NewResponse(&atollv1.PruneImagesResponse{Untagged: []string{"old:1"}, Deleted: []string{"sha256:0d"}, ReclaimedBytes: 2 << 20}), nil
}

func (f fakeImages) Login(_ context.Context, r *connect.Request[atollv1.LoginRequest]) (*connect.Response[atollv1.LoginResponse], error) {
	if r.Msg.GetPassword() != "s3cret" {
		return nil, fmt.Errorf("logging in to %s: %w", r.Msg.GetRegistry(), errdefs.ErrUnauthenticated)
	}
	return connect.NewResponse(&atollv1.LoginResponse{}), nil
}

type fakeBuild struct{ *fake }

func (f fakeBuild) Build(_ context.Context, s *connect.BidiStream[atollv1.BuildRequest, atollv1.BuildResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	f.mu.Lock()
	f.built = start
	f.mu.Unlock()
	if start.GetTarget() == "broken" {
		return fmt.Errorf("building: Dockerfile:3\n   2 | FROM x\n>>> 3 | RUN false\nexit code 1: %w", errdefs.ErrInvalidArgument)
	}
	if start.GetCall() != "" {
		return s.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Report{Report: &atollv1.BuildReport{Text: "WARNING: Rule\n", ExitCode: 1}}})
	}
	var context []byte
	for ended := !start.GetContextStream(); !ended; {
		r, err := s.Receive()
		if err != nil {
			return err
		}
		context = append(context, r.GetContext()...)
		ended = r.GetContextEnd()
	}
	for i := range start.GetOutputs() {
		s.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Output{Output: &atollv1.OutputData{Index: uint32(i), Data: context}}})
	}
	if len(start.GetSsh()) > 0 {
		if err := f.askAgent(s, start.GetSsh()[0]); err != nil {
			return err
		}
	}
	return s.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Result{Result: &atollv1.BuildResult{
		Digest: "sha256:beef", Metadata: map[string]string{"containerimage.descriptor": "eyJhIjoxfQ=="},
	}}})
}

// askAgent sends an agent one request and keeps what it answers.
func (f fakeBuild) askAgent(s *connect.BidiStream[atollv1.BuildRequest, atollv1.BuildResponse], id string) error {
	s.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Agent{Agent: &atollv1.AgentData{Connection: 1, Id: id}}})
	s.Send(&atollv1.BuildResponse{Kind: &atollv1.BuildResponse_Agent{Agent: &atollv1.AgentData{Connection: 1, Data: f.question}}})
	var answer []byte // a length of four bytes, then as many
	for len(answer) < 4 || len(answer) < 4+int(binary.BigEndian.Uint32(answer)) {
		r, err := s.Receive()
		if err != nil {
			return err
		}
		answer = append(answer, r.GetAgent().GetData()...)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
	return nil
}

func (f fakeBuild) DiskUsage(context.Context, *connect.Request[atollv1.BuildDiskUsageRequest]) (*connect.Response[atollv1.BuildDiskUsageResponse], error) {
	return connect.NewResponse(&atollv1.BuildDiskUsageResponse{Records: []*atollv1.BuildCacheRecord{
		{Id: "abcdefghijklmno", Type: "regular", Description: "RUN make\nmore", SizeBytes: 3 << 20, LastUsedAt: timestamppb.New(epoch), CreatedAt: timestamppb.New(epoch)},
	}}), nil
}

func (f fakeBuild) Prune(_ context.Context, r *connect.Request[atollv1.PruneBuildRequest]) (*connect.Response[atollv1.PruneBuildResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cachePruned = r.Msg
	return connect.NewResponse(&atollv1.PruneBuildResponse{ReclaimedBytes: 5 << 20}), nil
}

type fakeBases struct{}

func (fakeBases) List(context.Context, *connect.Request[atollv1.ListBasesRequest]) (*connect.Response[atollv1.ListBasesResponse], error) {
	return connect.NewResponse(&atollv1.ListBasesResponse{Bases: []*atollv1.Base{{Name: "debian:bookworm", Description: "Debian 12"}}}), nil
}

func (fakeBases) Build(_ context.Context, r *connect.Request[atollv1.BuildBaseRequest], s *connect.ServerStream[atollv1.BuildBaseResponse]) error {
	s.Send(&atollv1.BuildBaseResponse{Kind: &atollv1.BuildBaseResponse_Line{Line: "I: installing " + r.Msg.GetMirror()}})
	return s.Send(&atollv1.BuildBaseResponse{Kind: &atollv1.BuildBaseResponse_Base{Base: &atollv1.Base{Name: r.Msg.GetName(), Digest: "sha256:ba5e"}}})
}

type fakeKernels struct {
	atollv1connect.UnimplementedKernelServiceHandler
}

func (fakeKernels) List(context.Context, *connect.Request[atollv1.ListKernelsRequest]) (*connect.Response[atollv1.ListKernelsResponse], error) {
	return connect.NewResponse(&atollv1.ListKernelsResponse{Kernels: []*atollv1.Kernel{{Name: "debian-6.1", Version: "6.1.0", Architecture: "amd64", SizeBytes: 8 << 20, Default: true, CreatedAt: timestamppb.New(epoch)}}}), nil
}

func (k fakeKernels) Get(ctx context.Context, _ *connect.Request[atollv1.GetKernelRequest]) (*connect.Response[atollv1.GetKernelResponse], error) {
	all, err := k.List(ctx, nil)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&atollv1.GetKernelResponse{Kernel: all.Msg.GetKernels()[0]}), nil
}

func (fakeKernels) Build(_ context.Context, r *connect.Request[atollv1.BuildKernelRequest], s *connect.ServerStream[atollv1.BuildKernelResponse]) error {
	s.Send(&atollv1.BuildKernelResponse{Kind: &atollv1.BuildKernelResponse_Line{Line: fmt.Sprintf("%s %s %q %s %d", r.Msg.GetSource(), r.Msg.GetVersion(), r.Msg.GetConfig(), r.Msg.GetArchitecture(), r.Msg.GetJobs())}})
	s.Send(&atollv1.BuildKernelResponse{Kind: &atollv1.BuildKernelResponse_Transfer{Transfer: &atollv1.Transfer{Id: "linux", Status: "Building a.o (1 files)"}}})
	return s.Send(&atollv1.BuildKernelResponse{Kind: &atollv1.BuildKernelResponse_Kernel{Kernel: &atollv1.Kernel{Name: cmp.Or(r.Msg.GetName(), "atoll-6.1.2")}}})
}

func (fakeKernels) Remove(_ context.Context, r *connect.Request[atollv1.RemoveKernelRequest]) (*connect.Response[atollv1.RemoveKernelResponse], error) {
	if r.Msg.GetName() == "ghost" {
		return nil, fmt.Errorf("kernel %q: %w", r.Msg.GetName(), errdefs.ErrNotFound)
	}
	return connect.NewResponse(&atollv1.RemoveKernelResponse{}), nil
}

func (fakeKernels) SetDefault(context.Context, *connect.Request[atollv1.SetDefaultKernelRequest]) (*connect.Response[atollv1.SetDefaultKernelResponse], error) {
	return connect.NewResponse(&atollv1.SetDefaultKernelResponse{}), nil
}

func (fakeKernels) Pull(_ context.Context, _ *connect.Request[atollv1.PullKernelRequest], s *connect.ServerStream[atollv1.PullKernelResponse]) error {
	return s.Send(&atollv1.PullKernelResponse{Kind: &atollv1.PullKernelResponse_Kernel{Kernel: &atollv1.Kernel{Name: "debian-6.1"}}})
}

type fakeSystem struct {
	atollv1connect.UnimplementedSystemServiceHandler
	*fake
}

func (f fakeSystem) Version(context.Context, *connect.Request[atollv1.VersionRequest]) (*connect.Response[atollv1.VersionResponse], error) {
	return connect.NewResponse(&atollv1.VersionResponse{Version: "v1", Commit: "c1", GoVersion: "go1", Platform: "linux/amd64", Pid: 42, Home: "/h"}), nil
}

func (f fakeSystem) Prune(context.Context, *connect.Request[atollv1.PruneSystemRequest]) (*connect.Response[atollv1.PruneSystemResponse], error) {
	return connect.NewResponse(&atollv1.PruneSystemResponse{Images: &atollv1.PruneImagesResponse{}, BuildCacheBytes: 5 << 20}), nil
}

func (f fakeSystem) Doctor(context.Context, *connect.Request[atollv1.DoctorRequest]) (*connect.Response[atollv1.DoctorResponse], error) {
	return connect.NewResponse(&atollv1.DoctorResponse{Checks: f.checks}), nil
}

func (f fakeSystem) Events(_ context.Context, r *connect.Request[atollv1.EventsRequest], s *connect.ServerStream[atollv1.Event]) error {
	f.mu.Lock()
	f.events = r.Msg
	f.mu.Unlock()
	s.Send(&atollv1.Event{Seq: 1, Time: timestamppb.New(epoch), Type: "machine", Action: "start", Id: "abc", Attributes: map[string]string{"name": "web", "image": "hello"}})
	if f.eventsEnd != nil {
		return f.eventsEnd
	}
	return errors.New("bus closed")
}

func (f fakeSystem) Shutdown(context.Context, *connect.Request[atollv1.ShutdownRequest]) (*connect.Response[atollv1.ShutdownResponse], error) {
	close(f.stop)
	return connect.NewResponse(&atollv1.ShutdownResponse{}), nil
}

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// atoll is one command line against one fake daemon.
type atoll struct {
	t    *testing.T
	fake *fake
	env  map[string]string
	in   string
}

func newAtoll(t *testing.T) *atoll {
	t.Helper()
	dir, err := os.MkdirTemp("", "atoll-cli") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := newFake(make(chan struct{}))
	s, err := f.listen(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &atoll{t: t, fake: f, env: map[string]string{"ATOLL_HOME": dir, "ATOLL_HOST": "unix://" + filepath.Join(dir, "s")}}
}

type result struct {
	code        int
	out, errOut string
}

func (a *atoll) run(args ...string) result {
	a.t.Helper()
	var out, errOut syncBuffer
	code := Main(a.t.Context(), args, a.environment(&out, &errOut))
	return result{code, out.String(), errOut.String()}
}

// ok runs a command that must succeed and returns its stdout.
func (a *atoll) ok(args ...string) string {
	a.t.Helper()
	r := a.run(args...)
	if r.code != 0 {
		a.t.Fatalf("atoll %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.errOut)
	}
	return r.out
}

func (a *atoll) environment(out, errOut *syncBuffer) Env {
	return Env{
		Stdin: strings.NewReader(a.in), Stdout: out, Stderr: errOut, Version: Version{"v0", "c0"},
		LookupEnv: func(k string) (string, bool) { v, ok := a.env[k]; return v, ok },
	}
}

// syncBuffer is written by copiers while a test reads it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}
func (s *syncBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }
