//go:build linux

package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// workshop is where a kernel is built: the source, which is only read, and a directory to build in. A daemon that is root builds as a user of no one
// else's, who can write nothing but that directory and a /tmp of the build's own, has no network, and sees no other process; when the
// first of its processes ends, so do all. Other daemons build as their own user.
type workshop struct {
	dir    string // holds all of it
	source string
	build  string
	uid    int // 0: this process's own user
	env    []string
	log    *buildLog
}

// The paths under which a build by root sees its directories: always the same, wherever ATOLL_HOME is.
const (
	roomDir    = "/tmp/linux"
	roomSource = roomDir + "/src"
	roomBuild  = roomDir + "/build"
)

// roomScript runs as root in mount, PID, network and IPC namespaces of its own and ends by becoming the command as the build's user. The new /tmp is
// put together beside the source first, as either may lie below /tmp.
const roomScript = `set -e
mount --make-rprivate /
mkdir -p "$ROOM/tmp"
mount -t tmpfs -o mode=1777,size=1g,nosuid,nodev tmpfs "$ROOM/tmp"
mkdir -p "$ROOM$SEEN_SOURCE" "$ROOM$SEEN_BUILD"
mount --bind "$SOURCE" "$ROOM$SEEN_SOURCE"
mount -o remount,bind,ro,nosuid,nodev "$ROOM$SEEN_SOURCE"
mount --bind "$BUILD" "$ROOM$SEEN_BUILD"
mount --rbind "$ROOM/tmp" /tmp
for d in /var/tmp /dev/shm /dev/mqueue /run/lock; do
	if [ -d "$d" ]; then mount -t tmpfs -o ro tmpfs "$d"; fi
done
mount -t proc proc /proc
cd "$SEEN_BUILD"
unset ROOM SOURCE BUILD
exec setpriv --reuid="$USER_ID" --regid="$USER_ID" --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all --pdeathsig KILL nice -n 10 "$@"`

// newWorkshop makes the directories in dir.
func newWorkshop(dir string, log *buildLog) (*workshop, error) {
	w := &workshop{dir: dir, source: filepath.Join(dir, "src"), build: filepath.Join(dir, "build"), log: log}
	for _, d := range []string{w.source, w.build} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	if os.Geteuid() == 0 {
		w.uid = freeUID()
		if err := os.Chown(w.build, w.uid, w.uid); err != nil {
			return nil, err
		}
	}
	// What Linux would say of the machine and the time it was built on; the same everywhere, so that the result is.
	w.env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=" + w.seen(w.build),
		"KBUILD_BUILD_USER=atoll", "KBUILD_BUILD_HOST=atoll", "KBUILD_BUILD_VERSION=1",
		"KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970", "SOURCE_DATE_EPOCH=0",
	}
	return w, nil
}

// freeUID picks a user of no one else's from the range that systemd takes its dynamic users from.
func freeUID() int {
	const first, last = 61184, 65519
	for id := first + os.Getpid()%(last-first); ; id++ {
		if _, err := user.LookupId(strconv.Itoa(id)); err != nil || id >= last {
			return id
		}
	}
}

// seen is the path by which the build knows its source or build directory.
func (w *workshop) seen(dir string) string {
	switch {
	case w.uid == 0:
		return dir
	case dir == w.source:
		return roomSource
	}
	return roomBuild
}

// write makes a file in the build directory.
func (w *workshop) write(name, text string) error {
	path := filepath.Join(w.build, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return noSpace(path, err)
	}
	if w.uid == 0 {
		return nil
	}
	return os.Lchown(path, w.uid, w.uid)
}

// make runs make on the source.
func (w *workshop) make(ctx context.Context, args ...string) error {
	argv := append([]string{"make", "-C", w.seen(w.source), "O=" + w.seen(w.build)}, args...)
	if err := w.run(ctx, argv...); err != nil {
		return fmt.Errorf("make %s: %w", args[len(args)-1], err)
	}
	return nil
}

// run runs a command in the build directory; its output goes to the log. With ctx it ends, and all that it has started.
func (w *workshop) run(ctx context.Context, argv ...string) error {
	var cmd *exec.Cmd
	if w.uid == 0 {
		cmd = exec.CommandContext(ctx, "nice", append([]string{"-n", "10"}, argv...)...)
		cmd.Dir, cmd.Env = w.build, w.env
		// To make, SIGTERM is to end its children first; it comes when the daemon dies.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	} else {
		cmd = exec.CommandContext(ctx, "sh", append([]string{"-c", roomScript, "sh"}, argv...)...)
		cmd.Dir = "/"
		cmd.Env = append(slices.Clone(w.env), "ROOM="+w.dir, "SOURCE="+w.source, "BUILD="+w.build, "USER_ID="+strconv.Itoa(w.uid),
			"SEEN_SOURCE="+roomSource, "SEEN_BUILD="+roomBuild)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Setpgid: true, Pdeathsig: syscall.SIGKILL,
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		}
	}
	cmd.Stdout, cmd.Stderr = w.log, w.log
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// open opens a file that the build has made, and no link that leads elsewhere.
func (w *workshop) open(name string) (*os.File, error) { return os.OpenInRoot(w.build, name) }

// buildLog keeps all output of a build in a file and tells how far it is.
type buildLog struct {
	file   *os.File
	report func(step string, steps int) // called for a step of the build, now and then
	line   []byte
	steps  int
	next   time.Time
}

// progressEvery is how often a build says where it is: on a terminal often enough, in a log not too often.
const progressEvery = 5 * time.Second

// stepLine is what Kbuild prints for a step, as "  CC      net/ipv4/tcp.o".
var stepLine = regexp.MustCompile(`^  [A-Z][A-Z0-9_]*(?: \[M\])? +(\S+)$`)

func (l *buildLog) Write(p []byte) (int, error) {
	n, err := l.file.Write(p)
	if err != nil {
		return n, noSpace(l.file.Name(), err)
	}
	for _, c := range p {
		if c != '\n' {
			if len(l.line) < 1024 {
				l.line = append(l.line, c)
			}
			continue
		}
		if m := stepLine.FindSubmatch(l.line); m != nil {
			l.steps++
			if now := time.Now(); now.After(l.next) {
				l.next = now.Add(progressEvery)
				l.report(string(m[1]), l.steps)
			}
		}
		l.line = l.line[:0]
	}
	return n, nil
}

// tail returns the last lines that are no steps that went well.
func (l *buildLog) tail(lines int) string {
	const enough = 64 << 10
	st, err := l.file.Stat()
	if err != nil {
		return ""
	}
	data, err := io.ReadAll(io.NewSectionReader(l.file, max(0, st.Size()-enough), enough))
	if err != nil {
		return ""
	}
	var kept []string
	for line := range strings.Lines(string(bytes.ToValidUTF8(data, []byte("?")))) {
		if line = strings.TrimRight(line, "\r\n"); line != "" && !stepLine.MatchString(line) {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept[max(0, len(kept)-lines):], "\n")
}

// tool is something that a build needs and what package of Debian's brings it.
type tool struct{ name, debian string }

// buildTools is what building takes; openssl is asked for by configurations that sign modules.
func buildTools(arch, host string) (programs, headers []tool) {
	programs = []tool{{"gcc", "gcc"}, {"make", "make"}, {"flex", "flex"}, {"bison", "bison"}, {"bc", "bc"}, {"perl", "perl"}}
	if arch != host {
		programs = append(programs, tool{crossPrefix[arch] + "gcc", "gcc-" + strings.ReplaceAll(strings.TrimSuffix(crossPrefix[arch], "-"), "_", "-")})
	}
	if os.Geteuid() == 0 {
		programs = append(programs, tool{"setpriv", "util-linux"}, tool{"mount", "mount"})
	}
	return programs, []tool{{"stdio.h", "libc6-dev"}, {"gelf.h", "libelf-dev"}, {"openssl/opensslv.h", "libssl-dev"}}
}

// MissingBuildTools names what a build of a kernel for arch lacks on this host, and the command that mends it.
func MissingBuildTools(ctx context.Context, arch, host string) (missing []string, install string) {
	programs, headers := buildTools(arch, host)
	var packages []string
	lack := func(t tool) {
		missing = append(missing, t.name)
		packages = append(packages, t.debian)
	}
	for _, t := range programs {
		if _, err := exec.LookPath(t.name); err != nil {
			lack(t)
		}
	}
	if !slices.Contains(missing, "gcc") {
		for _, t := range headers {
			cmd := exec.CommandContext(ctx, "gcc", "-E", "-x", "c", "-o", os.DevNull, "-")
			cmd.Stdin = strings.NewReader("#include <" + t.name + ">\n")
			if cmd.Run() != nil {
				lack(t)
			}
		}
	} else { // nothing to ask
		for _, t := range headers {
			packages = append(packages, t.debian)
		}
	}
	return missing, "sudo apt install " + strings.Join(packages, " ")
}

// crossPrefix is what the names of a compiler for an architecture begin with where it is not the host's own.
var crossPrefix = map[string]string{"amd64": "x86_64-linux-gnu-", "arm64": "aarch64-linux-gnu-"}

func checkTools(ctx context.Context, arch, host string) error {
	missing, install := MissingBuildTools(ctx, arch, host)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if len(missing) == 0 {
		return nil
	}
	return hint.With(fmt.Errorf("building needs %s: not found: %w", strings.Join(missing, ", "), errdefs.ErrFailedPrecondition), "%s", install)
}

// compiler returns the version of compiler and linker: other versions make another kernel.
func compiler(ctx context.Context, prefix string) (string, error) {
	var versions []string
	for _, program := range []string{prefix + "gcc", prefix + "ld"} {
		out, err := exec.CommandContext(ctx, program, "--version").Output()
		if err != nil {
			return "", errors.Join(fmt.Errorf("asking %s for its version: %w", program, err), context.Cause(ctx))
		}
		line, _, _ := strings.Cut(string(out), "\n")
		versions = append(versions, line)
	}
	return strings.Join(versions, ", "), nil
}
