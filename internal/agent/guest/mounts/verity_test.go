package mounts

import (
	"strings"
	"testing"
)

func TestVerityError(t *testing.T) {
	for event, want := range map[string]string{
		"change@/devices/virtual/block/dm-1|ACTION=change|DEVNAME=dm-1|DM_VERITY_ERR_BLOCK_NR=0,732|SEQNUM=9": "root disk does not verify: block 732 of dm-1",
		"change@/x|DM_VERITY_ERR_BLOCK_NR=1,5|DEVNAME=dm-0":                                                   "root disk does not verify: hash tree block 5 of dm-0",
		"add@/devices/virtual/block/dm-1|ACTION=add|DEVNAME=dm-1":                                             "",
		"DM_VERITY_ERR_BLOCK_NR=0":   "",
		"DM_VERITY_ERR_BLOCK_NR=0,x": "",
		"":                           "",
	} {
		if got := verityError([]byte(strings.ReplaceAll(event, "|", "\x00"))); got != want {
			t.Errorf("%q: got %q, want %q", event, got, want)
		}
	}
}

// The kernel wants what follows a target's parameters aligned to 8 bytes, and a NUL at their end.
func TestTarget(t *testing.T) {
	for n := range 20 {
		b := target(8, "verity", strings.Repeat("x", n))
		if len(b)%8 != 0 || len(b) < dmTargetSpec+n+1 || b[len(b)-1] != 0 {
			t.Errorf("%d bytes of parameters: %d", n, len(b))
		}
	}
}
