package machine

import "strings"

// canonical is a signal's name as the agent takes it: upper case, without SIG; KILL by default.
func canonical(signal string) string {
	s := strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(signal)), "SIG")
	switch s {
	case "", "9":
		return "KILL"
	}
	return s
}
