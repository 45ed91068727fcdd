package mounts

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// The device mapper's ioctls (include/uapi/linux/dm-ioctl.h); /dev/mapper/control takes a struct dm_ioctl with what belongs to the
// command behind it.
const (
	dmControl    = "/dev/mapper/control"
	dmMagic      = 0xfd
	dmDevCreate  = 3
	dmDevSuspend = 6 // without the suspend flag: resume
	dmTableLoad  = 9
	dmReadOnly   = 1 << 0
	dmHeader     = 312 // sizeof(struct dm_ioctl)
	dmTargetSpec = 40  // sizeof(struct dm_target_spec)
	dmBuffer     = 2048
	dmName       = 48 // offset of the name
	dmDevice     = 40 // offset of the device number

	verityBlock = 4096
	sector      = 512
)

// setUpVerity puts dm-verity over a disk and returns the device to mount. A block that is not what the root hash says is an I/O error to
// its reader, and WatchVerity tells of it.
func setUpVerity(i int, device string, v *agentv1.Verity) (string, error) {
	if err := appear(device); err != nil {
		return "", err
	}
	control, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return "", errors.New("the kernel has no device mapper")
	}
	if err != nil {
		return "", err
	}
	defer control.Close()
	name := fmt.Sprint("root", i)
	number, err := deviceMapper(control, dmDevCreate, name, 0, nil)
	if err != nil {
		return "", fmt.Errorf("making device %s: %w", name, err)
	}
	blocks := v.GetDataBlocks()
	parameters := fmt.Sprintf("1 %s %s %d %d %d %d sha256 %s %s", device, device, verityBlock, verityBlock, blocks, blocks, v.GetRootHash(), v.GetSalt())
	if _, err := deviceMapper(control, dmTableLoad, name, dmReadOnly, target(blocks*verityBlock/sector, "verity", parameters)); err != nil {
		return "", fmt.Errorf("loading its table: %w", err)
	}
	if _, err := deviceMapper(control, dmDevSuspend, name, 0, nil); err != nil {
		return "", fmt.Errorf("starting it: %w", err)
	}
	path := fmt.Sprint("/dev/dm-", unix.Minor(number))
	return path, appear(path)
}

// appear waits for a device, which the kernel may still be looking at.
func appear(device string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); ; <-tick.C {
		_, err := os.Stat(device)
		if !errors.Is(err, os.ErrNotExist) || time.Now().After(deadline) {
			return err
		}
	}
}

// target is a table of one target (struct dm_target_spec and its parameters).
func target(sectors uint64, kind, parameters string) []byte {
	b := make([]byte, dmTargetSpec, dmTargetSpec+len(parameters)+8)
	binary.NativeEndian.PutUint64(b[8:], sectors)
	copy(b[24:39], kind)
	b = append(append(b, parameters...), 0)
	return append(b, make([]byte, -len(b)&7)...)
}

// deviceMapper does one command for a device and returns its number.
func deviceMapper(control *os.File, command uintptr, name string, flags uint32, table []byte) (uint64, error) {
	b := make([]byte, dmBuffer)
	if dmHeader+len(table) > len(b) {
		return 0, fmt.Errorf("a table of %d bytes", len(table))
	}
	le := binary.NativeEndian
	le.PutUint32(b[0:], 4) // version 4.0.0
	le.PutUint32(b[12:], dmBuffer)
	le.PutUint32(b[16:], dmHeader) // where the table begins
	if table != nil {
		le.PutUint32(b[20:], 1) // targets
	}
	le.PutUint32(b[28:], flags)
	copy(b[dmName:dmName+127], name)
	copy(b[dmHeader:], table)
	// _IOWR(0xfd, command, struct dm_ioctl)
	request := 3<<30 | uintptr(dmHeader)<<16 | dmMagic<<8 | command
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), request, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return 0, errno
	}
	return le.Uint64(b[dmDevice:]), nil
}

// WatchVerity hears the kernel's events and calls bad for a block that does not verify, once. It is called before Mount.
func WatchVerity(bad func(detail string)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("listening to the kernel's events: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("listening to the kernel's events: %w", err)
	}
	go func() {
		defer unix.Close(fd)
		buf := make([]byte, 64<<10)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil && err != unix.EINTR && err != unix.ENOBUFS {
				return
			}
			// Only the kernel's port is 0: a process of the guest cannot send from it.
			if nl, ok := from.(*unix.SockaddrNetlink); err != nil || !ok || nl.Pid != 0 {
				continue
			}
			if detail := verityError(buf[:n]); detail != "" {
				bad(detail)
				return
			}
		}
	}()
	return nil
}

// verityError reads an event of dm-verity (verity_handle_err): DM_VERITY_ERR_BLOCK_NR=type,block, where type 0 is data and 1 the tree.
func verityError(event []byte) string {
	var device, block string
	for field := range bytes.SplitSeq(event, []byte{0}) {
		if v, ok := strings.CutPrefix(string(field), "DM_VERITY_ERR_BLOCK_NR="); ok {
			block = v
		}
		if v, ok := strings.CutPrefix(string(field), "DEVNAME="); ok {
			device = v
		}
	}
	kind, number, ok := strings.Cut(block, ",")
	if !ok {
		return ""
	}
	where := "block"
	if kind == "1" {
		where = "hash tree block"
	}
	if _, err := strconv.ParseUint(number, 10, 64); err != nil {
		return ""
	}
	return fmt.Sprintf("root disk does not verify: %s %s of %s", where, number, device)
}
