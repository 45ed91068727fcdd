package base

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// applets are the programs that Debian 12's busybox-static contains (busybox --list), without dpkg, rpm and the like that would
// pretend to be what they are not, and without init.
const applets = `[ [[ adjtimex ar arch arp arping ascii ash awk base64 basename bc blkdiscard blockdev brctl bunzip2 bzcat bzip2 cal cat
chgrp chmod chown chroot clear cmp cp cpio crc32 crond crontab cttyhack cut date dc dd devmem df diff dirname dmesg dnsdomainname dos2unix du
echo ed egrep env expand expr factor fallocate false fatattr fdisk fgrep find findfs fold free fsfreeze fstrim ftpget ftpput getopt getty
grep groups gunzip gzip halt head hexdump hostid hostname httpd hwclock id ifconfig ifdown ifup insmod ionice ip ipcalc ipneigh kill killall klogd
last less link linux32 linux64 ln logger login logname logread losetup ls lsmod lzcat lzma lzop md5sum mdev microcom mkdir mkdosfs mke2fs
mkfifo mknod mkpasswd mkswap mktemp modinfo modprobe more mount mt mv nameif nc netstat nl nologin nproc nsenter nslookup od partprobe passwd
paste patch pidof ping ping6 pivot_root poweroff printf ps pwd rdate readlink realpath reboot renice reset rev rm rmdir rmmod route run-parts sed seq setpriv
setsid sh sha1sum sha256sum sha3sum sha512sum shred shuf sleep sort ssl_client start-stop-daemon stat strings stty su sulogin svc svok swapoff
swapon switch_root sync sysctl syslogd tac tail tar taskset tc tee telnet telnetd test tftp time timeout top touch tr traceroute traceroute6
true truncate ts tty tunctl udhcpc udhcpd umount uname uncompress unexpand uniq unix2dos unlink unlzma unshare unxz unzip uptime usleep
uudecode uuencode vconfig vi w watch watchdog wc wget which who whoami xargs xxd xz xzcat yes zcat`

// busybox is a small system of one program, from Debian's package.
type busybox struct{}

func (busybox) plan(ctx context.Context, b *Builder, base Base, o Options, progress func(string)) (*plan, error) {
	if len(o.Packages) > 0 {
		return nil, hint.With(fmt.Errorf("packages for busybox: it has no package manager: %w", errdefs.ErrInvalidArgument), "choose another base, such as debian:bookworm-slim")
	}
	suites, release, err := sourceOf(ctx, b, debian.Debian(), base, o)
	if err != nil {
		return nil, err
	}
	progress("Reading package index")
	pkg, err := suites.Get(ctx, runtime.GOARCH, "busybox-static")
	if err != nil {
		return nil, err
	}
	return &plan{
		origin: fmt.Sprintf("Debian %s (%s) from %s", release.Version, base.release, suites[0].Mirror),
		epoch:  release.Date, config: imageConfig(base, "sh"),
		write: func(ctx context.Context, layer io.Writer) error {
			progress(fmt.Sprintf("Fetching %s %s", pkg.Name, pkg.Version))
			return writeBusybox(ctx, pkg, release.Date, layer)
		},
	}, nil
}

func writeBusybox(ctx context.Context, pkg debian.Package, epoch time.Time, layer io.Writer) error {
	deb, err := pkg.Fetch(ctx, nil)
	if err != nil {
		return err
	}
	var binary []byte
	err = debian.Walk(deb, func(h *tar.Header, r io.Reader) (err error) {
		if h.Name == "bin/busybox" || h.Name == "usr/bin/busybox" {
			binary, err = io.ReadAll(r)
		}
		return err
	})
	if err != nil {
		return err
	}
	if binary == nil {
		return fmt.Errorf("package %s has no busybox: %w", pkg.Name, errdefs.ErrDataLoss)
	}

	tw := tar.NewWriter(layer)
	for _, dir := range []struct {
		name string
		mode int64
	}{
		{"bin", 0o755}, {"dev", 0o755}, {"etc", 0o755}, {"home", 0o755}, {"proc", 0o755}, {"root", 0o700}, {"run", 0o755}, {"sys", 0o755}, {"tmp", 0o1777},
		{"usr", 0o755}, {"usr/bin", 0o755}, {"usr/sbin", 0o755}, {"sbin", 0o755}, {"var", 0o755}, {"var/tmp", 0o1777}, {"var/log", 0o755},
	} {
		if err := tw.WriteHeader(&tar.Header{Name: dir.name + "/", Typeflag: tar.TypeDir, Mode: dir.mode, ModTime: epoch}); err != nil {
			return err
		}
	}
	if err := writeFile(tw, "bin/busybox", 0o755, epoch, binary); err != nil {
		return err
	}
	for name := range strings.FieldsSeq(applets) {
		if err := tw.WriteHeader(&tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777, ModTime: epoch}); err != nil {
			return err
		}
	}
	// Scripts begin with #!/usr/bin/env.
	if err := tw.WriteHeader(&tar.Header{Name: "usr/bin/env", Typeflag: tar.TypeSymlink, Linkname: "../../bin/busybox", Mode: 0o777, ModTime: epoch}); err != nil {
		return err
	}
	etc := map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nwww-data:x:33:33:www-data:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"etc/group":  "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnogroup:x:65534:\n",
		"etc/shells": "/bin/sh\n/bin/ash\n",
	}
	for _, name := range sorted(etc) {
		if err := writeFile(tw, name, 0o644, epoch, []byte(etc[name])); err != nil {
			return err
		}
	}
	if err := writeFile(tw, "etc/shadow", 0o640, epoch, []byte("root:*:::::::\n")); err != nil {
		return err
	}
	return tw.Close()
}

func sorted(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
