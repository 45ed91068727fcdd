package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The log of a machine's provisioning is two files, so that its end is there whatever its length.
const (
	provisionLogFile  = "provision.log"
	provisionLogOld   = "provision.1.log"
	provisionLogLimit = 4 << 20 // of each
	lastLines         = 20      // that an error shows
	lastBytes         = 4 << 10
)

// provisionLog takes what commands and package managers of a guest write while a start carries a plan out. It belongs to one start.
type provisionLog struct {
	dir  string
	file *os.File
	size int64
	step string // whose output is being written
	last []byte // the end of that
}

// open begins the log, or goes on with it. Nothing is made before there is something to write.
func (l *provisionLog) open() error {
	if l.file != nil {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(l.dir, provisionLogFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.file, l.size = f, st.Size()
	return nil
}

// begin throws away what an earlier provisioning wrote.
func (l *provisionLog) begin() error {
	var errs []error
	for _, name := range []string{provisionLogFile, provisionLogOld} {
		if err := os.Remove(filepath.Join(l.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// write adds output of a step. A guest may write any amount.
func (l *provisionLog) write(step string, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	if step != l.step {
		head := fmt.Sprintf("== %s\n", step)
		if len(l.last) > 0 && l.last[len(l.last)-1] != '\n' {
			head = "\n" + head
		}
		l.step, l.last = step, nil
		if err := l.put([]byte(head)); err != nil {
			return err
		}
	}
	l.last = append(l.last, data...)
	if len(l.last) > lastBytes {
		l.last = bytes.Clone(l.last[len(l.last)-lastBytes:])
	}
	return l.put(data)
}

func (l *provisionLog) put(data []byte) error {
	if err := l.open(); err != nil {
		return err
	}
	if l.size+int64(len(data)) > provisionLogLimit && l.size > 0 {
		path := filepath.Join(l.dir, provisionLogFile)
		if err := errors.Join(l.close(), os.Rename(path, filepath.Join(l.dir, provisionLogOld))); err != nil {
			return err
		}
		if err := l.open(); err != nil {
			return err
		}
	}
	n, err := l.file.Write(data)
	l.size += int64(n)
	return err
}

func (l *provisionLog) close() error {
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// tail is the last lines of a step's output, harmless to a terminal.
func (l *provisionLog) tail(step string) string {
	if step != l.step {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(printable(l.last))), "\n")
	if len(l.last) == lastBytes && len(lines) > 1 {
		lines = lines[1:] // cut off
	}
	return strings.Join(lines[max(0, len(lines)-lastLines):], "\n")
}

// ProvisionLog returns the last lines, or with -1 all, of what the last provisioning of a machine wrote.
func (ms *Machines) ProvisionLog(name string, lines int64) ([]byte, error) {
	e, err := ms.find(name)
	if err != nil {
		return nil, err
	}
	var log []byte
	for _, file := range []string{provisionLogOld, provisionLogFile} {
		data, err := os.ReadFile(filepath.Join(e.dir, file))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("reading the provisioning log of machine %q: %w", name, err)
		}
		log = append(log, data...)
	}
	if lines < 0 {
		return log, nil
	}
	all := slices.Collect(bytes.Lines(log))
	return bytes.Join(all[max(0, len(all)-int(min(lines, math.MaxInt32))):], nil), nil
}
