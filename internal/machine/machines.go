package machine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/atollvm/atoll/internal/diskimage"
	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"github.com/atollvm/atoll/internal/state"
	"github.com/atollvm/atoll/internal/vmm"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Options is what the room needs from others.
type Options struct {
	Dir      string // one directory per machine below it
	Host     string // this host's ID
	BootID   string // of this boot of the host
	DB       *state.DB
	Drivers  map[string]vmm.Driver // by name; "auto" is the one to prefer
	Images   Images
	Disks    Disks
	Kernels  Kernels
	Networks Networks
	Events   *event.Bus
	Log      *slog.Logger
	// Fetch makes the requests of documents that refer to others; nil: Go's default.
	Fetch *http.Transport
	// ProvisionPatience is how long a step of provisioning may take without a word; 0: 10 min.
	ProvisionPatience time.Duration
}

// Machines is all machines of this host.
type Machines struct {
	Options
	records records
	life    context.Context // ends with Close; supervision stops, machines run on
	endLife context.CancelFunc
	workers sync.WaitGroup

	mu     sync.Mutex // guards the maps; taken before an entry's mu
	byID   map[ID]*entry
	byName map[string]*entry
}

// entry is one machine in memory.
type entry struct {
	dir  string
	log  *outlog.Log
	turn chan struct{} // holds one token: commands that change the machine take turns

	mu      sync.Mutex // guards the rest
	m       Machine
	unsaved bool          // m has what its record has not
	failed  bool          // the record could not be written when it should have been
	run     *run          // while a VMM runs
	changed chan struct{} // closed and replaced at every commit
	gone    bool

	cancelStart context.CancelFunc // while a start is under way
	stopAsked   bool               // since the last start
}

// Open reads the records. Recover must follow before anything else is called.
func Open(o Options) (*Machines, error) {
	records, err := state.Of[Machine](o.DB, "machines")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening machines: %w", err)
	}
	ms := &Machines{Options: o, records: records, byID: map[ID]*entry{}, byName: map[string]*entry{}}
	ms.life, ms.endLife = context.WithCancel(context.Background())
	ms.workers.Go(ms.boundConsoles)
	ms.workers.Go(ms.keepClocks)
	ms.workers.Go(ms.keepRecords)
	all, err := records.All()
	if err != nil {
		return nil, fmt.Errorf("opening machines: %w", err)
	}
	for _, m := range all {
		if _, err := ms.addLocked(m); err != nil {
			return nil, fmt.Errorf("opening machine %s: %w", m.ID.Short(), err)
		}
	}
	if err := ms.sweep(); err != nil {
		return nil, fmt.Errorf("opening machines: %w", err)
	}
	return ms, nil
}

const (
	consoleLimit = 16 << 20
	consoleCheck = 5 * time.Second
)

// boundConsoles empties serial consoles that have grown past all use, so that no guest can fill the host's disk.
func (ms *Machines) boundConsoles() {
	tick := time.NewTicker(consoleCheck)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ms.life.Done():
			return
		}
		for _, m := range ms.List() {
			path := ms.ConsolePath(m)
			if st, err := os.Stat(path); m.State.Alive() && err == nil && st.Size() > consoleLimit {
				if err := os.Truncate(path, 0); err != nil {
					ms.Log.Error("bounding a console", "machine", m.ID, "err", err)
				}
			}
		}
	}
}

func (ms *Machines) dirOf(id ID) string { return filepath.Join(ms.Dir, id.Short()) }

// sweep removes what a Create that was cut off has left: a directory without a record, in which no machine has run.
func (ms *Machines) sweep() error {
	dirs, err := os.ReadDir(ms.Dir)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for id := range ms.byID {
		known[id.Short()] = true
	}
	var errs []error
	for _, d := range dirs {
		path := filepath.Join(ms.Dir, d.Name())
		if known[d.Name()] || !d.IsDir() || !idForm.MatchString(d.Name()) {
			continue
		}
		if !hasRun(path) {
			errs = append(errs, os.RemoveAll(path))
		}
	}
	return errors.Join(errs...)
}

// hasRun says whether a machine's directory has a disk with what it wrote; when in doubt it has.
func hasRun(dir string) bool {
	for _, disk := range []string{scratchFile, overlayFile} {
		if _, err := os.Lstat(filepath.Join(dir, disk)); !errors.Is(err, os.ErrNotExist) {
			return true
		}
	}
	return false
}

func (ms *Machines) addLocked(m Machine) (*entry, error) {
	dir := ms.dirOf(m.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l, err := outlog.Open(dir, m.Spec.logLimits())
	if err != nil {
		return nil, err
	}
	e := &entry{dir: dir, log: l, m: m, turn: make(chan struct{}, 1), changed: make(chan struct{})}
	ms.byID[m.ID], ms.byName[m.Spec.Name] = e, e
	return e, nil
}

// Close stops supervising; the machines run on.
func (ms *Machines) Close() error {
	ms.endLife()
	ms.workers.Wait()
	ms.mu.Lock()
	defer ms.mu.Unlock()
	var errs []error
	for _, e := range ms.byID {
		errs = append(errs, ms.save(e), e.log.Close())
	}
	return errors.Join(errs...)
}

// Create makes a machine: a record and a directory, nothing that runs. The warnings are for its user.
func (ms *Machines) Create(ctx context.Context, s Spec) (m Machine, warnings []string, err error) {
	chosen := s.Name != ""
	if !chosen {
		s.Name = madeUpName()
	}
	patient, sized := s.StopTimeout == 0, s.DiskBytes != 0
	s = s.withDefaults()
	request := s.Provisioning
	if s.Disk != "" {
		err = request.CheckNoCloud()
	} else {
		warnings, err = checkRequest(request)
	}
	if err := errors.Join(s.validate(), err); err != nil {
		return Machine{}, nil, fmt.Errorf("creating machine: %w", err)
	}
	if s.Disk != "" && s.Kernel != "" && (s.Network == NoNetwork || s.Metadata.Disabled) && !request.Empty() {
		warnings = append(warnings, "what is to be set in the guest may not arrive: with --kernel a disk image's cloud-init is told by the metadata service, and this machine has none")
	}
	s.Provisioning = request.Redacted()
	release := ms.Images.Hold() // until the record names the image as in use
	defer release()
	img, disk, err := ms.bootable(ctx, &s, sized)
	if err != nil {
		return Machine{}, nil, fmt.Errorf("creating machine %q: %w", s.Name, err)
	}
	s.Labels = withImageLabels(s.Labels, img.Labels)
	if patient && (disk != nil || imageInit(s, img)) {
		s.StopTimeout = DefaultInitStopTimeout
	}
	if s.Kernel != "" {
		if _, _, err := ms.Kernels.Boot(ctx, s.Kernel); err != nil {
			return Machine{}, nil, fmt.Errorf("creating machine %q: %w", s.Name, err)
		}
	}
	if s.Network != NoNetwork {
		if _, _, err := ms.Networks.Get(s.Network); err != nil {
			return Machine{}, nil, fmt.Errorf("creating machine %q: %w", s.Name, err)
		}
	}
	m = Machine{ID: newID(), Host: ms.Host, Spec: s, State: Created, Image: img, Disk: disk, Created: time.Now()}
	dir := ms.dirOf(m.ID)
	m.Provisioning = ProvisionStatus{Due: DueFirst, Log: filepath.Join(dir, provisionLogFile)}
	if err := prepareProvisioning(dir, request); err != nil {
		return Machine{}, nil, errors.Join(fmt.Errorf("creating machine %q: keeping its provisioning: %w", s.Name, err), os.RemoveAll(dir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()

	ms.mu.Lock()
	defer ms.mu.Unlock()
	for !chosen && ms.byName[m.Spec.Name] != nil {
		m.Spec.Name = madeUpName() + "_" + m.ID.Short()[:4]
		m.Spec.Hostname = s.Hostname
	}
	if other := ms.byName[m.Spec.Name]; other != nil {
		err := fmt.Errorf("creating machine %q: the name is in use by machine %s: %w", m.Spec.Name, other.m.ID.Short(), errdefs.ErrAlreadyExists)
		return Machine{}, nil, hint.With(err, "choose another --name, or remove that one: atoll rm -f %s", m.Spec.Name)
	}
	e, err := ms.addLocked(m)
	if err != nil {
		return Machine{}, nil, fmt.Errorf("creating machine %q: %w", m.Spec.Name, err)
	}
	if err := ms.records.Put(string(m.ID), m); err != nil {
		delete(ms.byID, m.ID)
		delete(ms.byName, m.Spec.Name)
		return Machine{}, nil, errors.Join(fmt.Errorf("creating machine %q: %w", m.Spec.Name, err), e.log.Close())
	}
	ms.publish(&m, "create", nil)
	return m, warnings, nil
}

// bootable finds what a machine that is to be made will boot: an image or, where the spec asks for one, a disk image.
func (ms *Machines) bootable(ctx context.Context, s *Spec, sized bool) (Image, *diskimage.Image, error) {
	if s.Disk != "" {
		disk, err := openDisk(s, sized)
		return Image{}, disk, err
	}
	img, err := ms.Images.Find(ctx, s.Image, s.Platform)
	if err == nil {
		_, err = argv(*s, img)
	}
	if err == nil {
		err = errors.Join(checkInit(*s, img), checkExposed(*s, img))
	}
	return img, nil, err
}

// Get returns the machine of that name, ID or unambiguous ID prefix.
func (ms *Machines) Get(name string) (Machine, error) {
	e, err := ms.find(name)
	if err != nil {
		return Machine{}, err
	}
	return e.get(), nil
}

// List returns all machines, newest first.
func (ms *Machines) List() []Machine {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	all := make([]Machine, 0, len(ms.byID))
	for _, e := range ms.byID {
		all = append(all, e.get())
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Created.After(all[j].Created) })
	return all
}

// UsersOf names the machines made from an image.
func (ms *Machines) UsersOf(img digest.Digest) []string {
	var names []string
	for _, m := range ms.List() {
		if m.Image.Digest == img {
			names = append(names, m.Spec.Name)
		}
	}
	return names
}

// UsersOfKernel names the machines that ask for a kernel or run on it now.
func (ms *Machines) UsersOfKernel(kernel string) []string {
	var names []string
	for _, m := range ms.List() {
		if m.Spec.Kernel == kernel || m.VMM.Kernel == kernel && m.State.Alive() {
			names = append(names, m.Spec.Name)
		}
	}
	return names
}

func (ms *Machines) find(name string) (*entry, error) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if e := ms.byName[name]; e != nil {
		return e, nil
	}
	var found *entry
	for id, e := range ms.byID {
		if len(name) < 1 || !strings.HasPrefix(string(id), name) {
			continue
		}
		if found != nil {
			return nil, hint.With(fmt.Errorf("machine %q: several IDs begin so: %w", name, errdefs.ErrInvalidArgument), "give more digits of the ID")
		}
		found = e
	}
	if found == nil {
		return nil, hint.With(fmt.Errorf("machine %q: %w", shorten(name), errdefs.ErrNotFound), "atoll ps -a lists the machines")
	}
	return found, nil
}

func (e *entry) get() Machine {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.m
}

// take waits for the machine's turn.
func (e *entry) take(ctx context.Context) error {
	select {
	case e.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for another command on machine %q: %w", e.get().Spec.Name, ctx.Err())
	}
}

func (e *entry) give() { <-e.turn }

func (ms *Machines) publish(m *Machine, action string, more map[string]string) {
	a := map[string]string{"name": m.Spec.Name, "image": cmp.Or(m.Spec.Image, m.Spec.Disk)}
	if action == "die" {
		a["exitCode"], a["reason"] = fmt.Sprint(m.ExitCode), string(m.Reason)
	}
	if status, ok := strings.CutPrefix(action, "health_status: "); ok {
		a["healthStatus"] = status
	}
	for k, v := range more {
		a[k] = v
	}
	ms.Events.Publish(event.Event{Type: event.Machine, Action: action, ID: string(m.ID), Attributes: a})
}

// until waits for the record to fulfil ok.
func (e *entry) until(ctx context.Context, ok func(e *entry) bool) error {
	for {
		e.mu.Lock()
		done, changed := ok(e), e.changed
		e.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Wait returns the machine once it does not run.
func (ms *Machines) Wait(ctx context.Context, name string) (Machine, error) {
	e, err := ms.find(name)
	if err != nil {
		return Machine{}, err
	}
	if err := e.until(ctx, func(e *entry) bool { return !e.m.State.Alive() }); err != nil {
		return Machine{}, fmt.Errorf("waiting for machine %q: %w", name, err)
	}
	return e.get(), nil
}

func notRunning(m Machine) error {
	err := fmt.Errorf("machine %q is not running (%s): %w", m.Spec.Name, m.State, errdefs.ErrFailedPrecondition)
	return hint.With(err, "start it: atoll start %s", m.Spec.Name)
}
