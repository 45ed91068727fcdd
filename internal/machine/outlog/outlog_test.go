package outlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func open(t *testing.T, dir string, limit int64) *Log {
	t.Helper()
	l, err := Open(dir, Limits{FileBytes: limit, Files: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func begin(t *testing.T, l *Log) {
	t.Helper()
	if err := l.Begin(); err != nil {
		t.Fatal(err)
	}
}

func add(t *testing.T, l *Log, seq uint64, data string) {
	t.Helper()
	if err := l.Append(Record{Seq: seq, Stream: Stdout, Data: []byte(data)}); err != nil {
		t.Fatal(err)
	}
}

func all(t *testing.T, l *Log) []string {
	t.Helper()
	r, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var got []string
	for {
		rec, err := r.Next(context.Background(), false)
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(rec.Data))
	}
}

func TestRepeatedRecordsAreDropped(t *testing.T) {
	l := open(t, t.TempDir(), 1<<20)
	begin(t, l)
	add(t, l, 1, "a")
	add(t, l, 2, "b")
	add(t, l, 2, "b again")
	add(t, l, 3, "c")
	if got := fmt.Sprint(all(t, l)); got != "[a b c]" {
		t.Fatalf("got %s", got)
	}
	begin(t, l) // the next boot counts from one again
	add(t, l, 1, "d")
	if got := fmt.Sprint(all(t, l)); got != "[a b c d]" {
		t.Fatalf("got %s", got)
	}
}

func TestTornRecordIsCutOff(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 1<<20)
	begin(t, l)
	add(t, l, 1, "whole")
	l.Close()
	f, err := os.OpenFile(filepath.Join(dir, fileName(0)), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"seq":2,"data":"aGFs`)
	f.Close()

	l = open(t, dir, 1<<20)
	if l.LastSeq() != 1 {
		t.Fatalf("last seq %d", l.LastSeq())
	}
	l.Resume()
	add(t, l, 2, "after")
	if got := fmt.Sprint(all(t, l)); got != "[whole after]" {
		t.Fatalf("got %s", got)
	}
}

func TestFollowOverRotation(t *testing.T) {
	l := open(t, t.TempDir(), 300)
	begin(t, l)
	r, err := l.Tail()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// Each record is read before the next is written, so that both the waiting and the rotation are met.
	for i := 1; i <= 20; i++ {
		go func() {
			if err := l.Append(Record{Seq: uint64(i), Data: []byte(fmt.Sprint(i))}); err != nil {
				t.Error(err)
			}
		}()
		rec, err := r.Next(ctx, true)
		if err != nil {
			t.Fatal(err)
		}
		if rec.Seq != uint64(i) {
			t.Fatalf("record %d, want %d", rec.Seq, i)
		}
	}
	go l.End()
	if _, err := r.Next(ctx, true); !errors.Is(err, io.EOF) {
		t.Fatalf("after the end: %v", err)
	}
	sizes := int64(0)
	for age := range 2 {
		st, err := os.Stat(l.path(age))
		if err != nil {
			t.Fatal(err)
		}
		sizes += st.Size()
	}
	if sizes > 600 {
		t.Fatalf("the files hold %d bytes", sizes)
	}
}

// A daemon that comes back to a boot without output yet must not take the last boot's numbers for this one's.
func TestBootWithoutOutputStartsAtZero(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 1<<20)
	begin(t, l)
	add(t, l, 1, "a")
	add(t, l, 2, "b")
	begin(t, l)
	l.Close()
	l = open(t, dir, 1<<20)
	l.Resume()
	if l.LastSeq() != 0 {
		t.Fatalf("last seq %d", l.LastSeq())
	}
	add(t, l, 1, "c")
	if got := fmt.Sprint(all(t, l)); got != "[a b c]" {
		t.Fatalf("got %s", got)
	}
}

// A reader that is slow passes over whole files only when they are gone.
func TestSlowReaderOverSeveralRotations(t *testing.T) {
	l, err := Open(t.TempDir(), Limits{FileBytes: 300, Files: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	begin(t, l)
	add(t, l, 1, "1")
	r, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	next := func() uint64 {
		rec, err := r.Next(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		return rec.Seq
	}
	if next() != 1 {
		t.Fatal("not the first record first")
	}
	seq := uint64(1)
	for ; l.turn < 3; seq++ {
		add(t, l, seq+1, fmt.Sprint(seq+1))
	}
	for want := uint64(2); want <= seq; want++ {
		if got := next(); got != want {
			t.Fatalf("record %d, want %d", got, want)
		}
	}
	for ; l.turn < 20; seq++ {
		add(t, l, seq+1, fmt.Sprint(seq+1))
	}
	last, gaps := uint64(0), 0
	for {
		rec, err := r.Next(t.Context(), false)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || rec.Seq <= last {
			t.Fatalf("record %d after %d, %v", rec.Seq, last, err)
		}
		if last > 0 && rec.Seq != last+1 {
			gaps++
		}
		last = rec.Seq
	}
	if files, _ := os.ReadDir(l.dir); last != seq || gaps > 1 || len(files) != 4 {
		t.Fatalf("the last record is %d, want %d; %d gaps, %d files", last, seq, gaps, len(files))
	}
}

// A daemon that ends right after a rotation knows what it has.
func TestEndRightAfterARotation(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 300)
	begin(t, l)
	add(t, l, 1, "a")
	if err := l.rotateLocked(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	l = open(t, dir, 300)
	l.Resume()
	if l.LastSeq() != 1 {
		t.Fatalf("last seq %d", l.LastSeq())
	}
	add(t, l, 1, "a again")
	add(t, l, 2, "b")
	if got := fmt.Sprint(all(t, l)); got != "[a b]" {
		t.Fatalf("got %s", got)
	}
}

func TestOneFile(t *testing.T) {
	l, err := Open(t.TempDir(), Limits{FileBytes: 300, Files: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	begin(t, l)
	for seq := range uint64(20) {
		add(t, l, seq+1, "x")
	}
	if files, _ := os.ReadDir(l.dir); len(files) != 1 || len(all(t, l)) == 0 {
		t.Fatalf("%d files, records %v", len(files), all(t, l))
	}
}

func TestPositions(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, 1<<20)
	begin(t, l)
	add(t, l, 1, "a")
	l.Close()
	l = open(t, dir, 1<<20)
	begin(t, l)
	add(t, l, 1, "b")
	r, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	first, _ := r.Next(t.Context(), false)
	second, _ := r.Next(t.Context(), false)
	if !second.Position().After(first.Position()) || first.Position().After(second.Position()) || first.Position().After(first.Position()) {
		t.Fatalf("%v, then %v", first.Position(), second.Position())
	}
}
