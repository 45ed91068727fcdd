package provision

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

// scriptDir is where scripts are while they run: a tmpfs for root only, so that they never reach the disk.
const scriptDir = "/run/atoll"

// wants says whether a command runs at this boot, after everything else.
func (r *Provisioner) wants(c *agentv1.Command) bool {
	return !c.GetEarly() && (r.GetFirst() || c.GetEachBoot())
}

// wantsEarly says whether a command runs at this boot, before everything else.
func (r *Provisioner) wantsEarly(c *agentv1.Command) bool {
	return c.GetEarly() && (r.GetFirst() || c.GetEachBoot())
}

// commands runs commands in their order. The first that fails ends it.
func (r *Provisioner) commands(which func(*agentv1.Command) bool) error {
	for i, c := range r.GetCommands() {
		if !which(c) {
			continue
		}
		name := c.GetName()
		if name == "" {
			name = fmt.Sprint("command ", i+1)
		}
		r.changed = true
		r.o.Step("command " + name)
		err := r.command(name, c)
		var exit *ExitError
		if c.GetIgnoreFailure() && errors.As(err, &exit) {
			r.say("%v", err)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *Provisioner) command(name string, c *agentv1.Command) (err error) {
	argv := c.GetArgv()
	if c.Script != nil {
		release, cerr := r.root.scratch(scriptDir, "mode=0700", 0)
		if cerr != nil {
			return fmt.Errorf("%s: making a place for its script: %w", name, cerr)
		}
		defer func() { err = errors.Join(err, release()) }()
		file := scriptDir + "/script"
		if err := r.root.put(file, c.GetScript(), 0o700); err != nil {
			return fmt.Errorf("%s: writing its script: %w", name, err)
		}
		argv = append(interpreter(c.GetScript(), file), argv...)
	}
	return r.exec(name, argv, c.GetEnv(), r.o.Output)
}

// interpreter is how a script begins to run: a shell's own, which does not say so, needs a shell.
func interpreter(script []byte, file string) []string {
	if bytes.HasPrefix(script, []byte("#!")) || bytes.HasPrefix(script, []byte("\x7fELF")) {
		return []string{file}
	}
	return []string{"/bin/sh", file}
}

// scratch mounts a tmpfs on a directory until release, which also removes the directory where it was not there.
func (t *tree) scratch(dir, options string, flags uintptr) (release func() error, err error) {
	had := t.isDir(dir)
	if err := t.makeDir(dir); err != nil {
		return nil, err
	}
	on, err := t.dir(dir)
	if err != nil {
		return nil, err
	}
	defer unix.Close(on)
	flags |= unix.MS_NOSUID | unix.MS_NODEV
	if err = unix.Mount("atoll", fdPath(on), "tmpfs", flags, options+",noswap"); errors.Is(err, unix.EINVAL) { // Linux 6.4
		err = unix.Mount("atoll", fdPath(on), "tmpfs", flags, options)
	}
	if err != nil {
		return nil, err
	}
	return func() error {
		fd, err := t.dir(dir)
		if err != nil {
			return err
		}
		// What was left running may have a file of it open.
		err = unix.Unmount(fdPath(fd), unix.MNT_DETACH)
		unix.Close(fd)
		if err != nil || had {
			return err
		}
		p, err := t.at(dir, false)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer p.close()
		return unix.Unlinkat(p.dir, p.name, unix.AT_REMOVEDIR)
	}, nil
}

func fdPath(fd int) string { return fmt.Sprint("/proc/self/fd/", fd) }

// packagers are the package managers by which an image is told: the first that is there.
var packagers = []struct {
	binary                   string
	update, upgrade, install []string
	env                      []string
	joint                    string // between a package and its version; "": =
}{
	{
		binary: "apt-get",
		update: []string{"-q", "update"}, upgrade: append(aptOptions, "dist-upgrade"), install: append(aptOptions, "install", "--"),
		env: []string{"DEBIAN_FRONTEND=noninteractive", "APT_LISTCHANGES_FRONTEND=none", "NEEDRESTART_SUSPEND=1"},
	},
	{binary: "apk", update: []string{"update"}, upgrade: []string{"upgrade"}, install: []string{"add", "--no-progress", "--"}},
	{binary: "dnf", update: []string{"-y", "makecache"}, upgrade: []string{"-y", "upgrade"}, install: []string{"-y", "install", "--"}, joint: "-"},
	{binary: "microdnf", update: []string{"-y", "makecache"}, upgrade: []string{"-y", "upgrade"}, install: []string{"-y", "install", "--"}, joint: "-"},
	{binary: "yum", update: []string{"-y", "makecache"}, upgrade: []string{"-y", "update"}, install: []string{"-y", "install", "--"}, joint: "-"},
}

var aptOptions = []string{"-q", "-y", "-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"}

func (r *Provisioner) wantsPackages() bool {
	k := r.GetPackages()
	return len(k.GetNames()) > 0 || k.GetUpdate() || k.GetUpgrade()
}

// packages installs packages with what the image has for it. Their services are not started here: what runs is the entrypoint's or the
// init's to say.
func (r *Provisioner) packages() (err error) {
	k := r.GetPackages()
	for _, name := range k.GetNames() {
		if name == "" || strings.HasPrefix(name, "-") || strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
			return element("package", name, errors.New("not a name of a package"))
		}
	}
	for _, m := range packagers {
		binary := r.binary(m.binary)
		if binary == "" {
			continue
		}
		undo, err := r.holdServices()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, undo()) }()
		run := func(args ...string) error {
			return r.exec("packages: "+m.binary+" "+verb(args), append([]string{binary}, args...), m.env, r.o.Output)
		}
		if k.GetUpdate() || k.GetUpgrade() || !r.hasLists(m.binary) {
			if err := run(m.update...); err != nil {
				return err
			}
		}
		if k.GetUpgrade() {
			if err := run(m.upgrade...); err != nil {
				return err
			}
		}
		if len(k.GetNames()) > 0 {
			return run(append(m.install[:len(m.install):len(m.install)], joined(k.GetNames(), m.joint)...)...)
		}
		return nil
	}
	return errors.New("packages: the image has no package manager that is known here: apt-get, apk, dnf, microdnf or yum")
}

// joined writes NAME=VERSION as a package manager has it.
func joined(names []string, joint string) []string {
	if joint == "" {
		return names
	}
	out := slices.Clone(names)
	for i, n := range out {
		if name, version, ok := strings.Cut(n, "="); ok && !strings.ContainsAny(n, "<>") {
			out[i] = name + joint + version
		}
	}
	return out
}

// verb is the first argument that is neither an option nor one's value.
func verb(args []string) string {
	for i, a := range args {
		if !strings.HasPrefix(a, "-") && (i == 0 || args[i-1] != "-o") {
			return a
		}
	}
	return ""
}

// hasLists says whether the image knows which packages there are; most images for containers come without.
func (r *Provisioner) hasLists(binary string) bool {
	dir, sign := "", ""
	switch binary {
	case "apt-get":
		dir, sign = "/var/lib/apt/lists", "_Packages"
	case "apk":
		dir, sign = "/var/cache/apk", "APKINDEX"
	default:
		return true // they fetch what they need by themselves
	}
	names, err := r.root.list(dir)
	if err != nil {
		return false
	}
	for _, n := range names {
		if strings.Contains(n, sign) {
			return true
		}
	}
	return false
}

// holdServices has Debian's packages start nothing (https://people.debian.org/~hmh/invokerc.d-policyrc.d-specification.txt).
func (r *Provisioner) holdServices() (undo func() error, err error) {
	const file = "/usr/sbin/policy-rc.d"
	if r.root.exists(file) || !r.root.exists("/usr/sbin") {
		return func() error { return nil }, nil
	}
	if err := r.root.put(file, []byte("#!/bin/sh\nexit 101\n"), 0o755); err != nil {
		return nil, fmt.Errorf("packages: writing %s: %w", file, err)
	}
	return func() error { return r.root.remove(file) }, nil
}
