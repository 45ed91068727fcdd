// Package timekeeping sets the guest's clock: by what the host says, and by time servers where the machine has some and nothing of the
// image asks them. Imported by the agent. Its functions may be called from several goroutines.
package timekeeping

import (
	"time"

	"golang.org/x/sys/unix"
)

// step is how wrong a clock must be to be set at once. Programs see that as a jump; less is made up for at 0.5 ms per second.
const step = 500 * time.Millisecond

// Correct adds to the clock: half a second and more at once, less little by little. A clock that a time service of the image steers
// (adjtimex(2): not STA_UNSYNC) is left to it, unless it is far off.
func Correct(by time.Duration) error {
	if by.Abs() >= step {
		t := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO}
		seconds := by / time.Second
		if by%time.Second < 0 {
			seconds-- // the fraction counts upwards
		}
		t.Time = unix.Timeval{Sec: int64(seconds), Usec: int64(by - seconds*time.Second)}
		_, err := unix.Adjtimex(&t)
		return err
	}
	now := unix.Timex{}
	if _, err := unix.Adjtimex(&now); err != nil || now.Status&unix.STA_UNSYNC == 0 {
		return err
	}
	_, err := unix.Adjtimex(&unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: by.Microseconds()})
	return err
}
