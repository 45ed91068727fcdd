package cli

import (
	"bytes"
	"testing"
)

func TestParseDetachKeys(t *testing.T) {
	for in, want := range map[string]string{"": "\x10\x11", "ctrl-p,ctrl-q": "\x10\x11", "ctrl-a,d": "\x01d", "ctrl-@": "\x00", "ctrl-[,ctrl-\\": "\x1b\x1c", "DEL": "\x7f", "ctrl-_": "\x1f"} {
		if got, err := parseDetachKeys(in); err != nil || string(got) != want {
			t.Errorf("%q: %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"ctrl-", "ctrl-pp", "word", "ctrl-1", "a,,b"} {
		if got, err := parseDetachKeys(in); err == nil {
			t.Errorf("%q: %q", in, got)
		}
	}
}

// However what is typed is cut into pieces, all but the keys goes on to the guest.
func TestKeyScanner(t *testing.T) {
	for _, tc := range []struct {
		typed, pass string
		found       bool
	}{
		{"hello", "hello", false},
		{"he\x10llo", "he\x10llo", false},
		{"x\x10\x11y", "x", true},
		{"\x10\x10\x11", "\x10", true},
		{"\x11\x10", "\x11", false}, // the last may begin the sequence
		{"a\x10\x10b\x10\x11", "a\x10\x10b", true},
	} {
		for step := 1; step <= len(tc.typed); step++ {
			k := &keyScanner{keys: []byte("\x10\x11")}
			var pass []byte
			found := false
			for rest := []byte(tc.typed); len(rest) > 0 && !found; {
				n := min(step, len(rest))
				p, f := k.scan(bytes.Clone(rest[:n]))
				pass, found, rest = append(pass, p...), f, rest[n:]
			}
			if string(pass) != tc.pass || found != tc.found {
				t.Errorf("%q by %d: %q %v, want %q %v", tc.typed, step, pass, found, tc.pass, tc.found)
			}
		}
	}
}
