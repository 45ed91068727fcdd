package cli

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// defaultDetachKeys are Docker's.
const defaultDetachKeys = "ctrl-p,ctrl-q"

// addDetachKeys adds the flag; what it is given is checked by parseDetachKeys.
func addDetachKeys(cmd *cobra.Command, keys *string) {
	cmd.Flags().StringVar(keys, "detach-keys", defaultDetachKeys, "`KEYS` that leave the terminal and let all run on: letters and ctrl-LETTER, with commas")
}

// parseDetachKeys turns "ctrl-p,x" into what a terminal sends.
func parseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		s = defaultDetachKeys
	}
	var keys []byte
	for key := range strings.SplitSeq(s, ",") {
		ctrl, isCtrl := strings.CutPrefix(key, "ctrl-")
		switch {
		case isCtrl && len(ctrl) == 1 && strings.ContainsAny(ctrl, "@abcdefghijklmnopqrstuvwxyz[\\]^_"):
			keys = append(keys, strings.ToUpper(ctrl)[0]&0x1f)
		case key == "DEL":
			keys = append(keys, 0x7f)
		case len(key) == 1:
			keys = append(keys, key[0])
		default:
			return nil, usagef("--detach-keys %q: %q is no key; write a letter, or ctrl- and a letter, @, [, \\, ], ^ or _", s, key)
		}
	}
	return keys, nil
}

// keyScanner finds the detach keys in what is typed. Keys that begin the sequence are held back until it is clear that they do not.
type keyScanner struct {
	keys []byte
	held int // how much of keys has been typed
}

// scan returns what goes on to the guest, and whether the sequence is complete.
func (k *keyScanner) scan(p []byte) (pass []byte, found bool) {
	if len(k.keys) == 0 {
		return p, false
	}
	all := append(bytes.Clone(k.keys[:k.held]), p...)
	if i := bytes.Index(all, k.keys); i >= 0 {
		k.held = 0
		return all[:i], true
	}
	k.held = 0
	for n := min(len(k.keys)-1, len(all)); n > 0; n-- {
		if bytes.HasPrefix(k.keys, all[len(all)-n:]) {
			k.held = n
			break
		}
	}
	return all[:len(all)-k.held], false
}

// sayDetached is the last line of somebody who has left.
func (e *environment) sayDetached() { fmt.Fprint(e.Stderr, "\r\nDetached\r\n") }
