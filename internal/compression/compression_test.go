package compression

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func TestDetectAndOpen(t *testing.T) {
	const text = "what is packed, and packed, and packed"
	for tool, kind := range map[string]Kind{"cat": None, "gzip": Gzip, "zstd": Zstd, "xz": XZ, "bzip2": Bzip2} {
		cmd := exec.Command(tool)
		cmd.Stdin = strings.NewReader(text)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", tool, err)
		}
		r := bufio.NewReader(bytes.NewReader(packed))
		got, err := Detect(r)
		if err != nil || got != kind {
			t.Errorf("%s is taken for %q, %v", tool, got, err)
			continue
		}
		plain, err := got.Open(r)
		if err != nil {
			t.Errorf("%s: %v", tool, err)
			continue
		}
		if all, err := io.ReadAll(plain); err != nil || string(all) != text {
			t.Errorf("%s: %q, %v", tool, all, err)
		}
	}
	for _, short := range []string{"", "B", "\x1f"} {
		if kind, err := Detect(bufio.NewReader(strings.NewReader(short))); kind != None || err != nil {
			t.Errorf("%q is taken for %q, %v", short, kind, err)
		}
	}
}

func TestOpenIsBounded(t *testing.T) {
	// A frame header that asks for a window of 1 GiB (RFC 8878, 3.1.1.1.2).
	plain, err := Zstd.Open(bytes.NewReader([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 20 << 3, 1, 0, 0}))
	if err == nil {
		_, err = io.ReadAll(plain)
	}
	if !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("got %v", err)
	}
}
