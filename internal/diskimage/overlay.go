package diskimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

const (
	clusterBits   = 16
	clusterSize   = 1 << clusterBits
	perL1Entry    = clusterSize * clusterSize / 8 // bytes of the disk that an entry of the first table stands for
	maxBackingLen = 1023
	formatName    = 0xE2792ACA // the header extension with the backing file's format
)

// Overlay makes a qcow2 file at path: a disk of that size with the image's content, which holds only what is written to it. It takes no
// time, whatever the image's size.
func (i Image) Overlay(path string, size int64) error {
	if err := i.overlay(path, size); err != nil {
		return fmt.Errorf("making an overlay of disk image %s: %w", i.Path, err)
	}
	return nil
}

func (i Image) overlay(path string, size int64) error {
	size = roundUp(size, sector)
	if size < i.Size || size > MaxSize {
		return fmt.Errorf("a disk of %d bytes over one of %d: %w", size, i.Size, errdefs.ErrInvalidArgument)
	}
	if len(i.Path) > maxBackingLen {
		return fmt.Errorf("its path is longer than %d bytes: %w", maxBackingLen, errdefs.ErrInvalidArgument)
	}
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(i.header(size))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return os.Rename(temp, path)
}

// header is the whole of an empty overlay: the header, the table of reference counts, one block of them, and an empty first table.
func (i Image) header(size int64) []byte {
	entries := (size + perL1Entry - 1) / perL1Entry
	l1 := roundUp(entries*8, clusterSize) / clusterSize
	const headerAt, tableAt, blockAt, l1At = 0, 1, 2, 3 // clusters
	be := binary.BigEndian

	name := bytes.NewBuffer(nil) // the extensions, and the name of the image behind them
	name.Write(be.AppendUint32(be.AppendUint32(nil, formatName), uint32(len(i.Format))))
	name.WriteString(string(i.Format))
	name.Write(make([]byte, roundUp(int64(len(i.Format)), 8)-int64(len(i.Format))))
	name.Write(make([]byte, 8)) // the end of the extensions
	nameAt := qcow2HeaderSize + name.Len()
	name.WriteString(i.Path)

	h := make([]byte, 0, qcow2HeaderSize)
	h = append(h, qcow2Magic...)
	h = be.AppendUint32(h, 3)
	h = be.AppendUint64(h, uint64(nameAt))
	h = be.AppendUint32(h, uint32(len(i.Path)))
	h = be.AppendUint32(h, clusterBits)
	h = be.AppendUint64(h, uint64(size))
	h = be.AppendUint32(h, 0) // no encryption
	h = be.AppendUint32(h, uint32(entries))
	h = be.AppendUint64(h, l1At<<clusterBits)
	h = be.AppendUint64(h, tableAt<<clusterBits)
	h = be.AppendUint32(h, 1) // clusters of that table
	h = be.AppendUint32(h, 0) // snapshots
	h = be.AppendUint64(h, 0)
	h = be.AppendUint64(h, 0) // features: none of the three kinds
	h = be.AppendUint64(h, 0)
	h = be.AppendUint64(h, 0)
	h = be.AppendUint32(h, 4) // reference counts of 16 bits
	h = be.AppendUint32(h, qcow2HeaderSize)

	out := make([]byte, (l1At+l1)<<clusterBits)
	copy(out[headerAt:], append(h, name.Bytes()...))
	be.PutUint64(out[tableAt<<clusterBits:], blockAt<<clusterBits)
	for c := range l1At + l1 {
		be.PutUint16(out[blockAt<<clusterBits+2*c:], 1)
	}
	return out
}
