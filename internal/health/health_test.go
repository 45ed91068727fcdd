package health

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestOver(t *testing.T) {
	image := Check{Test: []string{"CMD", "a"}, Interval: 1 * time.Second, Timeout: 2 * time.Second, StartPeriod: 3 * time.Second, StartInterval: 4 * time.Second, Retries: 5}
	got := Check{Timeout: 9 * time.Second, Retries: 7}.Over(image)
	want := image
	want.Timeout, want.Retries = 9*time.Second, 7
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got := (Check{Test: []string{"NONE"}}).Over(image).Argv(nil); got != nil {
		t.Errorf("NONE runs %q", got)
	}
	hostile := Check{Interval: 1, Timeout: -1, StartPeriod: -1, StartInterval: 1, Retries: -1}
	for _, c := range []Check{{}, hostile} {
		if d := cmp.Diff(Check{Interval: 30 * time.Second, Timeout: 30 * time.Second, StartInterval: 5 * time.Second, Retries: 3}, c.WithDefaults()); d != "" {
			t.Error(d)
		}
	}
}

func TestArgv(t *testing.T) {
	for _, c := range []struct{ test, shell, want []string }{
		{[]string{"CMD", "a b", "$c"}, []string{"x"}, []string{"a b", "$c"}},
		{[]string{"CMD-SHELL", "a | b"}, nil, []string{"/bin/sh", "-c", "a | b"}},
		{[]string{"CMD-SHELL", "a"}, []string{"/bin/bash", "-lc"}, []string{"/bin/bash", "-lc", "a"}},
		{[]string{"NONE"}, nil, nil},
		{[]string{"CMD"}, nil, nil},
		{[]string{"WGET", "x"}, nil, nil},
		{nil, nil, nil},
	} {
		if d := cmp.Diff(c.want, Check{Test: c.test}.Argv(c.shell)); d != "" {
			t.Errorf("%q: %s", c.test, d)
		}
	}
}

func TestFaults(t *testing.T) {
	if f := (Check{Test: []string{"NONE"}}).Faults(); f != nil {
		t.Errorf("NONE: %v", f)
	}
	got := errors.Join(Check{Test: []string{"WGET"}, Interval: 1, Timeout: -time.Second, StartPeriod: 1, StartInterval: 1, Retries: -1}.Faults()...).Error()
	for _, want := range []string{"WGET", "interval of 1ns", "timeout of -1s", "start period", "start interval", "-1 health retries"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in: %s", want, got)
		}
	}
}

// A state, result by result: Docker's table.
func TestAfter(t *testing.T) {
	began := time.Unix(1000, 0)
	check := Check{StartPeriod: 10 * time.Second, Retries: 2}
	s := State{Status: Starting}
	for i, step := range []struct {
		at     time.Duration
		code   int
		status Status
		streak int
	}{
		{1 * time.Second, 1, Starting, 0}, // within the start period
		{9 * time.Second, -1, Starting, 0},
		{10 * time.Second, 1, Starting, 1}, // after it
		{11 * time.Second, 0, Healthy, 0},
		{12 * time.Second, 1, Healthy, 1},
		{13 * time.Second, 3, Unhealthy, 2},
		{14 * time.Second, 3, Unhealthy, 3},
		{15 * time.Second, 0, Healthy, 0},
	} {
		s = s.After(Result{Start: began.Add(step.at), ExitCode: step.code}, check, began)
		if s.Status != step.status || s.FailingStreak != step.streak {
			t.Errorf("step %d: %s, %d failures; want %s, %d", i, s.Status, s.FailingStreak, step.status, step.streak)
		}
	}
	if len(s.Log) != 5 || s.Log[0].Start != began.Add(11*time.Second) || s.Log[4].Start != began.Add(15*time.Second) {
		t.Errorf("the last five: %v", s.Log)
	}
	// A success in the start period ends it.
	s = State{Status: Starting}.After(Result{Start: began}, check, began).After(Result{Start: began, ExitCode: 1}, check, began)
	if s.FailingStreak != 1 {
		t.Errorf("a failure after a success in the start period does not count: %+v", s)
	}
}

func TestMonitor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var probed []time.Duration
		var states []State
		m := Monitor{
			Check:   Check{Interval: 10 * time.Second, StartInterval: time.Second, StartPeriod: 3 * time.Second, Timeout: 4 * time.Second, Retries: 1},
			Started: began,
			Probe: func(ctx context.Context, out func([]byte)) (int, error) {
				probed = append(probed, time.Since(began))
				out([]byte("looking\xff"))
				switch len(probed) {
				case 1:
					return 1, nil
				case 2:
					return 0, errors.New("no such file")
				case 3:
					<-ctx.Done()
					return 137, nil
				}
				return 0, nil
			},
			Report: func(s State) {
				if states = append(states, s); len(states) == 4 {
					cancel()
				}
			},
		}
		m.Run(ctx, State{Status: Starting})
		// Each interval begins with the end of the check before; the third takes its whole time, and with it the start period is over.
		if d := cmp.Diff([]time.Duration{1 * time.Second, 2 * time.Second, 3 * time.Second, 17 * time.Second}, probed); d != "" {
			t.Error(d)
		}
		var got []string
		for _, s := range states {
			r := s.Log[len(s.Log)-1]
			got = append(got, string(s.Status)+" "+r.Output)
		}
		want := []string{"starting looking�", "starting no such file", "unhealthy Health check exceeded timeout (4s): looking�", "healthy looking�"}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		if c := states[2].Log[2].ExitCode; c != -1 {
			t.Errorf("exit code of a check that took too long: %d", c)
		}
	})
}

// Who takes over from another asks when the other would have asked.
func TestMonitorGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		time.Sleep(time.Minute)
		last := time.Now()
		time.Sleep(4 * time.Second)
		m := Monitor{Check: Check{Interval: 10 * time.Second, Timeout: time.Second, Retries: 3}, Started: began,
			Probe: func(context.Context, func([]byte)) (int, error) { return 1, nil },
			Report: func(s State) {
				if time.Since(last) != 10*time.Second || s.FailingStreak != 3 || s.Status != Unhealthy {
					t.Errorf("after %s: %+v", time.Since(last), s)
				}
				cancel()
			}}
		m.Run(ctx, State{Status: Healthy, FailingStreak: 2, Log: []Result{{End: last}}})
	})
}

func TestOutputIsBounded(t *testing.T) {
	var o output
	for range 3000 {
		o.add([]byte("ä."))
	}
	if s := o.String(); len(s) > maxOutput+3 || !strings.HasSuffix(s, "...") || strings.Contains(s, "�") {
		t.Errorf("%d bytes, ending in %q", len(s), s[len(s)-10:])
	}
}
