package qemu

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

func newDriver(t *testing.T) *Driver {
	return New(Options{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))})
}

func TestProbeGuestRunsEmulated(t *testing.T) {
	if arch != "amd64" {
		t.Skip("the probe guest is for x86-64")
	}
	d := newDriver(t)
	binary, err := d.binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := runProbe(t.Context(), binary, "tcg", d.opts.Dir); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(d.opts.Dir); len(left) != 0 {
		t.Errorf("the probe leaves %v", left)
	}
}

func TestProbe(t *testing.T) {
	d := newDriver(t)
	began := time.Now()
	c, err := d.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("first: %+v after %v", c, time.Since(began))
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the probe took %v", took)
	}
	// Which accelerator is right depends on the host; that it is explained does not.
	switch c.Accelerator {
	case "kvm":
		if c.Warning != "" {
			t.Errorf("warning %q although KVM works", c.Warning)
		}
	case "tcg":
		if c.Warning == "" || c.Hint == "" {
			t.Errorf("emulated without a word: %+v", c)
		}
	default:
		t.Errorf("accelerator %q", c.Accelerator)
	}
	// A later process reads the answer.
	began = time.Now()
	again, err := New(d.opts).Probe(t.Context())
	if err != nil || again != c {
		t.Errorf("second: %+v, %v", again, err)
	}
	t.Logf("second after %v", time.Since(began))
	if took := time.Since(began); took > 50*time.Millisecond {
		t.Errorf("the second probe took %v", took)
	}
	// Of another boot it is worth nothing.
	path := filepath.Join(d.opts.Dir, probeFile)
	f := load(path)
	f.Key.BootID, f.Version = "another", "1.0"
	if err := save(path, f); err != nil {
		t.Fatal(err)
	}
	if again, err = New(d.opts).Probe(t.Context()); err != nil || again != c {
		t.Errorf("after a reboot: %+v, %v", again, err)
	}
}

// A caller that gives up while the probe guest runs has not proved that it hangs.
func TestProbeIsCancelled(t *testing.T) {
	script := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n[ $1 = -version ] && echo QEMU emulator version 7.2.0 && exit\nexec sleep 60\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if f, err := newDriver(t).find(ctx, key{Binary: script}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("answer %+v, %v", f, err)
	}
}

func TestKVMWarnings(t *testing.T) {
	d := newDriver(t)
	for class, want := range map[string]string{"denied": "usermod -aG kvm", "absent": "modprobe"} {
		warning, next := d.tryKVM(t.Context(), key{KVM: kvmState{Error: "open /dev/kvm: why", Class: class}})
		if !strings.Contains(warning, "open /dev/kvm: why") || !strings.Contains(next, want) {
			t.Errorf("%s: %q, %q", class, warning, next)
		}
	}
}

// A QEMU whose guest hangs, as under a /dev/kvm that opens and does not work.
func TestHangIsSeen(t *testing.T) {
	script := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec sleep 60\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, began := newDriver(t), time.Now()
	warning, next := d.tryKVM(t.Context(), key{Binary: script})
	if !strings.Contains(warning, "hangs or crawls") || next == "" {
		t.Errorf("%q, %q", warning, next)
	}
	if took := time.Since(began); took > 2*probeLimit {
		t.Errorf("seen after %v", took)
	}
}

func TestMissingQEMU(t *testing.T) {
	d := New(Options{Binary: "/nowhere/qemu", Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	_, err := d.Probe(t.Context())
	if !errdefs.IsNotFound(err) || !strings.Contains(hint.Of(err), "apt install") {
		t.Errorf("%v, hint %q", err, hint.Of(err))
	}
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright": "7.2.22",
		"QEMU emulator version 10.0.2\n":                                            "10.0.2",
		"QEMU emulator version 8.2\n":                                               "8.2",
		"QEMU emulator version 7.1.0\n":                                             "",
		"QEMU emulator version 6.2.0 (Debian)\n":                                    "",
		"something else":                                                            "",
	} {
		got, err := parseVersion(text)
		if got != want || want == "" && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}
