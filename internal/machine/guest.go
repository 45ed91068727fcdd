package machine

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
	"github.com/atollvm/atoll/internal/provision"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/moby/sys/mount"
)

// What of a spec and an image becomes the guest's: mounts, limits, names, the kernel's parameters and arguments.

const (
	tmpfsDefaults = "noexec,nosuid,nodev" // Docker's
	// maxKernelArgs leaves room in the 2048 bytes that an x86 kernel reads of its command line for Atoll's part and the kernel's own.
	maxKernelArgs = 1200
)

var (
	sysctlForm = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_.:@*/-]+)+$`)
	domainForm = regexp.MustCompile(`^([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?\.?)+$`)
	optionForm = regexp.MustCompile(`^[a-zA-Z0-9_:.-]+$`)
)

// tmpfsValues are the forms of tmpfs(5)'s values.
var tmpfsValues = map[string]*regexp.Regexp{
	"size":      regexp.MustCompile(`^[0-9]+[kKmMgGtTpPeE%]?$`),
	"nr_blocks": regexp.MustCompile(`^[0-9]+[kKmMgGtTpPeE]?$`),
	"nr_inodes": regexp.MustCompile(`^[0-9]+[kKmMgGtTpPeE]?$`),
	"mode":      regexp.MustCompile(`^[0-7]{1,5}$`),
	"uid":       regexp.MustCompile(`^[0-9]{1,10}$`),
	"gid":       regexp.MustCompile(`^[0-9]{1,10}$`),
}

// validateGuest gathers the faults of what the guest is to be.
func (s Spec) validateGuest(fault func(help, format string, args ...any)) {
	for i, t := range s.Tmpfs {
		if !path.IsAbs(t.Path) || path.Clean(t.Path) == "/" || strings.ContainsAny(t.Path, "\x00\n") {
			fault("give an absolute path, not the root", "tmpfs %q", shorten(t.Path))
		}
		if provision.OfKernel(t.Path) {
			fault("choose another place", "tmpfs %s: it is the kernel's, and the guest cannot do without", shorten(t.Path))
		}
		if _, err := tmpfsOptions(t.Options); err != nil {
			fault("such as size=64m,mode=1777,exec; the options are those of docker run --tmpfs", "tmpfs %s: %s", shorten(t.Path), err)
		}
		if slices.ContainsFunc(s.Tmpfs[:i], func(u Tmpfs) bool { return path.Clean(u.Path) == path.Clean(t.Path) }) {
			fault("ask for each once; --shm-size asks for /dev/shm", "tmpfs %s is asked for twice", shorten(t.Path))
		}
	}
	for i, u := range s.Ulimits {
		if err := checkUlimit(u); err != nil {
			fault("such as nofile=1024:4096; -1 is unlimited", "ulimit %s", shorten(err.Error()))
		}
		if slices.ContainsFunc(s.Ulimits[:i], func(v Ulimit) bool { return v.Name == u.Name }) {
			fault("ask for each once", "ulimit %s is asked for twice", u.Name)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.Sysctls)) {
		if !sysctlForm.MatchString(k) || strings.Contains(k, "..") {
			fault("such as net.ipv4.ip_forward=1", "sysctl %q", shorten(k))
		}
		if v := s.Sysctls[k]; v == "" || strings.ContainsAny(v, "\x00\n") {
			fault("such as net.ipv4.ip_forward=1", "sysctl %s: value %q", shorten(k), shorten(v))
		}
	}
	s.validateNames(fault)
	if s.Network == NoNetwork && s.PublishAll {
		fault("leave out --network none or -P", "ports cannot be published without a network")
	}
	for _, err := range s.Health.Faults() {
		fault("docs/machines.md describes health checks", "%s", err)
	}
	for _, err := range kernelArgsFaults(s.KernelArgs, s.Disk != "") {
		fault("atoll run --help says what Atoll sets itself", "%s", err)
	}
}

func (s Spec) validateNames(fault func(help, format string, args ...any)) {
	for _, h := range s.AddHosts {
		if len(h.Names) == 0 {
			fault("such as db:10.0.0.5", "host entry for %q without a name", shorten(h.Address))
		}
		for _, n := range h.Names {
			if !domainForm.MatchString(n) {
				fault("such as db:10.0.0.5", "host entry for the name %q", shorten(n))
			}
		}
		if h.Address == HostGateway {
			if s.Network == NoNetwork {
				fault("give an address, or a network", "%s of a machine without a network", HostGateway)
			}
		} else if !isAddress(h.Address) {
			fault("give an IP address, or "+HostGateway, "host entry %s: address %q", shorten(strings.Join(h.Names, " ")), shorten(h.Address))
		}
	}
	for _, d := range s.DNS {
		if !isAddress(d) {
			fault("give an IP address", "DNS server %q", shorten(d))
		}
	}
	for _, d := range s.DNSSearch {
		if d != "." && !domainForm.MatchString(d) {
			fault("give a domain such as example.org", "DNS search domain %q", shorten(d))
		}
	}
	for _, o := range s.DNSOptions {
		if !optionForm.MatchString(o) {
			fault("give one option of resolv.conf(5), such as ndots:2", "DNS option %q", shorten(o))
		}
	}
}

func isAddress(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// tmpfsOptions are Docker's defaults with the options given over them.
func tmpfsOptions(options string) (string, error) {
	all := strings.Split(tmpfsDefaults, ",")
	if options != "" {
		for o := range strings.SplitSeq(options, ",") {
			switch o {
			case "bind", "rbind", "remount", "mand", "nomand", "shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable", "runbindable":
				return "", fmt.Errorf("option %q has no use in a machine", o)
			}
			if key, value, ok := strings.Cut(o, "="); ok && tmpfsValues[key] != nil && !tmpfsValues[key].MatchString(value) {
				return "", fmt.Errorf("option %s=%q is none that the kernel takes", key, shorten(value))
			}
			all = append(all, o)
		}
	}
	merged, err := mount.MergeTmpfsOptions(all)
	return strings.Join(merged, ","), err
}

func tmpfsConfig(list []Tmpfs) (out []*agentv1.Tmpfs) {
	for _, t := range list {
		options, _ := tmpfsOptions(t.Options) // checked at create
		out = append(out, &agentv1.Tmpfs{Path: path.Clean(t.Path), Options: options})
	}
	return out
}

// volumes are the image's, as paths below the root, the outer before the inner.
func volumes(img Image) (out []string) {
	for _, v := range img.Volumes {
		if v = path.Join("/", v); v != "/" && !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	slices.Sort(out)
	return out
}

// checkUlimit goes by Docker's own rules.
func checkUlimit(u Ulimit) error {
	text := fmt.Sprintf("%s=%d:%d", u.Name, u.Soft, u.Hard)
	if _, err := units.ParseUlimit(text); err != nil {
		return fmt.Errorf("%s: %w", text, err)
	}
	if u.Soft < -1 || u.Hard < -1 {
		return fmt.Errorf("%s: less than -1", text)
	}
	return nil
}

func rlimits(list []Ulimit) (out []*agentv1.Rlimit) {
	for _, u := range list {
		out = append(out, &agentv1.Rlimit{Name: u.Name, Soft: rlimit(u.Soft), Hard: rlimit(u.Hard)})
	}
	return out
}

func rlimit(n int64) uint64 {
	if n < 0 {
		return math.MaxUint64
	}
	return uint64(n)
}

// addNames adds what the machine knows names by, beside its network.
func (s *starting) addNames(c *agentv1.Config) error {
	sp := s.m.Spec
	if len(sp.DNS) > 0 {
		c.DnsServers = sp.DNS
	}
	c.DnsSearch = slices.DeleteFunc(slices.Clone(sp.DNSSearch), func(d string) bool { return d == "." })
	c.DnsOptions = sp.DNSOptions
	for _, h := range sp.AddHosts {
		address := h.Address
		if address == HostGateway {
			a, err := network.HostAddress()
			if err != nil {
				return fmt.Errorf("%s for %s: %w", HostGateway, strings.Join(h.Names, ", "), err)
			}
			address = a.String()
		}
		c.Hosts = append(c.Hosts, &agentv1.HostEntry{Address: address, Names: h.Names})
	}
	return nil
}

// ownKernelArgs are what a machine would not boot without, or not as Atoll knows it, and why.
var ownKernelArgs = map[string]string{
	"init":               "Atoll's agent is the first process; --init image and --entrypoint choose what it runs",
	"rdinit":             "Atoll's agent is the first process; --init image and --entrypoint choose what it runs",
	"root":               "the image is the root",
	"rootfstype":         "the image is the root",
	"rootflags":          "the image is the root",
	"initrd":             "the agent comes in the initramfs",
	"noinitrd":           "the agent comes in the initramfs",
	"panic":              "a panic must end the VMM, which is how Atoll notices it",
	"reboot":             "it says how the VMM is ended",
	"mem":                "--memory says how much there is",
	"nosmp":              "--cpus says how many there are",
	"maxcpus":            "--cpus says how many there are",
	"nr_cpus":            "--cpus says how many there are",
	"acpi":               "the VMM decides that",
	"virtio_mmio.device": "the VMM names its devices so",
	"tsc_early_khz":      "the VMM knows the clock",
	"nolapic":            "the VMM decides that",
	"noapic":             "the VMM decides that",
	"--":                 "what follows it is for the first process, which is Atoll's agent",
}

// ofDisk says whether an argument is about the root of a disk image, which the kernel has to be told.
func ofDisk(arg string) bool {
	return slices.Contains([]string{"init", "root", "rootfstype", "rootflags", "--"}, arg)
}

func kernelArgsFaults(args []string, disk bool) (faults []error) {
	total := 0
	for _, a := range args {
		total += len(a) + 1
		if strings.ContainsFunc(a, func(c rune) bool { return c < ' ' || c > '~' }) {
			faults = append(faults, fmt.Errorf("kernel argument %q: it may have printable ASCII only", shorten(a)))
			continue
		}
		if strings.Count(a, `"`)%2 != 0 {
			faults = append(faults, fmt.Errorf("kernel argument %s: a quote is open", shorten(strconv.Quote(a))))
		}
		for _, word := range strings.Fields(a) {
			name, _, _ := strings.Cut(word, "=") // the kernel takes - for _ in it
			if why, own := ownKernelArgs[strings.ReplaceAll(name, "virtio-mmio", "virtio_mmio")]; own && !(disk && ofDisk(name)) {
				faults = append(faults, fmt.Errorf("kernel argument %q would break the machine: %s", shorten(word), why))
			}
		}
	}
	if total > maxKernelArgs {
		faults = append(faults, fmt.Errorf("kernel arguments of %d bytes: there is room for %d on the kernel's command line", total, maxKernelArgs))
	}
	return faults
}

// checkRequest gathers the faults of a request for a machine that has an image.
func checkRequest(r provision.Request) (warnings []string, err error) {
	warnings, err = r.Check()
	faults := kernelArgsFaults(r.KernelArgs(), false)
	for i, f := range faults {
		faults[i] = fmt.Errorf("ignition: %w: %w", f, errdefs.ErrInvalidArgument)
	}
	return warnings, errors.Join(append(faults, err)...)
}

// ports are those to publish: the ones asked for and, where that is asked for, the others that the image exposes, on host ports that
// the network chooses.
func (m *Machine) ports() []network.PortMapping {
	if !m.Spec.PublishAll {
		return m.Spec.Ports
	}
	ports := slices.Clone(m.Spec.Ports)
	exposed, _ := exposedPorts(m.Image.ExposedPorts) // checked at create
	for _, p := range exposed {
		if !slices.ContainsFunc(m.Spec.Ports, func(q network.PortMapping) bool { return q.GuestPort == p.GuestPort && q.Protocol == p.Protocol }) {
			ports = append(ports, p)
		}
	}
	return ports
}

func exposedPorts(list []string) (ports []network.PortMapping, err error) {
	for _, e := range list {
		mappings, err := network.ParsePort(e)
		if err != nil {
			return nil, err
		}
		ports = append(ports, mappings...)
	}
	return ports, nil
}

// checkExposed refuses to publish what cannot be.
func checkExposed(s Spec, img Image) error {
	if !s.PublishAll {
		return nil
	}
	if _, err := exposedPorts(img.ExposedPorts); err != nil {
		return hint.With(fmt.Errorf("publishing the ports that image %s exposes: %w", s.Image, err), "publish those that you need: -p 8080:80")
	}
	return nil
}

// withImageLabels: the machine's own win.
func withImageLabels(own, image map[string]string) map[string]string {
	if len(image) == 0 {
		return own
	}
	all := maps.Clone(image)
	maps.Copy(all, own)
	return all
}
