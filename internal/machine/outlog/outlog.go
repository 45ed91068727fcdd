// Package outlog keeps what a machine's entrypoint wrote: records in files of JSON lines, bounded by rotation, with readers
// that may follow while they grow. Only the machine room writes it. A Log and its Readers are safe for concurrent use; a slow
// reader never delays the writer.
package outlog

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Stream tells stdout from stderr.
type Stream int

const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// Record is one piece of output as the guest's agent numbered it, from 1 on in each boot. A record numbered 0 in the file marks where a boot
// begins; readers do not see it.
type Record struct {
	Boot   uint64    `json:"boot,omitempty"` // of the machine, counted from 1 on; set by the Log
	Seq    uint64    `json:"seq"`
	Time   time.Time `json:"time"`
	Stream Stream    `json:"stream"`
	Data   []byte    `json:"data"`
}

// Position is a record's place among all of a machine's.
type Position struct{ Boot, Seq uint64 }

// Position of the record.
func (r Record) Position() Position { return Position{r.Boot, r.Seq} }

// After says whether p is a later record's than q.
func (p Position) After(q Position) bool {
	return p.Boot > q.Boot || p.Boot == q.Boot && p.Seq > q.Seq
}

// fileName is the name of the newest file, age 0, and of those before it.
func fileName(age int) string {
	if age == 0 {
		return "output.jsonl"
	}
	return fmt.Sprintf("output.%d.jsonl", age)
}

// Limits bound a log on its disk. A file is longer than its limit only by being one record.
type Limits struct {
	FileBytes int64
	Files     int // at least 1
}

// Log is an open log.
type Log struct {
	dir    string
	limits Limits

	mu      sync.Mutex // guards the rest
	file    *os.File
	turn    int // how often the files were rotated since Open
	size    int64
	boot    uint64
	lastSeq uint64
	changed chan struct{} // closed and replaced at every append and at End
	ended   bool          // no more records until Begin
}

// Open opens or creates the log in dir. A torn last record, left by a crash, is cut off.
func Open(dir string, limits Limits) (*Log, error) {
	l := &Log{dir: dir, limits: limits, changed: make(chan struct{}), ended: true}
	if err := l.dropBeyond(); err != nil {
		return nil, fmt.Errorf("opening output log: %w", err)
	}
	f, err := os.OpenFile(l.path(0), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening output log: %w", err)
	}
	whole := int64(0)
	take := func(r Record, end int64) { l.boot, l.lastSeq, whole = max(l.boot, r.Boot), r.Seq, end }
	err = eachRecord(f, take)
	for age := 1; err == nil && whole == 0 && age < limits.Files; age++ { // it ended between a rotation and the record that was the reason
		if err = l.readOld(age, take); err == nil && whole > 0 {
			whole = 0
			break
		}
	}
	if err == nil {
		err = f.Truncate(whole)
	}
	if err == nil {
		_, err = f.Seek(whole, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("reading output log: %w", err)
	}
	l.file, l.size = f, whole
	return l, nil
}

func (l *Log) path(age int) string { return filepath.Join(l.dir, fileName(age)) }

func (l *Log) readOld(age int, do func(Record, int64)) error {
	f, err := os.Open(l.path(age))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return eachRecord(f, do)
}

// dropBeyond removes files that are more than there may be.
func (l *Log) dropBeyond() error {
	for age := max(l.limits.Files, 1); ; age++ {
		if err := os.Remove(l.path(age)); errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func eachRecord(r io.Reader, do func(r Record, end int64)) error {
	b := bufio.NewReaderSize(r, 256<<10)
	var end int64
	for {
		line, err := b.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil // a line without its newline is a torn one
		}
		if err != nil {
			return err
		}
		end += int64(len(line))
		var rec Record
		if json.Unmarshal(line, &rec) != nil {
			return nil
		}
		do(rec, end)
	}
}

// LastSeq is the number of the newest record of this boot, 0 when there is none.
func (l *Log) LastSeq() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastSeq
}

// Begin starts a new boot: sequence numbers start again and readers that follow wait for its records.
func (l *Log) Begin() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.boot, l.lastSeq, l.ended = l.boot+1, 0, false
	return l.writeLocked(Record{Time: time.Now()})
}

// Resume goes on with a boot that an earlier process began.
func (l *Log) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = false
}

// End says that the boot's output is complete: readers that follow see io.EOF once they have read all.
func (l *Log) End() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.wakeLocked()
}

func (l *Log) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// Append adds a record. One that is not newer than the last of this boot is a repetition after a reconnect and is dropped.
func (l *Log) Append(r Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.Seq <= l.lastSeq {
		return nil
	}
	return l.writeLocked(r)
}

func (l *Log) writeLocked(r Record) error {
	r.Boot = l.boot
	line, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("writing output log: %w", err)
	}
	line = append(line, '\n')
	if l.size > 0 && l.size+int64(len(line)) > l.limits.FileBytes {
		if err := l.rotateLocked(); err != nil {
			return fmt.Errorf("rotating output log: %w", err)
		}
	}
	n, err := l.file.Write(line)
	if err != nil {
		// Half a record would hide all that follow.
		_ = l.file.Truncate(l.size)
		_, _ = l.file.Seek(l.size, io.SeekStart)
		return fmt.Errorf("writing output log: %w", err)
	}
	l.size += int64(n)
	l.lastSeq = r.Seq
	l.wakeLocked()
	return nil
}

// rotateLocked makes room for a new file. Whenever it is cut off, Open finds the records that are left in their order.
func (l *Log) rotateLocked() error {
	for age := l.limits.Files - 2; age >= 0; age-- {
		if err := os.Rename(l.path(age), l.path(age+1)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if l.limits.Files < 2 {
		if err := os.Remove(l.path(0)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	f, err := os.OpenFile(l.path(0), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	l.file.Close()
	l.file, l.size = f, 0
	l.turn++
	return nil
}

// Close closes the writer's file; readers go on with theirs.
func (l *Log) Close() error {
	l.End()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file.Close()
}

// Reader reads records in order. Not for concurrent use.
type Reader struct {
	log  *Log
	file *os.File
	turn int // the value of the log's when this file was the newest; below 0: older than Open
	buf  *bufio.Reader
	part []byte
}

// Tail returns a reader that starts at the end of what is there now.
func (l *Log) Tail() (*Reader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, err := l.openLocked(0)
	if err != nil {
		return nil, err
	}
	if _, err := r.file.Seek(l.size, io.SeekStart); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// Read returns a reader that starts at the oldest record kept.
func (l *Log) Read() (*Reader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.oldestLocked(l.limits.Files - 1)
}

// oldestLocked opens the oldest file that is at most of that age.
func (l *Log) oldestLocked(age int) (*Reader, error) {
	for ; age > 0; age-- {
		r, err := l.openLocked(age)
		if !errors.Is(err, os.ErrNotExist) {
			return r, err
		}
	}
	return l.openLocked(0)
}

func (l *Log) openLocked(age int) (*Reader, error) {
	f, err := os.Open(l.path(age))
	if err != nil {
		return nil, fmt.Errorf("reading output log: %w", err)
	}
	return &Reader{log: l, file: f, turn: l.turn - age, buf: bufio.NewReaderSize(f, 64<<10)}, nil
}

// Next returns the next record. At the end of what is there it returns io.EOF, or waits when follow is set and the boot's
// output is not complete. What was rotated away before it was read is passed over.
func (r *Reader) Next(ctx context.Context, follow bool) (Record, error) {
	for {
		r.log.mu.Lock()
		ended, changed, newer := r.log.ended, r.log.changed, r.turn < r.log.turn
		r.log.mu.Unlock()

		line, err := r.buf.ReadBytes('\n')
		r.part = append(r.part, line...)
		if err == nil {
			var rec Record
			err := json.Unmarshal(r.part, &rec)
			r.part = r.part[:0]
			if err != nil {
				return Record{}, fmt.Errorf("reading output log: %w", err)
			}
			if rec.Seq == 0 {
				continue
			}
			return rec, nil
		}
		if !errors.Is(err, io.EOF) {
			return Record{}, fmt.Errorf("reading output log: %w", err)
		}
		switch {
		case newer: // this file was rotated away and is read to its end
			if err := r.advance(); err != nil {
				return Record{}, err
			}
		case ended || !follow:
			return Record{}, io.EOF
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				return Record{}, ctx.Err()
			}
		}
	}
}

// advance goes on with the file after this one, or with the oldest that is left.
func (r *Reader) advance() error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	next, err := r.log.oldestLocked(min(r.log.turn-r.turn-1, r.log.limits.Files-1))
	if err != nil {
		return err
	}
	r.file.Close()
	r.file, r.turn, r.part = next.file, next.turn, nil
	r.buf.Reset(r.file)
	return nil
}

// Close ends the reader.
func (r *Reader) Close() error { return r.file.Close() }
