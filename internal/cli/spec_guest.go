package cli

import (
	"fmt"
	"net"
	"strings"

	"github.com/docker/cli/pkg/kvfile"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// guestFlags are the flags of run and create about the guest beside its entrypoint: mounts, limits, names, the kernel's parameters.
type guestFlags struct {
	readOnly   bool
	tmpfs      []string
	shm        bytesValue
	ulimits    []string
	sysctls    []string
	addHosts   []string
	labelFiles []string
}

func (g *guestFlags) add(cmd *cobra.Command, spec *atollv1.MachineSpec) {
	f := cmd.Flags()
	f.BoolVar(&g.readOnly, "read-only", false, "make the root read-only; the image's VOLUMEs and --tmpfs stay writable")
	f.StringArrayVar(&g.tmpfs, "tmpfs", nil, "mount an empty file system in memory: `PATH[:OPTIONS]`, as /run:size=64m,exec\n(default rw,noexec,nosuid,nodev)")
	f.Var(&g.shm, "shm-size", "size of /dev/shm, such as 128M (default half the memory)")
	f.StringArrayVar(&g.ulimits, "ulimit", nil, "limit of the entrypoint and of exec: `NAME=SOFT[:HARD]`; -1 is unlimited")
	f.StringArrayVar(&g.sysctls, "sysctl", nil, "set a parameter of the guest's kernel: `KEY=VALUE`")
	f.StringArrayVar(&g.addHosts, "add-host", nil, "another line of /etc/hosts: `NAME:ADDRESS`; the address host-gateway is the host's")
	f.StringArrayVar(&spec.Dns, "dns", nil, "ask this DNS `SERVER` instead of the network's, which knows the other machines' names")
	f.StringArrayVar(&spec.DnsSearch, "dns-search", nil, "look names up in this `DOMAIN` too")
	f.StringArrayVar(&spec.DnsOptions, "dns-option", nil, "option of resolv.conf, such as ndots:2")
	f.BoolVarP(&spec.PublishAll, "publish-all", "P", false, "publish every port that the image exposes, each on a free port of 127.0.0.1")
	f.StringArrayVar(&spec.KernelArgs, "kernel-args", nil, "add `WORDS` to the kernel's command line; what Atoll sets itself is refused:\ninit, root, panic, reboot, mem, maxcpus, …")
	f.StringArrayVar(&g.labelFiles, "label-file", nil, "read labels from a `FILE` of KEY=VALUE lines; --label wins")
	complete(cmd, "ulimit", "core=", "cpu=", "data=", "fsize=", "locks=", "memlock=", "msgqueue=", "nice=", "nofile=", "nproc=", "rss=", "rtprio=", "rttime=",
		"sigpending=", "stack=")
	complete(cmd, "tmpfs", "/run", "/tmp")
}

// apply completes the spec and returns every fault.
func (g *guestFlags) apply(cmd *cobra.Command, spec *atollv1.MachineSpec) (faults []error) {
	if cmd.Flags().Changed("read-only") {
		spec.ReadOnly = &g.readOnly
	}
	for _, t := range g.tmpfs {
		path, options, _ := strings.Cut(t, ":")
		spec.Tmpfs = append(spec.Tmpfs, &atollv1.Tmpfs{Path: path, Options: options})
	}
	if g.shm > 0 {
		spec.Tmpfs = append(spec.Tmpfs, &atollv1.Tmpfs{Path: "/dev/shm", Options: fmt.Sprintf("size=%d", g.shm)})
	}
	for _, text := range g.ulimits {
		u, err := units.ParseUlimit(text)
		if err != nil {
			faults = append(faults, usagef("--ulimit %q: %w", text, err))
			continue
		}
		spec.Ulimits = append(spec.Ulimits, &atollv1.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	for _, text := range g.sysctls {
		if key, value, ok := strings.Cut(text, "="); !ok || key == "" || value == "" {
			faults = append(faults, usagef("--sysctl %q: write it as KEY=VALUE", text))
		}
	}
	spec.Sysctls = pairs(g.sysctls)
	for _, text := range g.addHosts {
		name, address, err := parseHost(text)
		if err == nil && address != "host-gateway" && net.ParseIP(address) == nil {
			err = usagef("--add-host %q: %q is neither an address nor host-gateway", text, address)
		}
		if err != nil {
			faults = append(faults, err)
			continue
		}
		spec.AddHosts = append(spec.AddHosts, &atollv1.HostEntry{Address: address, Names: []string{name}})
	}
	return faults
}

// labels are those of the files and then those of --label, of which the last of equal keys counts.
func (g *guestFlags) labels(given []string) (map[string]string, []error) {
	var all []string
	var faults []error
	for _, file := range g.labelFiles {
		lines, err := kvfile.Parse(file, nil)
		if err != nil {
			faults = append(faults, fmt.Errorf("reading --label-file %s: %w", file, err))
		}
		all = append(all, lines...)
	}
	return pairs(append(all, given...)), faults
}

// parseHost reads NAME:ADDRESS or NAME=ADDRESS; an IPv6 address may stand in brackets.
func parseHost(text string) (name, address string, err error) {
	name, address, ok := strings.Cut(text, "=")
	if !ok {
		name, address, ok = strings.Cut(text, ":")
	}
	if inner, bracketed := strings.CutPrefix(address, "["); bracketed && strings.HasSuffix(inner, "]") {
		address = strings.TrimSuffix(inner, "]")
	}
	if !ok || name == "" || address == "" {
		return "", "", usagef("--add-host %q: write it as NAME:ADDRESS", text)
	}
	return name, address, nil
}
