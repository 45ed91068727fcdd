// Package provision carries a Provision out on a root directory: accounts, files, units, keys, packages, commands. All of it is done, or
// an error names the element that could not be. It undoes nothing: the host throws away the disk of a first boot that was not finished.
// What the guest gets each time it boots, whether provisioned or not (hostname, hosts, network), is not its own.
//
// Every path is resolved inside the root: an image's links do not lead out of it. Files are written whole: they get their names when
// their bytes, owners and modes are right. Contents, hashes, keys, secrets and scripts are in no error's text.
//
// Imported by the agent, and by tests of what makes a Provision. A Provisioner belongs to one goroutine.
package provision

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"golang.org/x/sys/unix"
)

// Options is what a provisioning has beside the message.
type Options struct {
	Root string // a directory: "/" in a guest
	// Contents is where the frames of the streamed pieces come, as Content, after the message: of each piece so many as it takes, the last
	// one with end. It may be nil where no piece is streamed.
	Contents io.Reader
	Step     func(name string)          // called as each part begins, as "users"; may be nil
	Output   func([]byte)               // what commands and the package manager write, and what a person should know; may be nil
	Run      func(Command) (int, error) // runs a command in the root to its end and returns its exit code; nil: none can be run
	Env      []string                   // of commands and the package manager
	Init     bool                       // the image's own init follows: it mounts a /run of its own
}

// Command is a process that a provisioning needs: root's, with nothing on stdin. Its cgroup is Run's to choose.
type Command struct {
	Argv   []string
	Env    []string
	Output func([]byte) // stdout and stderr
}

// ExitError is a command that did not end with 0.
type ExitError struct {
	Name string
	Code int
}

func (e *ExitError) Error() string { return fmt.Sprintf("%s: exit code %d", e.Name, e.Code) }

// Provisioner carries one Provision out: Early, Files and Late, in this order.
type Provisioner struct {
	*agentv1.Provision
	o        Options
	root     *tree
	contents *contentStream
	done     map[node]string // the paths of directories, files and links, by what they are in the root
	deferred []deferredFile
	again    []part // what the packages may make possible
	late     bool   // they are there
	changed  bool   // the root is not as the image has it any more
}

type part struct {
	name   string
	needed bool
	do     func() error
}

// New opens the root. Close closes it.
func New(p *agentv1.Provision, o Options) (*Provisioner, error) {
	root, err := openTree(o.Root)
	if err != nil {
		return nil, fmt.Errorf("opening the root to provision: %w", err)
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	if o.Output == nil {
		o.Output = func([]byte) {}
	}
	return &Provisioner{Provision: p, o: o, root: root, contents: &contentStream{r: o.Contents}, done: map[node]string{}}, nil
}

// Close lets go of the root.
func (r *Provisioner) Close() error {
	for _, d := range r.deferred {
		d.close()
	}
	r.root.close()
	return nil
}

// Apply does all of a Provision on a root.
func Apply(p *agentv1.Provision, o Options) error {
	r, err := New(p, o)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, do := range []func() error{r.Early, r.Files, r.Late} {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// Early runs the commands that come before everything else, without a network.
func (r *Provisioner) Early() error {
	return r.commands(r.wantsEarly)
}

// Files does what changes files, and needs no network.
func (r *Provisioner) Files() error {
	if !r.GetFirst() {
		return nil
	}
	if err := r.run([]part{
		{"groups", len(r.GetGroups()) > 0, r.groups},
		{"users", len(r.GetUsers()) > 0, r.users},
		{"directories", len(r.GetDirectories()) > 0, r.directories},
		{"files", len(r.GetFiles()) > 0, r.files},
		{"links", len(r.GetLinks()) > 0, r.links},
		{"units", len(r.GetUnits()) > 0, r.units},
	}); err != nil {
		return err
	}
	return r.run([]part{
		{"ssh host keys", len(r.GetSshHostKeys()) > 0 && (r.root.isDir(sshDir) || r.wantsPackages()), r.sshHostKeys},
		{"timezone", r.GetTimezone() != "", r.timezone},
		{"locale", r.GetLocale() != "", r.locale},
		{"certificate authorities", len(r.GetCaCertificates()) > 0, r.authorities},
	})
}

// Late does the rest: mounts and secrets, packages, and commands. grow_root has nothing to do: a machine's disk has the size that was
// asked for before the guest first sees it.
func (r *Provisioner) Late() error {
	if err := r.run([]part{
		{"mounts", len(r.GetMounts()) > 0, r.mounts},
		{"secrets", len(r.GetSecrets()) > 0, r.secrets},
		{"packages", r.GetFirst() && r.wantsPackages(), r.packages},
	}); err != nil {
		return err
	}
	r.late = true
	if err := r.run(r.again); err != nil {
		return err
	}
	if err := r.run([]part{{"deferred files", len(r.deferred) > 0, r.deferredFiles}}); err != nil {
		return err
	}
	if err := r.commands(r.wants); err != nil {
		return err
	}
	if !r.GetFirst() || !r.changed {
		return nil
	}
	// The host notes that the first boot was finished: then the disk must hold what it did.
	fd, err := r.root.open(".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("bringing the root's files to the disk: %w", err)
	}
	return nil
}

func (r *Provisioner) run(parts []part) error {
	for _, p := range parts {
		if !p.needed {
			continue
		}
		r.changed = true
		r.o.Step(p.name)
		if err := p.do(); err != nil {
			return err
		}
	}
	return nil
}

// say tells a person something that is no error.
func (r *Provisioner) say(format string, args ...any) {
	r.o.Output(fmt.Appendf(nil, format+"\n", args...))
}

// exec runs a command of the image.
func (r *Provisioner) exec(name string, argv, env []string, output func([]byte)) error {
	if r.o.Run == nil {
		return fmt.Errorf("%s: nothing can be run in this root", name)
	}
	code, err := r.o.Run(Command{Argv: argv, Env: append(slices.Clone(r.o.Env), env...), Output: output})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if code != 0 {
		return &ExitError{name, code}
	}
	return nil
}

// binary finds a program of the image where programs are.
func (r *Provisioner) binary(names ...string) string {
	for _, name := range names {
		for _, dir := range strings.Split(process.DefaultPath, ":") {
			if r.root.exists(dir + "/" + name) {
				return dir + "/" + name
			}
		}
	}
	return ""
}

// element says which element an error is about.
func element(kind, name string, err error) error {
	if err == nil {
		return nil
	}
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err // the path is one of ours, or below a directory that is open
	}
	return fmt.Errorf("%s %q: %w", kind, name, err)
}
