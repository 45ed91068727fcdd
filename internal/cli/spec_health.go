package cli

import (
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// healthFlags are the flags of run and create that replace parts of the image's HEALTHCHECK.
type healthFlags struct {
	cmd                                           string
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int
	none                                          bool
}

func (h *healthFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&h.cmd, "health-cmd", "", "check the machine's health by this `COMMAND`, a line for the image's shell;\nexit code 0 is healthy")
	f.DurationVar(&h.interval, "health-interval", 0, "time between checks (default: the image's, else 30s)")
	f.DurationVar(&h.timeout, "health-timeout", 0, "time that a check may take (default: the image's, else 30s)")
	f.IntVar(&h.retries, "health-retries", 0, "failures in a row that are unhealthy (default: the image's, else 3)")
	f.DurationVar(&h.startPeriod, "health-start-period", 0, "time from the start in which failures do not count (default: the image's, else 0s)")
	f.DurationVar(&h.startInterval, "health-start-interval", 0, "time between checks in that period (default: the image's, else 5s)")
	f.BoolVar(&h.none, "no-healthcheck", false, "check nothing, whatever the image says")
}

// check is nil where no flag was given.
func (h *healthFlags) check(cmd *cobra.Command) (*atollv1.HealthCheck, []error) {
	c := &atollv1.HealthCheck{}
	var faults []error
	given := false
	for _, d := range []struct {
		flag  string
		value time.Duration
		to    **durationpb.Duration
	}{
		{"health-interval", h.interval, &c.Interval}, {"health-timeout", h.timeout, &c.Timeout},
		{"health-start-period", h.startPeriod, &c.StartPeriod}, {"health-start-interval", h.startInterval, &c.StartInterval},
	} {
		if !cmd.Flags().Changed(d.flag) {
			continue
		}
		given = true
		if d.value < 0 {
			faults = append(faults, usagef("--%s %s: want 0 or more", d.flag, d.value))
		}
		if d.value > 0 {
			*d.to = durationpb.New(d.value)
		}
	}
	if cmd.Flags().Changed("health-retries") {
		given = true
		if h.retries < 0 {
			faults = append(faults, usagef("--health-retries %d: want 0 or more", h.retries))
		}
		c.Retries = uint32(max(h.retries, 0))
	}
	if h.cmd != "" {
		given = true
		c.Test = []string{"CMD-SHELL", h.cmd}
	}
	if h.none {
		if given {
			faults = append(faults, usagef("--no-healthcheck and --health-… exclude each other"))
		}
		c.Test, given = []string{"NONE"}, true
	}
	if !given {
		return nil, faults
	}
	return c, faults
}
