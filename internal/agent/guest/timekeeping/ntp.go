package timekeeping

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/beevik/ntp"
)

const (
	askEvery   = 17 * time.Minute // as often as ntpd asks a server that it trusts
	askAgain   = 10 * time.Second // after a failure; doubled each time up to askEvery
	askTimeout = 5 * time.Second
	near       = 5 * time.Millisecond // no better than a server across the internet is known
)

// Follow asks time servers, the first that answers, and corrects the clock, until ctx ends.
func Follow(ctx context.Context, servers []string, log func(string)) {
	pause, complained := askAgain, false
	for {
		offset, err := Ask(servers)
		if err == nil && offset.Abs() > near {
			err = Correct(offset)
		}
		wait := askEvery
		if err != nil {
			if !complained {
				log("asking for the time: " + err.Error())
			}
			wait, pause = pause, min(2*pause, askEvery)
		} else {
			pause = askAgain
		}
		complained = err != nil
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// Ask returns how far the clock is behind that of the first server which answers with a time that can be trusted.
func Ask(servers []string) (offset time.Duration, err error) {
	var errs []error
	for _, s := range servers {
		r, err := ntp.QueryWithOptions(s, ntp.QueryOptions{Timeout: askTimeout})
		if err == nil {
			err = r.Validate()
		}
		if err == nil {
			return r.ClockOffset, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", s, err))
	}
	return 0, errors.Join(errs...)
}

// Delegate tells the image's own time service, where it has one that reads drop-ins, which servers to ask, and says whether it has.
func Delegate(root string, servers []string) (done bool, err error) {
	services := []struct {
		programs []string
		file     string
		text     string
	}{
		{
			[]string{"/usr/sbin/chronyd"}, "/etc/chrony/sources.d/atoll.sources",
			"server " + strings.Join(servers, " iburst\nserver ") + " iburst\n",
		},
		{
			[]string{"/usr/lib/systemd/systemd-timesyncd", "/lib/systemd/systemd-timesyncd"}, "/etc/systemd/timesyncd.conf.d/50-atoll.conf",
			"[Time]\nNTP=" + strings.Join(servers, " ") + "\n",
		},
	}
	for _, s := range services {
		for _, p := range s.programs {
			if _, err := os.Stat(filepath.Join(root, p)); err != nil {
				continue
			}
			path := filepath.Join(root, s.file)
			// chrony reads this directory only where the distribution's configuration says so, and then it is there.
			if _, err := os.Stat(filepath.Dir(path)); err != nil && strings.Contains(path, "chrony") {
				continue
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return false, err
			}
			return true, os.WriteFile(path, []byte(s.text), 0o644)
		}
	}
	return false, nil
}
