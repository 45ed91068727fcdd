package machine

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/machine/outlog"
	"github.com/atollvm/atoll/internal/metadata"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/google/go-cmp/cmp"
)

// fullDisk is records on a disk that may be full.
type fullDisk struct {
	records
	full atomic.Bool
}

func (d *fullDisk) Put(id string, m Machine) error {
	if d.full.Load() {
		return syscall.ENOSPC
	}
	return d.records.Put(id, m)
}

func onFullDisk(t *testing.T) (*Machines, *guests, *fullDisk) {
	t.Helper()
	g := &guests{runs: map[string]*guest{}}
	ms := openWith(t, t.TempDir(), g)
	d := &fullDisk{records: ms.records}
	ms.records = d
	g.guest = started(func(net.Conn, *agentv1.Request) {})
	return ms, g, d
}

func stored(t *testing.T, d *fullDisk, m Machine) Machine {
	t.Helper()
	all, err := d.All()
	if err != nil {
		t.Fatal(err)
	}
	return all[string(m.ID)]
}

// A first boot that is not on record has not been: else the next daemon would kill the machine and replace its disk.
func TestAFirstStartThatCannotBeRecordedFails(t *testing.T) {
	t.Parallel()
	ms, g, d := onFullDisk(t)
	create(t, ms, "web")
	g.guest = agentThat(func(s net.Conn, req *agentv1.Request) {
		if req.GetConfigure() != nil {
			d.full.Store(true)
			answer(s)
		}
	})
	m, _, err := ms.Start(t.Context(), "web")
	if err == nil || !strings.Contains(err.Error(), `starting machine "web": record: `) || !strings.Contains(err.Error(), "no space left") || hint.Of(err) == "" {
		t.Fatalf("%v, hint %q", err, hint.Of(err))
	}
	if m.State != Failed || m.Provisioning.Due != DueFirst {
		t.Errorf("%s, due %q", m.State, m.Provisioning.Due)
	}
	select {
	case <-g.runs[m.ID.Short()].done:
	default:
		t.Error("the VMM runs on")
	}
	d.full.Store(false)
	ms.saveFailed()
	if got := stored(t, d, m); got.State != Failed || got.Provisioning.Due != DueFirst {
		t.Errorf("stored: %s, due %q", got.State, got.Provisioning.Due)
	}
	g.guest = started(func(net.Conn, *agentv1.Request) {})
	if m, _, err = ms.Start(t.Context(), "web"); err != nil || stored(t, d, m).Provisioning.Due != DueNothing {
		t.Errorf("with room again: %v", err)
	}
}

func TestALaterStartIsRecordedOnceThereIsRoom(t *testing.T) {
	t.Parallel()
	ms, g, d := onFullDisk(t)
	create(t, ms, "web")
	if _, _, err := ms.Start(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	m, err := ms.Stop(t.Context(), "web", new(time.Duration))
	if err != nil {
		t.Fatal(err)
	}
	d.full.Store(true)
	if m, _, err := ms.Start(t.Context(), "web"); err == nil || m.State != Stopped {
		t.Fatalf("nothing is started that cannot be recorded: %s, %v", m.State, err)
	}
	d.full.Store(false)
	g.guest = agentThat(func(s net.Conn, req *agentv1.Request) {
		if req.GetConfigure() != nil {
			d.full.Store(true)
			answer(s)
		}
	})
	if _, _, err := ms.Start(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, d, m).State; got != Starting {
		t.Fatalf("stored: %s", got)
	}
	ms.saveFailed()
	d.full.Store(false)
	ms.saveFailed()
	if got := stored(t, d, m).State; got != Running {
		t.Errorf("stored: %s", got)
	}
	d.full.Store(true)
	if m, err := ms.Stop(t.Context(), "web", new(time.Duration)); err != nil || m.State != Stopped {
		t.Errorf("stopping on a full disk: %s, %v", m.State, err)
	}
}

func TestSweepSparesDisks(t *testing.T) {
	g := &guests{runs: map[string]*guest{}}
	ms := openWith(t, t.TempDir(), g)
	for dir, file := range map[string]string{"0123456789aa": scratchFile, "0123456789ab": overlayFile, "0123456789ac": requestFile, "not-ours": requestFile} {
		if err := os.MkdirAll(filepath.Join(ms.Dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(ms.Dir, dir, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := ms.sweep(); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(ms.Dir, "*", "*"))
	for i := range left {
		left[i], _ = filepath.Rel(ms.Dir, left[i])
	}
	if d := cmp.Diff([]string{"0123456789aa/" + scratchFile, "0123456789ab/" + overlayFile, "not-ours/" + requestFile}, left); d != "" {
		t.Error(d)
	}
}

// A machine that was asked to stop while its guest reboots is stopped, also for the next daemon, and thrown away where it was to be.
func TestAStopBeatsAReboot(t *testing.T) {
	t.Parallel()
	for _, remove := range []bool{false, true} {
		ms, _, _ := onFullDisk(t)
		if _, _, err := ms.Create(t.Context(), Spec{Name: "web", Image: "x", Network: NoNetwork, Remove: remove}); err != nil {
			t.Fatal(err)
		}
		e, err := ms.find("web")
		if err != nil {
			t.Fatal(err)
		}
		if err := ms.commit(e, "", func(m *Machine) { m.State = Stopping }); err != nil {
			t.Fatal(err)
		}
		ms.finish(e, ReasonReboot, 0, "")
		if m := e.get(); m.State != Stopped || m.Reason != ReasonPoweroff {
			t.Errorf("%s, %s", m.State, m.Reason)
		}
		if !remove {
			ms.Recover(t.Context())
		}
		for end := time.Now().Add(5 * time.Second); remove && !e.isGone(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("it is still there")
			}
		}
		if m := e.get(); m.State != Stopped {
			t.Errorf("%s", m.State)
		}
	}
}

// A later daemon goes on where an earlier one was, also in a console that was emptied.
func TestATranscriptGoesOn(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "console.log")
	log, err := outlog.Open(dir, outlog.Limits{FileBytes: 1 << 20, Files: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if err := log.Begin(); err != nil {
		t.Fatal(err)
	}
	var kept uint64
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	daemon := func() *transcript { return newTranscript(path, log, kept, func(base uint64) { kept = base }) }
	catchUp := func(tr *transcript) {
		t.Helper()
		if err := tr.catchUp(); err != nil {
			t.Fatal(err)
		}
	}
	first := daemon()
	write("first, which is long\n")
	catchUp(first)
	write("second\n")
	catchUp(first)
	catchUp(daemon())
	write("second\nthird\n")
	catchUp(daemon())
	r, err := log.Read()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := ""
	for {
		rec, err := r.Next(context.Background(), false)
		if err != nil {
			break
		}
		got += string(rec.Data)
	}
	if want := "first, which is long\nsecond\nthird\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A guest of a kernel that cannot read its seed disk gets all of it from the metadata service; another one no more than it needs.
func TestVendorDataOfAKernelsGuest(t *testing.T) {
	m := &Machine{ID: newID(), Spec: Spec{Name: "web", Disk: "/d", Kernel: "k"}}
	n, r := testNetwork(), &provision.Request{Timezone: "Europe/Berlin", UserData: []byte("#!/bin/sh\n")}
	for kernel, want := range map[string]bool{"k": true, "": false} {
		m.Spec.Kernel = kernel
		d := documentOf(t, m, n, r)
		if !d.NoCloud || string(d.UserData) != "#!/bin/sh\n" || strings.Contains(string(d.VendorData), `"timezone":"Europe/Berlin"`) != want {
			t.Errorf("kernel %q: %+v", kernel, d)
		}
	}
}

func answer(s net.Conn) { _ = transport.WriteMsg(s, &agentv1.Progress{Done: true}) }

func testNetwork() network.Network {
	return network.Network{Name: "n", Subnet: netip.MustParsePrefix("10.0.0.0/24"), Gateway: netip.MustParseAddr("10.0.0.1")}
}

func documentOf(t *testing.T, m *Machine, n network.Network, r *provision.Request) metadata.Document {
	t.Helper()
	m.Lease = network.Lease{Address: netip.MustParseAddr("10.0.0.2")}
	data, err := m.document(n, r)
	if err != nil {
		t.Fatal(err)
	}
	var d metadata.Document
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}
