package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/pierrec/lz4/v4"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// imageMax bounds a kernel, packed or not: Debian's cloud kernel is 14 MB packed and 53 MB unpacked.
const imageMax = 512 << 20

// image is a kernel file in the form that a VMM boots.
type image struct {
	data    []byte
	arch    string
	version string
}

// readImage reads and checks a kernel file. errdefs.ErrInvalidArgument says what is wrong with it.
func readImage(path string) (image, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return image{}, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return image{}, err
	}
	defer f.Close()
	return readOpened(f)
}

func readOpened(f *os.File) (image, error) {
	st, err := f.Stat()
	if err != nil {
		return image{}, err
	}
	if !st.Mode().IsRegular() || st.Size() > imageMax {
		return image{}, fmt.Errorf("it is no regular file of at most %d MiB: %w", imageMax>>20, errdefs.ErrInvalidArgument)
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return image{}, err
	}
	return parseImage(data)
}

// parseImage recognises an ELF, a bzImage or an arm64 Image.
func parseImage(data []byte) (image, error) {
	img := image{data: data, arch: "amd64"}
	switch {
	case len(data) > 0x250 && string(data[0x202:0x206]) == "HdrS":
		var err error
		if img.data, err = unpackBzImage(data); err != nil {
			return image{}, fmt.Errorf("unpacking the bzImage: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := checkELF(img.data); err != nil {
			return image{}, fmt.Errorf("the kernel in the bzImage: %w", err)
		}
	case bytes.HasPrefix(data, []byte(elf.ELFMAG)):
		if err := checkELF(data); err != nil {
			return image{}, err
		}
	case len(data) > 64 && string(data[56:60]) == "ARM\x64": // Documentation/arm64/booting.rst
		img.arch = "arm64"
	default:
		return image{}, hint.With(fmt.Errorf("it is no kernel: neither an ELF nor a bzImage nor an arm64 Image: %w", errdefs.ErrInvalidArgument),
			"give the file vmlinux, arch/x86/boot/bzImage or arch/arm64/boot/Image of a kernel build")
	}
	img.version = version(img.data)
	if img.version == "" {
		return image{}, fmt.Errorf("it is no Linux kernel: it has no version string: %w", errdefs.ErrInvalidArgument)
	}
	return img, nil
}

// unpackBzImage returns the ELF that the setup header points at (Documentation/x86/boot.rst: payload_offset, payload_length).
func unpackBzImage(data []byte) ([]byte, error) {
	setupSectors := int64(data[0x1f1])
	if setupSectors == 0 {
		setupSectors = 4
	}
	le := binary.LittleEndian
	start := (setupSectors+1)*512 + int64(le.Uint32(data[0x248:]))
	length := int64(le.Uint32(data[0x24c:]))
	if le.Uint16(data[0x206:]) < 0x208 || length < 8 || start+length > int64(len(data)) {
		return nil, errors.New("the setup header has no payload, or it ends before the file does")
	}
	payload := data[start : start+length]
	// The kernel's build appends the unpacked size; in gzip it is the format's own last field.
	size := le.Uint32(payload[length-4:])
	if size > imageMax {
		return nil, fmt.Errorf("it says that it unpacks to %d bytes", size)
	}
	packed := payload[:length-4]
	if bytes.HasPrefix(payload, []byte("\x1f\x8b")) {
		packed = payload
	}
	if bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")) {
		return unpackLZ4(packed[4:], int(size))
	}
	r, err := debian.Decompress(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out := make([]byte, size)
	if _, err := io.ReadFull(r, out); err != nil {
		return nil, err
	}
	return out, nil
}

// unpackLZ4 unpacks the legacy frame that the kernel's build makes: blocks of up to 8 MiB, each after its packed size.
func unpackLZ4(blocks []byte, size int) ([]byte, error) {
	out := make([]byte, 0, size)
	for len(blocks) >= 4 {
		n := int64(binary.LittleEndian.Uint32(blocks))
		blocks = blocks[4:]
		if n > int64(len(blocks)) {
			return nil, errors.New("an lz4 block is longer than the file")
		}
		u, err := lz4.UncompressBlock(blocks[:n], out[len(out):min(len(out)+8<<20, size)])
		if err != nil {
			return nil, err
		}
		out, blocks = out[:len(out)+u], blocks[n:]
	}
	if len(out) != size {
		return nil, fmt.Errorf("it unpacks to %d bytes instead of %d", len(out), size)
	}
	return out, nil
}

// checkELF wants an x86-64 kernel with the note of a PVH entry, which is how QEMU and others boot an ELF.
func checkELF(data []byte) error {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("it is a damaged ELF: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("it is an ELF for %s, not a kernel for x86-64: %w", f.Machine, errdefs.ErrInvalidArgument)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err != nil {
			return fmt.Errorf("it is a damaged ELF: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if hasPVH(notes, f.ByteOrder) {
			return nil
		}
	}
	return hint.With(fmt.Errorf("it has no PVH entry, so it is no kernel that a microVM can boot: %w", errdefs.ErrInvalidArgument),
		"give a kernel that was built with CONFIG_PVH=y")
}

const xenPhys32Entry = 18 // XEN_ELFNOTE_PHYS32_ENTRY

func hasPVH(notes []byte, order binary.ByteOrder) bool {
	align := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		nameLen, descLen, kind := order.Uint32(notes), order.Uint32(notes[4:]), order.Uint32(notes[8:])
		notes = notes[12:]
		whole := align(nameLen) + align(descLen)
		if whole > uint64(len(notes)) {
			return false
		}
		if kind == xenPhys32Entry && bytes.HasPrefix(notes, []byte("Xen\x00")) {
			return true
		}
		notes = notes[whole:]
	}
	return false
}

// version finds what uname -r would say.
func version(data []byte) string {
	mark := []byte("Linux version ")
	for {
		i := bytes.Index(data, mark)
		if i < 0 {
			return ""
		}
		data = data[i+len(mark):]
		word := data[:min(len(data), 65)]
		if n := bytes.IndexByte(word, ' '); n > 0 && word[0] >= '0' && word[0] <= '9' {
			return string(word[:n])
		}
	}
}

// devices tells how the kernel finds its devices: needsACPI, it cannot take them from its command line; acpi, it finds them by ACPI. Where it
// does not carry its configuration, the strings decide that only such code has: the name of the parameter virtio_mmio.device, and an error of ACPI's tables.
func (i image) devices() (needsACPI, acpi bool) {
	if text := i.embeddedConfig(); len(text) > 0 {
		if needsACPI, acpi, err := devices(text); err == nil {
			return needsACPI, acpi
		}
	}
	line := bytes.Contains(i.data, []byte("virtio_mmio.device\x00")) || bytes.Contains(i.data, []byte("virtio-mmio-cmdline\x00"))
	return !line, bytes.Contains(i.data, []byte("Unable to load the System Description Tables"))
}

// devices tells the same by a configuration. Without PCI, Linux 6.1 does not get through the tables of QEMU's microvm.
func devices(text []byte) (needsACPI, acpi bool, err error) {
	c, err := parseConfig(bytes.NewReader(text))
	return c["VIRTIO_MMIO_CMDLINE_DEVICES"] != "y", c["ACPI"] == "y" && c["PCI"] == "y", err
}

// embeddedConfig returns the configuration that a kernel with CONFIG_IKCONFIG carries (kernel/configs.c), or nil.
func (i image) embeddedConfig() []byte {
	_, packed, ok := bytes.Cut(i.data, []byte("IKCFG_ST"))
	if !ok {
		return nil
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil
	}
	defer r.Close()
	r.Multistream(false)
	text, err := io.ReadAll(io.LimitReader(r, 4<<20))
	if err != nil || !bytes.Contains(text, []byte("CONFIG_")) {
		return nil
	}
	return text
}

func noSpace(path string, err error) error {
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	return hint.With(fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted), "make room on the file system of %s", filepath.Dir(path))
}
