// Package health finds out whether what a machine runs works. A check, as an image's HEALTHCHECK describes it, is made from time to time;
// what came of it makes a state. The rules are Docker's.
// It knows neither machines nor their agent: how a check is made, and what is done with the state, is its caller's. A leaf; imported by
// machine and server. Its values are not changed once they are made; a Monitor belongs to one goroutine.
package health

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Docker's defaults and bounds.
const (
	DefaultInterval      = 30 * time.Second
	DefaultTimeout       = 30 * time.Second
	DefaultStartInterval = 5 * time.Second
	DefaultRetries       = 3

	minDuration = time.Millisecond
	maxOutput   = 4096 // bytes kept of what one check wrote
	maxLog      = 5    // results kept
)

// Check says how to find out. Zero values stand for Docker's defaults.
type Check struct {
	Test          []string      // NONE; CMD and its words; CMD-SHELL and a line for the image's shell; empty: not said
	Interval      time.Duration // from the end of one check to the next
	Timeout       time.Duration // of one check
	StartPeriod   time.Duration // in which failures do not count
	StartInterval time.Duration // the interval in that time, until a check succeeds
	Retries       int           // so many failures in a row are unhealthy
}

// Over is c with what it leaves open taken from the image's own check.
func (c Check) Over(image Check) Check {
	if len(c.Test) == 0 {
		c.Test = image.Test
	}
	for _, d := range []struct{ own, image *time.Duration }{
		{&c.Interval, &image.Interval}, {&c.Timeout, &image.Timeout}, {&c.StartPeriod, &image.StartPeriod}, {&c.StartInterval, &image.StartInterval},
	} {
		if *d.own == 0 {
			*d.own = *d.image
		}
	}
	if c.Retries == 0 {
		c.Retries = image.Retries
	}
	return c
}

// WithDefaults has nothing left open but the test, nor anything that no check can be made by: an image may say what it likes.
func (c Check) WithDefaults() Check {
	for _, d := range []*time.Duration{&c.Interval, &c.Timeout, &c.StartPeriod, &c.StartInterval} {
		if *d < minDuration {
			*d = 0
		}
	}
	c.Retries = max(c.Retries, 0)
	return c.Over(Check{Interval: DefaultInterval, Timeout: DefaultTimeout, StartInterval: DefaultStartInterval, Retries: DefaultRetries})
}

// Faults says what is wrong with a check that somebody has asked for.
func (c Check) Faults() (faults []error) {
	if len(c.Test) > 0 && c.Test[0] != "NONE" && c.Argv(nil) == nil {
		faults = append(faults, fmt.Errorf("health check %q is neither NONE, CMD with words nor CMD-SHELL with one line", strings.Join(c.Test, " ")))
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"interval", c.Interval}, {"timeout", c.Timeout}, {"start period", c.StartPeriod}, {"start interval", c.StartInterval}} {
		if d.value != 0 && d.value < minDuration {
			faults = append(faults, fmt.Errorf("health %s of %s is less than %s", d.name, d.value, minDuration))
		}
	}
	if c.Retries < 0 {
		faults = append(faults, fmt.Errorf("%d health retries are less than 0", c.Retries))
	}
	return faults
}

// Argv is the command to run; nil: there is nothing to check. shell is the image's, empty where it names none.
func (c Check) Argv(shell []string) []string {
	if len(c.Test) < 2 {
		return nil
	}
	switch c.Test[0] {
	case "CMD":
		return c.Test[1:]
	case "CMD-SHELL":
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		return append(slices.Clone(shell), c.Test[1])
	}
	return nil
}

// Status is what is known.
type Status string

// The statuses.
const (
	Starting  Status = "starting"
	Healthy   Status = "healthy"
	Unhealthy Status = "unhealthy"
)

// State is a status and where it comes from.
type State struct {
	Status        Status
	FailingStreak int
	Log           []Result // the last, the newest at the end
}

// Stopped is the state of what does not run any more; nil of nil.
func (s *State) Stopped() *State {
	if s == nil {
		return nil
	}
	stopped := *s
	stopped.Status = Unhealthy
	return &stopped
}

// Result is what came of one check.
type Result struct {
	Start, End time.Time
	ExitCode   int // -1: it could not be made, or took too long
	Output     string
}

// After is the state once a result has come. Until the first success, failures of the start period do not count.
func (s State) After(r Result, c Check, started time.Time) State {
	s.Log = append(slices.Clone(s.Log[max(0, len(s.Log)+1-maxLog):]), r)
	switch {
	case r.ExitCode == 0:
		s.Status, s.FailingStreak = Healthy, 0
	case s.Status == Starting && r.Start.Sub(started) < c.StartPeriod:
	default:
		s.FailingStreak++
		if s.FailingStreak >= c.Retries {
			s.Status = Unhealthy
		}
	}
	return s
}
