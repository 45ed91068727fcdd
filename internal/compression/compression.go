// Package compression tells by the first bytes of a stream how it is compressed, and unpacks it within bounds: for archives that strangers
// send. A leaf. Root disks have a reader of their own, which works ahead, and so do Debian's packages, whose signatures were checked.
package compression

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/xi2/xz"
)

// Kind is a way to compress.
type Kind string

// What Detect knows. None is also what nothing of it begins with.
const (
	None  Kind = ""
	Gzip  Kind = "gzip"
	Zstd  Kind = "zstd"
	XZ    Kind = "xz"
	Bzip2 Kind = "bzip2"
)

// MaxWindow is the memory that unpacking may take: zstd.ErrWindowSizeExceeded and xz.ErrMemlimit are for more.
const MaxWindow = 128 << 20

// Detect looks ahead and consumes nothing.
func Detect(r *bufio.Reader) (Kind, error) {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return None, err
	}
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		return Gzip, nil
	case bytes.HasPrefix(head, []byte("\x28\xb5\x2f\xfd")):
		return Zstd, nil
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return XZ, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return Bzip2, nil
	}
	return None, nil
}

// Open returns what is packed in r, which is of that kind. It starts nothing that would have to be closed.
func (k Kind) Open(r io.Reader) (io.Reader, error) {
	switch k {
	case Gzip:
		return gzip.NewReader(r)
	case Zstd:
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(MaxWindow))
		if err != nil {
			return nil, err // not d: an interface that holds a nil decoder is no nil
		}
		return d, nil
	case XZ:
		return xz.NewReader(r, MaxWindow)
	case Bzip2:
		return bzip2.NewReader(r), nil
	}
	return r, nil
}
