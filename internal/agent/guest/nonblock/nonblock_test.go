//go:build linux

package nonblock

import (
	"bytes"
	"crypto/rand"
	"io"
	"os"
	"testing"
	"time"
)

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe() // neither end blocks
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func open(t *testing.T, f *os.File) *File {
	t.Helper()
	n, err := New(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestMoreThanThePipeHolds(t *testing.T) {
	r, w := pipe(t)
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	failed := make(chan error, 1)
	go func() {
		n, err := open(t, w).Write(sent)
		if err == nil && n != len(sent) {
			err = io.ErrShortWrite
		}
		w.Close()
		failed <- err
	}()
	got, err := io.ReadAll(open(t, r))
	if err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came, or others than the %d sent", len(got), len(sent))
	}
}

func TestDeadlineWakesReader(t *testing.T) {
	r, _ := pipe(t)
	r.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := open(t, r).Read(make([]byte, 1)); !os.IsTimeout(err) {
		t.Errorf("reading with a deadline: %v", err)
	}
}

func TestCloseWakesWriter(t *testing.T) {
	_, w := pipe(t)
	time.AfterFunc(10*time.Millisecond, func() { w.Close() })
	if _, err := open(t, w).Write(make([]byte, 1<<20)); err == nil {
		t.Error("writing more than the pipe holds ended well without a reader")
	}
}

func TestReaderGone(t *testing.T) {
	r, w := pipe(t)
	r.Close()
	if _, err := open(t, w).Write([]byte("x")); err == nil {
		t.Error("writing without a reader ended well")
	}
}
