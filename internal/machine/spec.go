package machine

import (
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
)

// Defaults and bounds of a spec.
const (
	DefaultMemory      = 512 << 20
	MinMemory          = 96 << 20 // less and Debian's kernel cannot unpack its initramfs
	DefaultDisk        = 10 << 30
	MinDisk            = 16 << 20
	MaxDisk            = 15 << 40
	DefaultStopTimeout = 10 * time.Second
	DefaultNetwork     = "default"
	NoNetwork          = "none"
)

var (
	nameForm     = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)
	hostnameForm = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,62}[a-zA-Z0-9])?$`)
	idForm       = regexp.MustCompile(`^[0-9a-f]{12,32}$`)
)

// withDefaults returns the spec with everything filled in that the user left open but the name.
func (s Spec) withDefaults() Spec {
	if s.CPUs == 0 {
		s.CPUs = 1
	}
	if s.MemoryBytes == 0 {
		s.MemoryBytes = DefaultMemory
	}
	if s.DiskBytes == 0 {
		s.DiskBytes = DefaultDisk
	}
	if s.Network == "" {
		s.Network = DefaultNetwork
	}
	if s.VMM == "" {
		s.VMM = "auto"
	}
	if s.StopTimeout == 0 {
		s.StopTimeout = DefaultStopTimeout
	}
	if s.Disk != "" && s.Firmware == "" && s.Kernel == "" {
		s.Firmware = defaultFirmware()
	}
	if s.Init == "" {
		s.Init = InitAuto
	}
	if s.LogMaxBytes == 0 {
		s.LogMaxBytes = DefaultLogMaxBytes
	}
	if s.LogMaxFiles == 0 {
		s.LogMaxFiles = DefaultLogMaxFiles
	}
	if s.Hostname == "" {
		s.Hostname = defaultHostname(s.Name)
	}
	return s
}

func defaultHostname(name string) string {
	name = strings.Trim(strings.ReplaceAll(name, "_", "-"), ".-")
	return strings.Join(slices.DeleteFunc(strings.Split(name, "."), func(label string) bool { return label == "" }), ".")
}

// validate gathers every fault of a spec with its defaults.
func (s Spec) validate() error {
	var faults []error
	fault := func(help, format string, args ...any) {
		faults = append(faults, hint.With(fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...), "%s", help))
	}
	if !nameForm.MatchString(s.Name) {
		fault("a name starts with a letter or digit, goes on with letters, digits, '_', '.', '-', and has at most 63 characters", "machine name %q", shorten(s.Name))
	} else if idForm.MatchString(s.Name) {
		fault("choose a name with a letter after f or fewer than 12 characters", "machine name %q looks like a machine ID", s.Name)
	} else if !hostnameForm.MatchString(s.Hostname) || strings.Contains(s.Hostname, "..") {
		fault("a hostname has letters, digits, '-' and '.', at most 64", "hostname %q", shorten(s.Hostname))
	}
	if s.Disk != "" {
		s.checkDisk(fault)
	} else if s.Firmware != "" {
		fault("give a --disk, or leave out --firmware", "firmware is only for disk images")
	} else if s.Image == "" {
		fault("name the image to run: atoll run IMAGE", "no image")
	}
	if s.CPUs < 1 || s.CPUs > 4*runtime.NumCPU() {
		fault(fmt.Sprintf("this host has %d CPUs; up to %d can be given", runtime.NumCPU(), 4*runtime.NumCPU()), "%d CPUs", s.CPUs)
	}
	if s.MemoryBytes < MinMemory {
		fault(fmt.Sprintf("give at least %s, such as --memory 256M", units.BytesSize(MinMemory)), "memory of %s is too small to boot a kernel", units.BytesSize(float64(s.MemoryBytes)))
	}
	if total := hostMemory(); s.MemoryBytes > total {
		fault("give less --memory", "memory of %s is more than the host's %s", units.BytesSize(float64(s.MemoryBytes)), units.BytesSize(float64(total)))
	}
	if s.DiskBytes > MaxDisk {
		fault("give less --disk-size", "disk size of %s is more than a file system can have (%s)", units.BytesSize(float64(s.DiskBytes)), units.BytesSize(MaxDisk))
	}
	if s.StopSignal != "" && !isSignal(s.StopSignal) {
		fault("use a name such as SIGTERM or a number from 1 to 64", "stop signal %q", shorten(s.StopSignal))
	}
	for k := range s.Labels {
		if k == "" {
			fault("write KEY=value", "a label without a key")
		}
	}
	if s.DiskBytes < MinDisk {
		fault("give at least 16M, such as --disk-size 1G", "disk size of %s is too small for a file system", units.BytesSize(float64(s.DiskBytes)))
	}
	for _, e := range s.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" || strings.ContainsRune(e, 0) {
			fault("write KEY=value", "environment entry %q", shorten(e))
		}
	}
	if s.WorkingDir != "" && !strings.HasPrefix(s.WorkingDir, "/") {
		fault("give an absolute path", "working directory %q", s.WorkingDir)
	}
	if s.VMM != "auto" && s.VMM != "qemu" {
		fault("use auto or qemu", "VMM %q", s.VMM)
	}
	if s.Init != InitAuto && s.Init != InitAgent && s.Init != InitImage {
		fault("use auto, agent or image", "init %q", shorten(s.Init))
	}
	if s.LogMaxBytes < MinLogMaxBytes {
		fault(fmt.Sprintf("give at least %s, such as --log-opt max-size=10m", units.BytesSize(MinLogMaxBytes)), "log files of at most %s", units.BytesSize(float64(s.LogMaxBytes)))
	}
	if s.LogMaxFiles < 1 || s.LogMaxFiles > MaxLogMaxFiles {
		fault(fmt.Sprintf("give 1 to %d, such as --log-opt max-file=3", MaxLogMaxFiles), "%d log files", s.LogMaxFiles)
	}
	if s.Network == NoNetwork && len(s.Ports) > 0 {
		fault("leave out --network none or -p", "ports cannot be published without a network")
	}
	if s.Metadata.Disabled && s.Metadata.V1 {
		fault("use --metadata off or --metadata v1", "the metadata service is to be off and to answer without a token")
	}
	if s.StopTimeout < 0 {
		fault("give a time from 0 on", "stop timeout %s", s.StopTimeout)
	}
	s.validateGuest(fault)
	for i, p := range s.Ports {
		for _, q := range s.Ports[:i] {
			if p.HostPort != 0 && p.HostPort == q.HostPort && p.Protocol == q.Protocol && p.HostAddress == q.HostAddress {
				fault("publish each host port once", "host port %d/%s is asked for twice", p.HostPort, p.Protocol)
			}
		}
	}
	return errors.Join(faults...)
}

// CheckPart gathers the faults of a spec that others will be joined with: of a profile.
func (s Spec) CheckPart() error {
	s.Name, s.Image = "part", "part"
	faults := kernelArgsFaults(s.KernelArgs, true) // what is for disk images only may be meant for one
	s.KernelArgs, s.Firmware = nil, ""
	_, err := checkRequest(s.Provisioning)
	for i, f := range faults {
		faults[i] = fmt.Errorf("%w: %w", f, errdefs.ErrInvalidArgument)
	}
	return errors.Join(append(faults, s.withDefaults().validate(), err)...)
}

func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// argv is the entrypoint's words by Docker's rules: the command replaces CMD, an entrypoint replaces ENTRYPOINT and drops CMD.
func argv(s Spec, img Image) ([]string, error) {
	entrypoint, cmd := img.Entrypoint, img.Cmd
	if s.SetEntrypoint {
		entrypoint, cmd = s.Entrypoint, nil
	}
	if len(s.Command) > 0 {
		cmd = s.Command
	}
	words := initArgv(s, append(append([]string{}, entrypoint...), cmd...))
	if len(words) == 0 && s.SetEntrypoint {
		err := fmt.Errorf("with its ENTRYPOINT cleared, image %s has nothing to run (--entrypoint drops CMD too): %w", s.Image, errdefs.ErrInvalidArgument)
		return nil, hint.With(err, "say what to run: atoll run --entrypoint '' %s COMMAND", s.Image)
	}
	if len(words) == 0 {
		err := fmt.Errorf("image %s has neither ENTRYPOINT nor CMD, and no command was given: %w", s.Image, errdefs.ErrInvalidArgument)
		return nil, hint.With(err, "say what to run: atoll run %s COMMAND", s.Image)
	}
	return words, nil
}

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is the image's, the machine's and the user's, later ones winning by key, as Docker orders them.
func environment(tty bool, hostname string, layers ...[]string) []string {
	env := []string{defaultPath, "HOSTNAME=" + hostname}
	if tty {
		env = append(env, "TERM=xterm")
	}
	at := map[string]int{}
	for i, e := range env {
		k, _, _ := strings.Cut(e, "=")
		at[k] = i
	}
	for _, layer := range layers {
		for _, e := range layer {
			k, _, _ := strings.Cut(e, "=")
			if i, ok := at[k]; ok {
				env[i] = e
				continue
			}
			at[k] = len(env)
			env = append(env, e)
		}
	}
	return env
}

// Argv is the entrypoint as it is, or will be, run.
func (m *Machine) Argv() []string {
	words, _ := argv(m.Spec, m.Image) // checked at create
	return words
}
