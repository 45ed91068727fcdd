package machine

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// canonical is a signal's name as the agent takes it: upper case, without SIG; KILL by default.
func canonical(signal string) string {
	s := strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(signal)), "SIG")
	switch s {
	case "", "9":
		return "KILL"
	}
	return s
}

// SignalNumber is the number of a signal by its name, with or without SIG; 0: there is none of that name.
func SignalNumber(name string) unix.Signal {
	return unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG"))
}

// isSignal says whether a guest will know the signal, by name or number.
func isSignal(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 64
	}
	name := canonical(s)
	return SignalNumber(s) != 0 || strings.HasPrefix(name, "RTMIN") || strings.HasPrefix(name, "RTMAX")
}

// hostMemory is the size of this host's memory.
func hostMemory() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 1 << 62
	}
	return int64(info.Totalram) * int64(info.Unit)
}
