package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/host"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/atollvm/atoll/internal/provision/hostkey"
	"github.com/atollvm/atoll/internal/provision/plan"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Due is what the next start has to do of a machine's provisioning.
type Due string

const (
	DueNothing Due = ""
	// DueFirst: the first boot has not been finished. Each try begins with a fresh scratch disk, so that none sees half of another.
	DueFirst Due = "first"
	DueAgain Due = "again" // on the disk as it is
)

// ProvisionStatus is what has become of a machine's provisioning. The request itself lies in a file of the machine's directory, as it is
// large, and secret; the record, which is rewritten at every change of state, has none of it.
type ProvisionStatus struct {
	Due        Due
	Done       time.Time     // of the last that was finished
	Digest     digest.Digest // of the request that was applied then
	FailedStep string        // of the last that was not finished
	ExitCode   *int          // of the command that failed
	Hostname   string        // that a document asked for and got
	Log        string        // path of what commands and package managers wrote
	Rounds     int           // how often it was applied again to a system without an agent
	Step       string        `json:"-"` // under way
}

// stepProvisioning is the step in which a plan is made.
const stepProvisioning = "provisioning"

// Files of a machine's directory.
const (
	requestFile  = "provision.json"
	standingFile = "standing.json"
	spoolDir     = "spool"
)

// kept is the request of a machine and what was made for it, as in its file.
type kept struct {
	Request  provision.Request
	HostKeys []hostkey.Key
}

// prepareProvisioning keeps a new machine's request, with host keys of its own. The files are there before the record is.
func prepareProvisioning(dir string, r provision.Request) error {
	keys, err := hostkey.Generate()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// Nobody has seen the keys of a machine that has not run: they are not worth waiting for the disk, which takes longer than all else here.
	return write(filepath.Join(dir, requestFile), kept{r, keys}, !r.Empty())
}

// readRequest reads what was asked for a machine, and its host keys, which are made anew where nothing else is lost with them.
func readRequest(dir string, m *Machine) (k kept, err error) {
	if err := readWhole(filepath.Join(dir, requestFile), &k); err != nil {
		return k, err
	}
	if len(k.HostKeys) > 0 {
		return k, nil
	}
	if r := m.Spec.Provisioning; !r.Empty() || len(r.Withheld) > 0 {
		err := fmt.Errorf("reading %s: it is empty or missing: %w", filepath.Join(dir, requestFile), errdefs.ErrDataLoss)
		return k, hint.With(err, "say again what is wanted: atoll start --reprovision OPTIONS %s", m.Spec.Name)
	}
	if k.HostKeys, err = hostkey.Generate(); err != nil {
		return k, err
	}
	return k, writeWhole(filepath.Join(dir, requestFile), k)
}

// writeWhole replaces a file of secrets by v as JSON, or leaves it as it is.
func writeWhole(path string, v any) error { return write(path, v, true) }

func write(path string, v any, sync bool) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return os.Rename(path+".new", path)
}

// readWhole reads what writeWhole wrote; a file that is not there leaves v as it is.
func readWhole(path string, v any) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(data) == 0 { // as a power cut leaves one that was not synced
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("reading %s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	return nil
}

// Reprovision starts a machine and applies its provisioning again, or another one in its stead where r is not nil.
func (ms *Machines) Reprovision(ctx context.Context, name string, r *provision.Request) (Machine, []string, error) {
	e, err := ms.find(name)
	if err != nil {
		return Machine{}, nil, err
	}
	if err := e.take(ctx); err != nil {
		return Machine{}, nil, err
	}
	defer e.give()
	m := e.get()
	fail := func(err error) (Machine, []string, error) {
		return m, nil, fmt.Errorf("provisioning machine %q again: %w", m.Spec.Name, err)
	}
	if m.State.Alive() {
		return fail(hint.With(fmt.Errorf("it is %s: %w", m.State, errdefs.ErrFailedPrecondition), "stop it first: atoll stop %s", m.Spec.Name))
	}
	var warnings []string
	k, err := readRequest(e.dir, &m)
	if err != nil && (r == nil || !errdefs.IsDataLoss(err)) {
		return fail(err)
	}
	if r != nil {
		if m.ownSystem() {
			err = r.CheckNoCloud()
		} else {
			warnings, err = checkRequest(*r)
		}
		if err != nil {
			return fail(err)
		}
		k.Request = *r
	}
	if len(k.HostKeys) == 0 { // lost with the request that this one replaces
		if k.HostKeys, err = hostkey.Generate(); err != nil {
			return fail(err)
		}
	}
	if err := writeWhole(filepath.Join(e.dir, requestFile), k); err != nil {
		return fail(err)
	}
	err = ms.commit(e, "", func(m *Machine) {
		if m.Provisioning.Due == DueNothing {
			m.Provisioning.Due = DueAgain
		}
		m.Spec.Provisioning = k.Request.Redacted()
	})
	if err != nil {
		return fail(err)
	}
	m, more, err := ms.start(ctx, e)
	return m, append(warnings, more...), err
}

// compile makes the plan of this start: all of the request where it is due, else what holds at each boot.
func (s *starting) compile(ctx context.Context) (err error) {
	if s.m.Provisioning.Due == DueNothing {
		var standing provision.Standing
		if err := readWhole(filepath.Join(s.e.dir, standingFile), &standing); err != nil {
			return err
		}
		s.plan, err = standing.Plan()
		return err
	}
	k, err := readRequest(s.e.dir, &s.m)
	if err != nil {
		return err
	}
	if err := s.log.begin(); err != nil {
		return err
	}
	spool := filepath.Join(s.e.dir, spoolDir)
	if err := os.RemoveAll(spool); err != nil {
		return err
	}
	s.undo = append(s.undo, func(context.Context) error { return os.RemoveAll(spool) })
	s.plan, err = provision.Compile(ctx, k.Request, provision.Options{
		HostKeys: k.HostKeys, Spool: spool, Transport: s.ms.Fetch, Alive: func() { s.patience.Reset(startTimeout) },
	})
	if err != nil {
		return err
	}
	s.plan.First = true
	s.warnings = append(s.warnings, s.plan.Warnings...)
	s.digest, err = digestOf(k.Request)
	return errors.Join(err, s.takeHostname())
}

func digestOf(r provision.Request) (digest.Digest, error) {
	data, err := json.Marshal(r)
	return digest.FromBytes(data), err
}

// takeHostname gives the machine the name that a document asks for, unless its user has chosen one.
func (s *starting) takeHostname() error {
	name, sp := s.plan.Hostname, &s.m.Spec
	if name == "" || sp.Hostname != defaultHostname(sp.Name) && sp.Hostname != s.m.Provisioning.Hostname {
		return nil
	}
	if !hostnameForm.MatchString(name) {
		return hint.With(fmt.Errorf("hostname %q: %w", shorten(name), errdefs.ErrInvalidArgument), "a hostname has letters, digits, '-' and '.', at most 64")
	}
	sp.Hostname, s.m.Provisioning.Hostname = name, name
	return nil
}

// provision puts the plan into the guest's configuration.
func (s *starting) provision(c *agentv1.Config) {
	c.Hosts = append(slices.Clone(s.plan.Hosts), c.Hosts...) // the first line with a name says what its full name is
	c.NtpServers = s.plan.NTPServers
	if !isEmpty(s.plan) {
		c.Provision = s.plan.Provision
	}
}

// contents are the bytes that travel beside the guest's configuration.
func (s *starting) contents() []host.Content {
	var out []host.Content
	for _, c := range s.plan.Contents() {
		out = append(out, host.Content(c))
	}
	return out
}

// isEmpty says that the guest need not be told of a plan.
func isEmpty(p *plan.Plan) bool {
	return !p.GetFirst() && len(p.GetMounts())+len(p.GetSecrets())+len(p.GetCommands()) == 0 && p.GetLocale() == ""
}

// kernelArgs is a kernel's command line as the plan would have it.
func kernelArgs(args string, p *plan.Plan) string {
	if len(p.KernelArgs)+len(p.DropArgs) == 0 {
		return args
	}
	words := slices.DeleteFunc(strings.Fields(args), func(w string) bool { return slices.Contains(p.DropArgs, w) })
	for _, w := range p.KernelArgs {
		if !slices.Contains(words, w) {
			words = append(words, w)
		}
	}
	return strings.Join(words, " ")
}

// provisioned keeps what later boots need, once the guest has carried the plan out, and gives the record's new status.
func (s *starting) provisioned() error {
	if s.m.Provisioning.Due == DueNothing {
		return nil
	}
	if s.m.ownSystem() {
		s.diskProvisioned()
		return nil
	}
	standing, err := provision.StandingOf(s.plan)
	path := filepath.Join(s.e.dir, standingFile)
	switch {
	case err != nil:
	case standing.Empty():
		if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	default:
		err = writeWhole(path, standing)
	}
	s.m.Provisioning = ProvisionStatus{Done: time.Now(), Digest: s.digest, Hostname: s.m.Provisioning.Hostname, Log: s.m.Provisioning.Log}
	return errors.Join(err, os.RemoveAll(filepath.Join(s.e.dir, spoolDir)))
}

// guestProvisioning is how the names of the guest's steps begin that are provisioning's.
const guestProvisioning = "provisioning: "

// defaultPatience is how long a step of provisioning may take without a word: a compiler or a slow mirror says nothing for minutes.
const defaultPatience = 10 * time.Minute

// guestStep takes notice of a step of the guest's configuration that begins.
func (s *starting) guestStep(name string) {
	name, ok := strings.CutPrefix(name, guestProvisioning)
	if !ok {
		s.patience.Reset(startTimeout)
		s.provisionStep = ""
		s.setStep("")
		return
	}
	s.patience.Reset(s.ms.provisionPatience())
	s.provisionStep = name
	s.setStep(name)
}

// guestOutput keeps what a step of the guest's configuration writes.
func (s *starting) guestOutput(data []byte) {
	s.patience.Reset(s.ms.provisionPatience())
	if err := s.log.write(s.provisionStep, data); err != nil {
		s.ms.Log.Error("writing a provisioning log", "machine", s.m.ID, "err", err)
	}
}

func (ms *Machines) provisionPatience() time.Duration {
	if ms.ProvisionPatience > 0 {
		return ms.ProvisionPatience
	}
	return defaultPatience
}

// setStep shows the step that is under way to whoever asks for the machine.
func (s *starting) setStep(name string) {
	s.e.mu.Lock()
	defer s.e.mu.Unlock()
	s.e.m.Provisioning.Step = name
}

// provisionFailed is the record's status after a failed start.
func (s *starting) provisionFailed(cause error) ProvisionStatus {
	p := s.m.Provisioning
	p.FailedStep, p.ExitCode, p.Step = s.provisionStep, nil, ""
	if s.running == stepProvisioning {
		p.FailedStep = stepProvisioning
	}
	if f := (*host.Failure)(nil); p.FailedStep != "" && errors.As(cause, &f) {
		p.ExitCode = f.ExitCode
	}
	return p
}

// withOutput adds the end of what the failed step of provisioning wrote.
func (s *starting) withOutput(cause error) error {
	if f := (*host.Failure)(nil); errors.As(cause, &f) {
		// The step is named already.
		message := strings.TrimPrefix(f.Message, strings.TrimPrefix(s.provisionStep, "command ")+": ")
		cause = &host.Failure{Class: f.Class, Message: message, ExitCode: f.ExitCode}
	}
	tail := s.log.tail(s.provisionStep)
	if tail == "" {
		return cause
	}
	return hint.With(fmt.Errorf("%w; its last lines:\n%s", cause, tail), "see all of it: atoll logs --provisioning %s", s.m.Spec.Name)
}
