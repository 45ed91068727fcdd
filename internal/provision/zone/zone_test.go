package zone

import (
	"strings"
	"testing"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

func TestFind(t *testing.T) {
	for name, want := range map[string]string{"Europe/Berlin": "CET", "Asia/Kolkata": "IST", "US/Pacific": "PST", "UTC": "UTC"} {
		data, err := Find(name)
		if err != nil {
			t.Fatal(err)
		}
		loc, err := time.LoadLocationFromTZData(name, data)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, _ := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).In(loc).Zone(); got != want {
			t.Errorf("%s in winter is %q, want %q", name, got, want)
		}
	}
}

func TestFindRefuses(t *testing.T) {
	for name, want := range map[string]string{
		"europe/berlin": "Europe/Berlin", "berlin": "Europe/Berlin", "America/New York": "America/New_York",
		"Europe": "", "": "", "../zone.go": "", "/etc/passwd": "", "Mars/Olympus": "", strings.Repeat("x", 1000): "", "Europe/": "",
	} {
		_, err := Find(name)
		if !errdefs.IsNotFound(err) {
			t.Errorf("%q: %v, want not found", name, err)
		}
		if h := hint.Of(err); h == "" || !strings.Contains(h, want) {
			t.Errorf("%q: hint %q, want one with %q", name, h, want)
		}
	}
}

func TestNames(t *testing.T) {
	names := Names()
	if len(names) < 500 {
		t.Fatalf("%d zones", len(names))
	}
	for _, n := range names {
		if _, err := Find(n); err != nil {
			t.Error(err)
		}
	}
}
