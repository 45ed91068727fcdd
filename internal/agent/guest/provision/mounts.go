package provision

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"unsafe"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// mountFlags are the options that are no file system's own.
var mountFlags = map[string]struct {
	set, clear uintptr
}{
	"defaults": {}, "rw": {clear: unix.MS_RDONLY}, "ro": {set: unix.MS_RDONLY},
	"nosuid": {set: unix.MS_NOSUID}, "suid": {clear: unix.MS_NOSUID}, "nodev": {set: unix.MS_NODEV}, "dev": {clear: unix.MS_NODEV},
	"noexec": {set: unix.MS_NOEXEC}, "exec": {clear: unix.MS_NOEXEC}, "sync": {set: unix.MS_SYNCHRONOUS}, "async": {clear: unix.MS_SYNCHRONOUS},
	"noatime": {set: unix.MS_NOATIME}, "atime": {clear: unix.MS_NOATIME}, "nodiratime": {set: unix.MS_NODIRATIME}, "diratime": {clear: unix.MS_NODIRATIME},
	"relatime": {set: unix.MS_RELATIME}, "norelatime": {clear: unix.MS_RELATIME}, "strictatime": {set: unix.MS_STRICTATIME}, "dirsync": {set: unix.MS_DIRSYNC},
	"lazytime": {set: unix.MS_LAZYTIME}, "nolazytime": {clear: unix.MS_LAZYTIME}, "bind": {set: unix.MS_BIND}, "rbind": {set: unix.MS_BIND | unix.MS_REC},
	// What mount(8) and systemd keep to themselves.
	"auto": {}, "noauto": {}, "nofail": {}, "_netdev": {}, "user": {set: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	"users": {set: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC}, "nouser": {}, "owner": {set: unix.MS_NOSUID | unix.MS_NODEV}, "group": {set: unix.MS_NOSUID | unix.MS_NODEV},
}

// mountOptions is an fstab's fourth field.
type mountOptions struct {
	flags          uintptr
	data           string
	noauto, nofail bool
}

func parseMountOptions(text string) mountOptions {
	var o mountOptions
	var data []string
	for word := range strings.SplitSeq(text, ",") {
		f, known := mountFlags[word]
		switch {
		case word == "" || strings.HasPrefix(word, "x-") || strings.HasPrefix(word, "comment="):
		case known:
			o.flags = o.flags&^f.clear | f.set
			o.noauto = o.noauto || word == "noauto"
			o.nofail = o.nofail || word == "nofail"
		default:
			data = append(data, word)
		}
	}
	o.data = strings.Join(data, ",")
	return o
}

// mounts mounts file systems, as fstab(5) would have it.
func (r *Provisioner) mounts() error {
	for _, m := range r.GetMounts() {
		o := parseMountOptions(m.GetOptions())
		if o.noauto {
			continue
		}
		err := element("mount", m.GetPath(), r.mount(m, o))
		if err != nil && o.nofail {
			r.say("%v", err)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *Provisioner) mount(m *agentv1.FileSystemMount, o mountOptions) error {
	if m.GetType() == "swap" {
		return r.swapOn(m)
	}
	if err := checkPath(m.GetPath()); err != nil {
		return err
	}
	if o.flags&unix.MS_BIND != 0 {
		return r.bind(m, o)
	}
	source := m.GetSource()
	if tag, value, ok := strings.Cut(source, "="); ok && (tag == "LABEL" || tag == "UUID") {
		device, err := findDevice(tag, strings.Trim(value, `"`))
		if err != nil {
			return err
		}
		source = device
	}
	on, err := r.mountPoint(m.GetPath(), true)
	if err != nil {
		return err
	}
	defer unix.Close(on)
	types := []string{m.GetType()}
	if m.GetType() == "" || m.GetType() == "auto" {
		if types, err = diskTypes(); err != nil {
			return err
		}
	}
	for _, kind := range types {
		err = unix.Mount(source, fdPath(on), kind, o.flags, o.data)
		if !errors.Is(err, unix.EINVAL) || len(types) == 1 {
			break
		}
	}
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("the machine's kernel has no file system %q", m.GetType())
	case err != nil:
		return fmt.Errorf("mounting %s: %w", m.GetSource(), err)
	}
	return nil
}

// mountPoint opens what is mounted on, and makes it when it is not there: a directory, or an empty file.
func (r *Provisioner) mountPoint(name string, dir bool) (int, error) {
	if dir {
		if err := r.root.makeDir(name); err != nil {
			return -1, err
		}
	} else if !r.root.exists(name) {
		if err := r.root.put(name, nil, 0o644); err != nil {
			return -1, err
		}
	}
	return r.root.open(name, unix.O_PATH)
}

func (r *Provisioner) bind(m *agentv1.FileSystemMount, o mountOptions) error {
	if err := checkPath(m.GetSource()); err != nil {
		return err
	}
	from, err := r.root.open(m.GetSource(), unix.O_PATH)
	if err != nil {
		return fmt.Errorf("its source %q: %w", m.GetSource(), err)
	}
	defer unix.Close(from)
	on, err := r.mountPoint(m.GetPath(), r.root.isDir(m.GetSource()))
	if err != nil {
		return err
	}
	defer unix.Close(on)
	if err := unix.Mount(fdPath(from), fdPath(on), "", o.flags&(unix.MS_BIND|unix.MS_REC), ""); err != nil {
		return fmt.Errorf("mounting %s: %w", m.GetSource(), err)
	}
	rest := o.flags &^ (unix.MS_BIND | unix.MS_REC)
	if rest == 0 {
		return nil
	}
	// A bind mount takes its flags in a second step, of what is now on top.
	top, err := r.root.open(m.GetPath(), unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	if err := unix.Mount("", fdPath(top), "", unix.MS_BIND|unix.MS_REMOUNT|rest, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", m.GetSource(), err)
	}
	return nil
}

func (r *Provisioner) swapOn(m *agentv1.FileSystemMount) error {
	fd, err := r.root.open(m.GetSource(), unix.O_PATH)
	if err != nil {
		return fmt.Errorf("swap on %q: %w", m.GetSource(), err)
	}
	defer unix.Close(fd)
	name, err := unix.BytePtrFromString(fdPath(fd))
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(name)), 0, 0); errno != 0 && errno != unix.EBUSY {
		return fmt.Errorf("swap on %q: %w", m.GetSource(), errno)
	}
	return nil
}

// diskTypes are the kernel's file systems that are on disks.
func diskTypes() ([]string, error) {
	data, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(data)) {
		if !strings.HasPrefix(line, "nodev") {
			out = append(out, strings.TrimSpace(line))
		}
	}
	return out, nil
}

// findDevice finds the disk with an ext2, 3 or 4 of that label or UUID: no udev has made links to it.
func findDevice(tag, value string) (string, error) {
	const sysBlock = "/sys/class/block"
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		f, err := os.Open("/dev/" + e.Name())
		if err != nil {
			continue
		}
		label, uuid := readExt(f)
		f.Close()
		if tag == "LABEL" && label == value || tag == "UUID" && strings.EqualFold(uuid, value) {
			return "/dev/" + e.Name(), nil
		}
	}
	return "", fmt.Errorf("no disk has an ext2, ext3 or ext4 file system with %s=%s", tag, value)
}

// readExt reads the superblock of ext2 and its followers (https://docs.kernel.org/filesystems/ext4/globals.html).
func readExt(r io.ReaderAt) (label, uuid string) {
	const start, magic = 1024, 0xef53
	super := make([]byte, 264)
	if _, err := r.ReadAt(super, start); err != nil || binary.LittleEndian.Uint16(super[56:]) != magic {
		return "", ""
	}
	u := hex.EncodeToString(super[104:120])
	label, _, _ = strings.Cut(string(bytes.TrimRight(super[120:136], "\x00")), "\x00")
	return label, u[:8] + "-" + u[8:12] + "-" + u[12:16] + "-" + u[16:20] + "-" + u[20:]
}

const secretDir = "/run/secrets"

// secrets writes secrets where no disk has them: into a tmpfs of their own.
func (r *Provisioner) secrets() error {
	if r.o.Init {
		if err := r.keepRun(); err != nil {
			return fmt.Errorf("secrets: mounting /run: %w", err)
		}
	}
	// nr_inodes and size: a secret is small, and this must not become a place for anything else.
	const options = "mode=0755,size=16m"
	if _, err := r.root.scratch(secretDir, options, unix.MS_NOEXEC); err != nil {
		return fmt.Errorf("secrets: mounting %s: %w", secretDir, err)
	}
	for _, s := range r.GetSecrets() {
		if err := r.secret(s); err != nil {
			return element("secret", s.GetName(), err)
		}
	}
	return nil
}

func (r *Provisioner) secret(s *agentv1.Secret) error {
	name := s.GetName()
	if name == "" || name == "." || name == ".." || name != path.Base(name) || strings.ContainsRune(name, 0) {
		return errors.New("not a name of a file")
	}
	uid, gid, err := r.owner(s.GetUser(), s.GetGroup(), nil)
	if err != nil {
		return err
	}
	mode := uint32(0o400)
	if s.Mode != nil {
		mode = s.GetMode()
	}
	return r.root.putAs(path.Join(secretDir, name), s.GetData(), uid, gid, mode)
}

// keepRun mounts the /run that an init would mount over ours, and over what is below it: one that finds it mounted leaves it.
func (r *Provisioner) keepRun() error {
	var st, up unix.Stat_t
	fd, err := r.mountPoint("/run", true)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Fstat(fd, &st), unix.Fstatat(r.root.fd, ".", &up, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
		return err
	}
	if st.Dev != up.Dev {
		return nil // it is a mount already
	}
	// As systemd has it.
	return unix.Mount("tmpfs", fdPath(fd), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_STRICTATIME, "mode=0755,size=20%,nr_inodes=800k")
}
