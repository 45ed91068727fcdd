package qemu

import (
	"bytes"
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

func rdtsc() uint64

// measureTSC returns the rate of the host's time stamp counter in kHz, or 0 where it is not constant. It takes a tenth of a second;
// the longer, the more exact: the two readings at the ends are good to about 0.1 µs.
func measureTSC(ctx context.Context) int {
	if info, err := os.ReadFile("/proc/cpuinfo"); err != nil || !bytes.Contains(info, []byte("nonstop_tsc")) {
		return 0
	}
	ticks, at := readTSC()
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
		return 0
	}
	ticks2, at2 := readTSC()
	return int((float64(ticks2-ticks)*1e6)/float64(at2-at) + 0.5)
}

// readTSC reads the counter and the raw clock at the same moment: the closest of several pairs, since a reading may be interrupted.
func readTSC() (ticks uint64, nanoseconds int64) {
	closest := ^uint64(0)
	for range 32 {
		before := rdtsc()
		var now unix.Timespec
		if unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &now) != nil {
			continue
		}
		if after := rdtsc(); after-before < closest {
			closest, ticks, nanoseconds = after-before, before+(after-before)/2, now.Nano()
		}
	}
	return ticks, nanoseconds
}
