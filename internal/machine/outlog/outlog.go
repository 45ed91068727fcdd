// Package outlog keeps what a machine's entrypoint wrote: records in a file of JSON lines, bounded by rotation, with readers
// that may follow while it grows. Only the machine room writes it. A Log and its Readers are safe for concurrent use; a slow
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

// Record is one piece of output as the guest's agent numbered it, from 1 on. A record numbered 0 in the file marks where a boot begins;
// readers do not see it.
type Record struct {
	Seq    uint64    `json:"seq"`
	Time   time.Time `json:"time"`
	Stream Stream    `json:"stream"`
	Data   []byte    `json:"data"`
}

const (
	fileName = "output.jsonl"
	oldName  = "output.1.jsonl"
)

// Log is an open log. Limit bounds each of its two files.
type Log struct {
	dir   string
	limit int64

	mu      sync.Mutex // guards the rest
	file    *os.File
	size    int64
	lastSeq uint64
	changed chan struct{} // closed and replaced at every append and at End
	ended   bool          // no more records until Begin
}

// Open opens or creates the log in dir. A torn last record, left by a crash, is cut off.
func Open(dir string, limit int64) (*Log, error) {
	l := &Log{dir: dir, limit: limit, changed: make(chan struct{}), ended: true}
	f, err := os.OpenFile(filepath.Join(dir, fileName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening output log: %w", err)
	}
	whole := int64(0)
	err = eachRecord(f, func(r Record, end int64) { l.lastSeq, whole = r.Seq, end })
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
	l.lastSeq, l.ended = 0, false
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
	line, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("writing output log: %w", err)
	}
	line = append(line, '\n')
	if l.size > 0 && l.size+int64(len(line)) > l.limit {
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

func (l *Log) rotateLocked() error {
	if err := os.Rename(filepath.Join(l.dir, fileName), filepath.Join(l.dir, oldName)); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(l.dir, fileName), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	l.file.Close()
	l.file, l.size = f, 0
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
	buf  *bufio.Reader
	part []byte
}

// Tail returns a reader that starts at the end of what is there now.
func (l *Log) Tail() (*Reader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, err := l.openLocked(fileName)
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
	r, err := l.openLocked(oldName)
	if errors.Is(err, os.ErrNotExist) {
		return l.openLocked(fileName)
	}
	return r, err
}

func (l *Log) openLocked(name string) (*Reader, error) {
	f, err := os.Open(filepath.Join(l.dir, name))
	if err != nil {
		return nil, fmt.Errorf("reading output log: %w", err)
	}
	return &Reader{log: l, file: f, buf: bufio.NewReaderSize(f, 64<<10)}, nil
}

// Next returns the next record. At the end of what is there it returns io.EOF, or waits when follow is set and the boot's
// output is not complete.
func (r *Reader) Next(ctx context.Context, follow bool) (Record, error) {
	for {
		r.log.mu.Lock()
		ended, changed := r.log.ended, r.log.changed
		newer := !r.currentLocked()
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
			if err := r.reopen(); err != nil {
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

func (r *Reader) currentLocked() bool {
	mine, err1 := r.file.Stat()
	now, err2 := r.log.file.Stat()
	return err1 != nil || err2 != nil || os.SameFile(mine, now)
}

func (r *Reader) reopen() error {
	f, err := os.Open(filepath.Join(r.log.dir, fileName))
	if err != nil {
		return fmt.Errorf("reading output log: %w", err)
	}
	r.file.Close()
	r.file, r.part = f, nil
	r.buf.Reset(f)
	return nil
}

// Close ends the reader.
func (r *Reader) Close() error { return r.file.Close() }
