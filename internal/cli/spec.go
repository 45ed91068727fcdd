package cli

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/cli/pkg/kvfile"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/network"
)

// specFlags are the flags of run and create that describe the machine.
type specFlags struct {
	spec        *atollv1.MachineSpec
	entrypoint  string
	env         []string
	envFiles    []string
	labels      []string
	ports       []string
	stopTimeout seconds
	pull        string
	guest       guestFlags
	health      healthFlags
	provision   *provisionFlags
}

func addSpecFlags(cmd *cobra.Command) *specFlags {
	s := &specFlags{spec: &atollv1.MachineSpec{}, pull: "missing"}
	f := cmd.Flags()
	f.SetInterspersed(false) // what comes after the image is the guest's
	f.StringVar(&s.spec.Name, "name", "", "name of the machine (default: made up)")
	f.BoolVarP(&s.spec.Stdin, "interactive", "i", false, "keep standard input open, and send it when attached")
	f.BoolVarP(&s.spec.Tty, "tty", "t", false, "give the entrypoint a terminal")
	f.BoolVar(&s.spec.Remove, "rm", false, "remove the machine when it stops")
	f.StringArrayVarP(&s.env, "env", "e", nil, "set an environment variable: `KEY=VALUE`, or KEY to take it from here")
	f.StringArrayVar(&s.envFiles, "env-file", nil, "read environment variables from a `FILE` of KEY=VALUE lines")
	f.StringArrayVarP(&s.ports, "publish", "p", nil, "publish a port: `[[ADDRESS:]HOST:]GUEST[/udp]`; the default address is 127.0.0.1")
	f.Uint32Var(&s.spec.Cpus, "cpus", 0, "number of virtual CPUs (default 1)")
	f.VarP((*bytesValue)(&s.spec.MemoryBytes), "memory", "m", "memory, such as 512M or 2G (default 512M)")
	f.Var((*bytesValue)(&s.spec.DiskBytes), "disk-size", "size of the writable disk, such as 20G (default 10G)")
	f.StringVar(&s.spec.Hostname, "hostname", "", "host name in the guest (default: the machine's name)")
	f.StringVar(&s.entrypoint, "entrypoint", "", "replace the image's ENTRYPOINT; \"\" clears it")
	f.StringVarP(&s.spec.WorkingDir, "workdir", "w", "", "working directory in the guest")
	f.StringVarP(&s.spec.User, "user", "u", "", "user and group: `NAME|UID[:GROUP|GID]`")
	f.StringArrayVarP(&s.labels, "label", "l", nil, "add a label: `KEY[=VALUE]`")
	f.StringVar(&s.spec.Network, "network", "", "network to join, or none (default \"default\")")
	f.StringVar(&s.spec.Kernel, "kernel", "", "kernel to boot (default: see atoll kernel ls)")
	f.StringVar(&s.spec.Vmm, "vmm", "", "virtual machine monitor: auto or qemu (default auto)")
	f.StringVar(&s.spec.Platform, "platform", "", "platform of the image: `OS/ARCH[/VARIANT]`")
	f.BoolVar(&s.spec.Verity, "verity", false, "run only from root disks that verify; a changed byte in them fails the machine")
	f.StringVar(&s.pull, "pull", s.pull, "when to pull the image: always, missing or never")
	f.StringVar(&s.spec.StopSignal, "stop-signal", "", "signal that asks the entrypoint to end (default: the image's, else TERM)")
	f.Var(&s.stopTimeout, "stop-timeout", "time to end before it is killed, such as 30 or 1m30s (default 10s)")
	f.StringVar(&s.spec.Init, "init", "", "who is PID 1: agent; image, its own init; auto, the latter where the\nimage runs an init such as /sbin/init (default auto)")
	s.guest.add(cmd, s.spec)
	s.health.add(cmd)
	f.Var(metadataValue{&s.spec.Metadata}, "metadata", "what 169.254.169.254 tells the guest about its machine: off; v2, to who has\na token; v1, to all that can reach it there (default v2)")
	s.provision = addProvisionFlags(cmd)
	f.StringArrayVar(&s.spec.Profiles, "profile", nil, "settings of this `NAME` hold where no flag says otherwise; later ones win")
	f.Var(logOption{s.spec}, "log-opt", "bound the entrypoint's output that is kept: max-size=`SIZE` of a file (default 10m), max-file=N\nof files (default 2)")
	complete(cmd, "log-opt", "max-size=", "max-file=")
	addDiskFlags(cmd, s.spec)
	complete(cmd, "init", "auto", "agent", "image")
	complete(cmd, "metadata", "off", "v2", "v1")
	complete(cmd, "pull", "always", "missing", "never")
	complete(cmd, "vmm", "auto", "qemu")
	return s
}

// machine returns the spec that the flags and the arguments after them ask for.
func (s *specFlags) machine(e *environment, cmd *cobra.Command, args []string) (*atollv1.MachineSpec, error) {
	spec := s.spec
	if len(args) > 0 {
		spec.Image, spec.Command = args[0], args[1:]
	}
	if err := resolveDisk(spec); err != nil {
		return nil, err
	}
	switch s.pull {
	case "always", "missing", "never":
	default:
		return nil, usagef("--pull %q: want always, missing or never", s.pull)
	}
	if cmd.Flags().Changed("name") && spec.Name == "" {
		return nil, usagef("--name: an empty name")
	}
	if cmd.Flags().Changed("cpus") && spec.Cpus == 0 {
		return nil, usagef("--cpus 0: want at least 1")
	}
	if cmd.Flags().Changed("entrypoint") {
		spec.SetEntrypoint = true
		if s.entrypoint != "" {
			spec.Entrypoint = []string{s.entrypoint}
		}
	}
	var faults []error
	provisioning, err := s.provision.provisioning(e, cmd)
	spec.Provisioning, faults = provisioning, append(faults, err)
	if spec.Env, err = e.allEnviron(s.envFiles, s.env); err != nil {
		faults = append(faults, err)
	}
	for _, p := range s.ports {
		mappings, err := network.ParsePort(p)
		if err != nil {
			faults = append(faults, usageError{err})
		}
		for _, m := range mappings {
			spec.Ports = append(spec.Ports, portMessage(m))
		}
	}
	faults = append(faults, s.guest.apply(cmd, spec)...)
	labels, labelFaults := s.guest.labels(s.labels)
	check, checkFaults := s.health.check(cmd)
	spec.Labels, spec.HealthCheck = labels, check
	faults = append(append(faults, labelFaults...), checkFaults...)
	if s.stopTimeout.set {
		spec.StopTimeout = durationpb.New(s.stopTimeout.d)
	}
	return spec, errors.Join(faults...)
}

func portMessage(m network.PortMapping) *atollv1.PortMapping {
	p := &atollv1.PortMapping{HostPort: uint32(m.HostPort), GuestPort: uint32(m.GuestPort), Protocol: m.Protocol}
	if m.HostAddress.IsValid() {
		p.HostAddress = m.HostAddress.String()
	}
	return p
}

// allEnviron reads the variables of files, then those of flags. It gathers every fault.
func (e *environment) allEnviron(files, vars []string) (env []string, err error) {
	var faults []error
	for _, file := range files {
		lines, err := kvfile.Parse(file, e.LookupEnv)
		if err != nil {
			faults = append(faults, fmt.Errorf("reading --env-file %s: %w", file, err))
		}
		env = append(env, lines...)
	}
	for _, v := range vars {
		if strings.HasPrefix(v, "=") || v == "" {
			faults = append(faults, usagef("--env %q: no name", v))
		}
	}
	return append(env, e.environ(vars)...), errors.Join(faults...)
}

// environ gives variables without = the value they have here. One that is not set here is left out, as by Docker.
func (e *environment) environ(vars []string) []string {
	var out []string
	for _, v := range vars {
		if strings.Contains(v, "=") {
			out = append(out, v)
		} else if value, ok := e.LookupEnv(v); ok {
			out = append(out, v+"="+value)
		}
	}
	return out
}

// pairs reads KEY=VALUE and KEY; the last of equal keys counts.
func pairs(list []string) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := map[string]string{}
	for _, kv := range list {
		k, v, _ := strings.Cut(kv, "=")
		m[k] = v
	}
	return m
}

// bytesValue is a flag for a size in binary units.
type bytesValue int64

func (b *bytesValue) String() string {
	if *b == 0 {
		return ""
	}
	return units.BytesSize(float64(*b))
}
func (*bytesValue) Type() string { return "size" }
func (b *bytesValue) Set(s string) error {
	n, err := units.RAMInBytes(s)
	if err == nil && n <= 0 {
		err = errors.New("want more than 0")
	}
	*b = bytesValue(n)
	return err
}

// seconds is a flag for a duration as Go writes it; a bare number is seconds, as with Docker.
type seconds struct {
	d   time.Duration
	set bool
}

func (s *seconds) String() string {
	if !s.set {
		return ""
	}
	return s.d.String()
}
func (*seconds) Type() string { return "duration" }
func (s *seconds) Set(text string) error {
	s.set = true
	n, err := strconv.Atoi(text)
	if s.d = time.Duration(n) * time.Second; err != nil {
		s.d, err = time.ParseDuration(text)
	}
	if err == nil && s.d < 0 {
		err = errors.New("want 0 or more")
	}
	return err
}
