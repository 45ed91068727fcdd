// Package diskimage knows disk images that somebody else has made: what a file is, by its content, and whether it is still the same; the
// overlay that a machine writes to in its place; and small disks of files for the system in it. It never writes to an image, and knows
// nothing of machines. A leaf.
package diskimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// Format is how a disk is kept in a file.
type Format string

// The formats that are served.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// Image is a disk image as it was found.
type Image struct {
	Path   string // absolute
	Format Format
	Size   int64 // of the disk in it
	File   File
	// Bootable: there is a boot sector or a partition table. Only known of raw images.
	Bootable bool
}

// File is by what a file is known again.
type File struct {
	Size     int64
	Modified time.Time
	Inode    uint64
}

// MaxSize of a disk: as much as an ext4 file system has room for, and QEMU for tables.
const MaxSize = 15 << 40

const sector = 512

// Open looks at the image at an absolute path. What cannot be served is refused by its name: errdefs.ErrInvalidArgument.
func Open(path string) (Image, error) {
	img, err := open(path)
	if err != nil {
		return Image{}, fmt.Errorf("disk image %s: %w", path, err)
	}
	return img, nil
}

func open(path string) (Image, error) {
	if !filepath.IsAbs(path) {
		return Image{}, fmt.Errorf("its path is not absolute: %w", errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not hold us up
	switch {
	case errors.Is(err, os.ErrNotExist):
		return Image{}, fmt.Errorf("there is no such file on the daemon's host: %w", errdefs.ErrNotFound)
	case errors.Is(err, os.ErrPermission):
		return Image{}, fmt.Errorf("the daemon may not read it: %w", errdefs.ErrPermissionDenied)
	case err != nil:
		return Image{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Image{}, err
	}
	if !info.Mode().IsRegular() {
		return Image{}, fmt.Errorf("it is not a regular file: %w", errdefs.ErrInvalidArgument)
	}
	img := Image{Path: path, File: identity(info)}
	head := make([]byte, headSize)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return Image{}, err
	}
	head = head[:n]
	if bytes.HasPrefix(head, qcow2Magic) {
		img.Format = QCOW2
		img.Size, err = checkQCOW2(head)
		return img, err
	}
	tail := make([]byte, sector)
	if info.Size() >= sector {
		if _, err := f.ReadAt(tail, info.Size()-sector); err != nil {
			return Image{}, err
		}
	}
	if err := checkRaw(path, head, tail); err != nil {
		return Image{}, err
	}
	img.Format, img.Size = Raw, roundUp(info.Size(), sector)
	img.Bootable = len(head) >= sector && head[510] == 0x55 && head[511] == 0xaa
	return img, checkSize(img.Size)
}

func identity(info os.FileInfo) File {
	id := File{Size: info.Size(), Modified: info.ModTime().UTC().Round(0)}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		id.Inode = st.Ino
	}
	return id
}

// Check says whether the file of an image is the one that it was: an overlay means nothing over another.
func (i Image) Check() error {
	info, err := os.Stat(i.Path)
	if errors.Is(err, os.ErrNotExist) {
		return hint.With(fmt.Errorf("disk image %s is gone: %w", i.Path, errdefs.ErrNotFound), "put it back: the machine's disk only holds what differs from it")
	}
	if err != nil {
		return fmt.Errorf("disk image %s: %w", i.Path, err)
	}
	now := identity(info)
	if now.Size == i.File.Size && now.Inode == i.File.Inode && now.Modified.Equal(i.File.Modified) {
		return nil
	}
	err = fmt.Errorf("disk image %s has changed since the machine was made (then %d bytes of %s, now %d bytes of %s): %w", i.Path,
		i.File.Size, i.File.Modified.Format(time.RFC3339), now.Size, now.Modified.Format(time.RFC3339), errdefs.ErrFailedPrecondition)
	return hint.With(err, "put the old file back (cp -p, mv), or make a new machine of the new one")
}

func checkSize(size int64) error {
	if size <= 0 || size > MaxSize {
		return fmt.Errorf("a disk of %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	return nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

const headSize = 36 << 10 // as far as an ISO 9660's volume descriptor

// signature is what marks a format that is not served.
type signature struct {
	name   string
	at     int
	magic  string
	format string // qemu-img's name of it; empty: it cannot convert it
	advice string
}

func signatures() []signature {
	return []signature{
		{"VMDK", 0, "KDMV", "vmdk", ""},
		{"VMDK", 0, "COWD", "vmdk", ""},
		{"VMDK", 0, "# Disk DescriptorFile", "vmdk", ""},
		{"VHDX", 0, "vhdxfile", "vhdx", ""},
		{"VHD", 0, "conectix", "vpc", ""},
		{"VDI", 64, "\x7f\x10\xda\xbe", "vdi", ""},
		{"QED", 0, "QED\x00", "qed", ""},
		{"Parallels", 0, "WithoutFreeSpace", "parallels", ""},
		{"Parallels", 0, "WithouFreSpacExt", "parallels", ""},
		{"Bochs", 0, "Bochs Virtual HD Image", "bochs", ""},
		{"cloop", 0, "#!/bin/sh\n#V2.0 Format\n", "cloop", ""},
		{"LUKS", 0, "LUKS\xba\xbe", "", "decrypt it first"},
		{"ISO 9660", 32769, "CD001", "", "it is a CD, not the disk of an installed system: take the distribution's cloud image"},
		{"gzip", 0, "\x1f\x8b", "", "unpack it first: gunzip"},
		{"xz", 0, "\xfd7zXZ\x00", "", "unpack it first: unxz"},
		{"zstd", 0, "\x28\xb5\x2f\xfd", "", "unpack it first: unzstd"},
		{"bzip2", 0, "BZh", "", "unpack it first: bunzip2"},
		{"zip", 0, "PK\x03\x04", "", "unpack it first: unzip"},
		{"tar", 257, "ustar", "", "unpack it first: tar -xf"},
	}
}

// checkRaw refuses what is in another format: as a raw disk it would be the bytes of a container.
func checkRaw(path string, head, tail []byte) error {
	for _, s := range signatures() {
		if len(head) >= s.at && bytes.HasPrefix(head[s.at:], []byte(s.magic)) {
			return foreign(path, s)
		}
	}
	switch {
	case bytes.HasPrefix(tail, []byte("conectix")):
		return foreign(path, signature{name: "VHD", format: "vpc"})
	case bytes.HasPrefix(tail, []byte("koly")):
		return foreign(path, signature{name: "DMG", format: "dmg"})
	}
	return nil
}

func foreign(path string, s signature) error {
	err := fmt.Errorf("it is in format %s, neither qcow2 nor raw: %w", s.name, errdefs.ErrInvalidArgument)
	if s.format == "" {
		return hint.With(err, "%s", s.advice)
	}
	return hint.With(err, "convert it: qemu-img convert -f %s -O qcow2 %s %s.qcow2", s.format, path, path[:len(path)-len(filepath.Ext(path))])
}

// The header of a qcow2 file: https://www.qemu.org/docs/master/interop/qcow2.html
const (
	qcow2HeaderSize = 104
	corruptFeature  = 1 << 1
	externalFeature = 1 << 2
)

var qcow2Magic = []byte("QFI\xfb")

// checkQCOW2 returns the size of the disk. An image that would have QEMU open other files, of whatever name its maker liked, is refused.
func checkQCOW2(head []byte) (int64, error) {
	invalid := func(next, format string, args ...any) (int64, error) {
		return 0, hint.With(fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...), "%s", next)
	}
	if len(head) < qcow2HeaderSize {
		return 0, fmt.Errorf("its qcow2 header is cut short: %w", errdefs.ErrInvalidArgument)
	}
	be := binary.BigEndian
	version := be.Uint32(head[4:])
	if version != 2 && version != 3 {
		return invalid("convert it: qemu-img convert -O qcow2", "it is qcow version %d, not 2 or 3", version)
	}
	if be.Uint64(head[8:]) != 0 || be.Uint32(head[16:]) != 0 {
		return invalid("make one file of both: qemu-img convert -O qcow2", "it has a backing file, which is not followed")
	}
	if be.Uint32(head[32:]) != 0 {
		return invalid("convert it: qemu-img convert -O qcow2", "it is encrypted")
	}
	if version == 3 {
		features := be.Uint64(head[72:])
		if features&externalFeature != 0 {
			return invalid("make one file of both: qemu-img convert -O qcow2", "it has an external data file, which is not followed")
		}
		if features&corruptFeature != 0 {
			return invalid("qemu-img check -r all tries to mend it", "it is marked as corrupt")
		}
	}
	size := be.Uint64(head[24:])
	if size > MaxSize {
		return 0, fmt.Errorf("a disk of %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	return roundUp(int64(size), sector), checkSize(int64(size))
}
