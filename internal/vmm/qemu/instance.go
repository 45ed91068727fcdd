package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/vmm"
	"github.com/atollvm/atoll/internal/vmm/qemu/qmp"
)

const tailSize = 4 << 10 // how much of a file's end is looked at for the reason of an end

// instance is one QEMU process.
type instance struct {
	spec  vmm.Spec
	argv  []string
	log   *slog.Logger
	pid   int
	pidfd *os.File
	child *os.Process // nil: started by an earlier process of ours

	shares []*os.Process // the virtiofsd of each share; none when started by an earlier process of ours

	closing context.Context // ends with Close
	close   context.CancelFunc
	control chan struct{} // closed when QMP answers
	qmp     *qmp.Client   // set before control is closed
	silent  chan struct{} // closed when QMP will say no more
	down    *shutdown     // QEMU's last words; valid after silent
	watched chan struct{} // closed when no one looks for a halt any more
	halted  atomic.Bool   // the guest's kernel stopped its CPUs for good, and we the process
	done    chan struct{}
	exit    vmm.Exit // valid after done

	mu      sync.Mutex // guards the rest
	agent   net.Conn
	console net.Conn
}

// shutdown is the data of QMP's SHUTDOWN event.
type shutdown struct {
	Guest  bool   `json:"guest"`
	Reason string `json:"reason"`
}

// watch takes charge of a running process.
func (d *Driver) watch(spec vmm.Spec, pid int, argv []string, child *os.Process, shares []*os.Process) (*instance, error) {
	pidfd, err := openPID(pid)
	if err != nil {
		return nil, err
	}
	if child == nil && !runs(pid, argv) { // it may have ended before the pidfd held it
		pidfd.Close()
		return nil, errors.Join(fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound), clean(spec))
	}
	i := &instance{
		spec: spec, argv: argv, log: d.opts.Log.With("instance", spec.ID), pid: pid, pidfd: pidfd, child: child, shares: shares,
		control: make(chan struct{}), silent: make(chan struct{}), watched: make(chan struct{}), done: make(chan struct{}),
	}
	i.closing, i.close = context.WithCancel(context.Background())
	go i.listen()
	go i.wait()
	go i.watchHalt()
	return i, nil
}

// haltLine is the last that a kernel says before its CPUs stop for good: on halt, and on poweroff where it has no way to switch off, as without
// ACPI. QEMU does not notice, and would run for ever.
var haltLine = regexp.MustCompile(`(?m)^\[ *\d+\.\d+\] reboot: System halted\r?$`)

const haltPoll = 250 * time.Millisecond

// watchHalt looks for that line in what is new on the console, and ends the process of a guest that has halted.
func (i *instance) watchHalt() {
	defer close(i.watched)
	tick := time.NewTicker(haltPoll)
	defer tick.Stop()
	path := filepath.Join(i.spec.Dir, vmm.ConsoleFile)
	for seen := int64(-1); ; {
		select {
		case <-i.closing.Done():
			return
		case <-i.done:
			return
		case <-tick.C:
		}
		info, err := os.Stat(path)
		if err != nil || info.Size() == seen {
			continue
		}
		seen = info.Size()
		if text, err := tail(path); err == nil && haltLine.Match(text) {
			i.log.Debug("the guest has halted")
			i.halted.Store(true)
			if err := killPID(i.pidfd); err != nil {
				i.log.Warn("a halted guest is not ended", "error", err)
			}
			return
		}
	}
}

// listen speaks with QMP until it ends.
func (i *instance) listen() {
	defer close(i.silent)
	conn, err := (&net.Dialer{}).DialContext(i.closing, "unix", filepath.Join(i.spec.Dir, qmpSocket))
	if err != nil {
		i.log.Debug("qmp does not answer", "error", err)
		return
	}
	client, err := qmp.New(i.closing, conn)
	if err != nil {
		i.log.Debug("qmp does not answer", "error", err)
		return
	}
	defer client.Close()
	defer context.AfterFunc(i.closing, func() { client.Close() })()
	i.qmp = client
	close(i.control)
	for e := range client.Events() {
		var err error
		switch e.Name {
		case "SHUTDOWN":
			s := &shutdown{}
			if err = json.Unmarshal(e.Data, s); err == nil {
				i.down = s
			}
		case "VSERPORT_CHANGE":
			err = i.portChanged(e.Data)
		}
		if err != nil {
			i.log.Debug("qmp event makes no sense", "event", e.Name, "error", err)
		}
	}
}

// portChanged ends the agent's channel when nobody in the guest has the port open any more: its agent was killed. QEMU itself keeps the
// channel, silent for ever.
func (i *instance) portChanged(data json.RawMessage) error {
	var p struct{ Open bool }
	if err := json.Unmarshal(data, &p); err != nil || p.Open {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.agent != nil {
		i.agent.Close()
	}
	return nil
}

// wait ends with the process. It outlives Close for a child, to reap it.
func (i *instance) wait() {
	ended := waitPID(i.pidfd)
	var state *os.ProcessState
	if i.child != nil {
		state, _ = i.child.Wait()
	}
	if ended == nil || i.child != nil {
		endShares(i.shares)
	}
	if ended != nil || i.closing.Err() != nil {
		return // closed: another may have taken over the directory by now
	}
	<-i.silent // soon: the other end of its connection is gone
	i.exit = i.reason(state)
	i.log.Debug("qemu ended", "reason", i.exit.Reason, "detail", i.exit.Detail)
	if err := clean(i.spec); err != nil {
		i.log.Warn("an ended instance leaves files behind", "error", err)
	}
	close(i.done)
}

// reason finds out why the process ended. state is nil when it was not our child.
func (i *instance) reason(state *os.ProcessState) vmm.Exit {
	if i.halted.Load() {
		return vmm.Exit{Reason: vmm.ReasonGuest, Detail: "guest-halt"}
	}
	byGuest := state != nil && state.Success()
	if i.down != nil {
		byGuest = i.down.Guest
	}
	if byGuest {
		if line := panicLine(filepath.Join(i.spec.Dir, vmm.ConsoleFile)); line != "" {
			return vmm.Exit{Reason: vmm.ReasonPanic, Detail: line}
		}
		if i.down != nil && i.down.Reason == "guest-panic" { // said by its pvpanic device
			return vmm.Exit{Reason: vmm.ReasonPanic, Detail: i.down.Reason}
		}
		if i.down != nil {
			return vmm.Exit{Reason: vmm.ReasonGuest, Detail: i.down.Reason, Reset: i.down.Reason == "guest-reset"}
		}
		return vmm.Exit{Reason: vmm.ReasonGuest}
	}
	var words []string
	if i.down != nil {
		words = append(words, i.down.Reason)
	}
	if state != nil {
		words = append(words, state.String())
	}
	for _, name := range []string{stderrFile, shareLog} {
		if text, err := tail(filepath.Join(i.spec.Dir, name)); err == nil && len(bytes.TrimSpace(text)) > 0 {
			words = append(words, strings.TrimSpace(string(text)))
		}
	}
	return vmm.Exit{Reason: vmm.ReasonDied, Detail: strings.Join(words, ": ")}
}

// panicLine returns the line of the guest's panic from the end of its console, or "".
func panicLine(console string) string {
	text, err := tail(console)
	if err != nil {
		return ""
	}
	_, after, found := bytes.Cut(text, []byte("Kernel panic - not syncing"))
	if !found {
		return ""
	}
	line, _, _ := bytes.Cut(after, []byte("\n"))
	return "Kernel panic - not syncing" + strings.TrimSpace(string(line))
}

func tail(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-tailSize), tailSize))
}

func (i *instance) PID() int { return i.pid }

func (i *instance) Accelerator() string {
	if at := slices.Index(i.argv, "-accel"); at >= 0 && at+1 < len(i.argv) {
		return i.argv[at+1]
	}
	return ""
}

// ready waits until QEMU has read its command line, or says why it never will.
func (i *instance) ready(ctx context.Context) error {
	select {
	case <-i.control:
		return nil
	case <-i.done:
		return fmt.Errorf("QEMU ended: %s: %w", i.exit.Detail, errdefs.ErrUnavailable)
	case <-i.closing.Done():
		return net.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for QEMU: %w", context.Cause(ctx))
	}
}

func (i *instance) DialAgent(ctx context.Context) (net.Conn, error) {
	conn, err := i.dial(ctx, agentSocket, &i.agent)
	if err != nil {
		return nil, fmt.Errorf("opening the agent's port of %s: %w", i.spec.ID, err)
	}
	return conn, nil
}

func (i *instance) DialConsole(ctx context.Context) (net.Conn, error) {
	conn, err := i.dial(ctx, consoleSocket, &i.console)
	if err != nil {
		return nil, fmt.Errorf("opening the console of %s: %w", i.spec.ID, err)
	}
	return conn, nil
}

// dial connects to one of QEMU's sockets in place of the connection that is there.
func (i *instance) dial(ctx context.Context, socket string, current *net.Conn) (net.Conn, error) {
	if err := i.ready(ctx); err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if *current != nil {
		(*current).Close() // QEMU serves one at a time: the next one waits in the queue until this one is closed
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(i.spec.Dir, socket))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	*current = conn
	return conn, nil
}

func (i *instance) Done() <-chan struct{} { return i.done }

func (i *instance) Exit() vmm.Exit {
	select {
	case <-i.done:
		return i.exit
	default:
		return vmm.Exit{}
	}
}

func (i *instance) Kill(ctx context.Context) error {
	select {
	case <-i.done:
		return nil
	default:
	}
	if err := killPID(i.pidfd); err != nil {
		return fmt.Errorf("killing QEMU of %s: %w", i.spec.ID, err)
	}
	select {
	case <-i.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("killing QEMU of %s: %w", i.spec.ID, context.Cause(ctx))
	}
}

func (i *instance) Pause(ctx context.Context) error { return i.command(ctx, "pausing", "stop") }

func (i *instance) Resume(ctx context.Context) error { return i.command(ctx, "resuming", "cont") }

func (i *instance) PressPowerButton(ctx context.Context) error {
	return i.command(ctx, "pressing the power button of", "system_powerdown")
}

func (i *instance) command(ctx context.Context, doing, name string) error {
	err := i.ready(ctx)
	if err == nil {
		err = i.qmp.Execute(ctx, name, nil, nil)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", doing, i.spec.ID, err)
	}
	return nil
}

func (i *instance) Close() error {
	i.close()
	<-i.silent
	<-i.watched
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, conn := range []net.Conn{i.agent, i.console} {
		if conn != nil {
			conn.Close()
		}
	}
	if err := i.pidfd.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
