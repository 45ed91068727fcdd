package kernel

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// need is something of the kernel that is built in or a module.
type need struct {
	module, symbol string
	optional       bool
}

// wanted is what every guest needs of its kernel, in the order in which it is needed; what is a module is loaded by the agent.
var wanted = []need{
	{"virtio_mmio", "VIRTIO_MMIO", false},
	{"virtio_console", "VIRTIO_CONSOLE", false}, // the channel to the host first
	{"virtio_blk", "VIRTIO_BLK", false},
	{"virtio_net", "VIRTIO_NET", false},
	{"erofs", "EROFS_FS", false},
	{"overlay", "OVERLAY_FS", false},
	{"ext4", "EXT4_FS", false},
	{"virtio_rng", "HW_RANDOM_VIRTIO", true},
	{"vmw_vsock_virtio_transport", "VIRTIO_VSOCKETS", true},
}

// Features of a kernel that only some machines use. Their modules lie in the initramfs in a directory of the feature's name, and
// the agent loads those that its configuration names.
const (
	Verity   = "verity"   // dm-verity
	NineP    = "9p"       // 9p over virtio
	VirtioFS = "virtiofs" // virtio-fs
	Init     = "init"     // what an image's own init has use for
)

// onDemand is what the features need, as wanted. A kernel may lack any of them.
var onDemand = map[string][]need{
	// The faster hash comes first: dm-verity takes the best that is there when it is set up.
	Verity:   {{"sha256_ssse3", "CRYPTO_SHA256_SSSE3", true}, {"dm_mod", "BLK_DEV_DM", false}, {"dm_verity", "DM_VERITY", false}},
	NineP:    {{"9pnet", "NET_9P", false}, {"9pnet_virtio", "NET_9P_VIRTIO", false}, {"9p", "9P_FS", false}},
	VirtioFS: {{"fuse", "FUSE_FS", false}, {"virtiofs", "VIRTIO_FS", false}},
	// systemd's automount units; and the only one that it has always, of which it makes none where the file system is not known.
	Init: {{"autofs4", "AUTOFS_FS", true}, {"binfmt_misc", "BINFMT_MISC", true}},
}

// config is a kernel's .config: y, m or another value by symbol without CONFIG_.
type config map[string]string

func parseConfig(r io.Reader) (config, error) {
	c := config{}
	s := bufio.NewScanner(r)
	for s.Scan() {
		if line, ok := strings.CutPrefix(s.Text(), "CONFIG_"); ok {
			if symbol, value, ok := strings.Cut(line, "="); ok {
				c[symbol] = value
			}
		}
	}
	return c, s.Err()
}

// builtIn returns the features that a kernel without modules has.
func builtIn(text []byte) (map[string][]string, error) {
	c, err := parseConfig(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's configuration: %w", err)
	}
	return features(c, nil, nil)
}

// features returns the features that a kernel has, each with the modules to load for it, beside those in always. What is a module
// that is not among the files is not there.
func features(c config, files map[string]string, always []string) (map[string][]string, error) {
	found := map[string][]string{}
	for name, needs := range onDemand {
		order, err := loadOrder(c, files, needs)
		if errdefs.IsFailedPrecondition(err) || files == nil && errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("feature %s: %w", name, err)
		}
		found[name] = slices.DeleteFunc(order, func(m string) bool { return slices.Contains(always, m) })
	}
	return found, nil
}

// loadOrder returns the modules of a kernel for these needs, each after those it depends on. files are the paths of all its
// modules by name. errdefs.ErrFailedPrecondition: the kernel has something needed neither built in nor as a module.
func loadOrder(c config, files map[string]string, needs []need) ([]string, error) {
	var order []string
	state := map[string]bool{} // false: being added, true: added
	var add func(name string) error
	add = func(name string) error {
		if done, seen := state[name]; seen {
			if !done {
				return fmt.Errorf("module %s depends on itself: %w", name, errdefs.ErrInvalidArgument)
			}
			return nil
		}
		state[name] = false
		path, ok := files[name]
		if !ok {
			return fmt.Errorf("module %s is not in the package: %w", name, errdefs.ErrNotFound)
		}
		hard, soft, err := dependencies(path)
		if err != nil {
			return err
		}
		for _, dep := range soft {
			if _, ok := files[dep]; ok { // else it is built in, or an alias of something that is
				hard = append(hard, dep)
			}
		}
		for _, dep := range hard {
			if err := add(dep); err != nil {
				return fmt.Errorf("for module %s: %w", name, err)
			}
		}
		state[name] = true
		order = append(order, name)
		return nil
	}
	for _, n := range needs {
		if value := c[n.symbol]; value != "y" && value != "m" && !(value == "" && n.optional) {
			return nil, fmt.Errorf("the kernel has no CONFIG_%s, which guests need: %w", n.symbol, errdefs.ErrFailedPrecondition)
		}
	}
	for _, n := range needs {
		if c[n.symbol] == "m" {
			if err := add(n.module); err != nil {
				return nil, err
			}
		}
	}
	return order, nil
}

// unsigned cuts the signature that a module may have at its end (scripts/sign-file.c: the signature, 12 bytes whose last four are
// its length, a mark). The package's hash was checked here; checking each module once more in the guest, in software and
// under TCG, took a third of the time of loading them all (0.21 against 0.34 s, minima of 7).
func unsigned(module []byte) []byte {
	body, ok := bytes.CutSuffix(module, []byte("~Module signature appended~\n"))
	if !ok || len(body) < 12 {
		return module
	}
	rest := len(body) - 12 - int(binary.BigEndian.Uint32(body[len(body)-4:]))
	if rest < 0 {
		return module
	}
	return body[:rest]
}

// moduleName turns a file name into the name by which other modules ask for it.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return underscored(name)
}

// modinfo is what a module says of itself.
type modinfo struct {
	hard, soft []string // modules to load before it: it cannot do without, or works better with
	aliases    []string
}

// dependencies returns what to load before a module.
func dependencies(path string) (hard, soft []string, err error) {
	info, err := readModinfo(path)
	return info.hard, info.soft, err
}

// readModinfo asks the module. Debian's packages have no modules.dep: depmod makes it at installation.
func readModinfo(path string) (info modinfo, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return info, fmt.Errorf("reading module %s: %w", path, err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return info, fmt.Errorf("reading module %s: it has no .modinfo: %w", path, errdefs.ErrInvalidArgument)
	}
	data, err := section.Data()
	if err != nil {
		return info, fmt.Errorf("reading module %s: %w", path, err)
	}
	for field := range strings.SplitSeq(string(data), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			info.hard = append(info.hard, strings.Split(underscored(list), ",")...)
		}
		if list, ok := strings.CutPrefix(field, "softdep=pre:"); ok {
			pre, _, _ := strings.Cut(list, "post:")
			info.soft = append(info.soft, strings.Fields(underscored(pre))...)
		}
		if alias, ok := strings.CutPrefix(field, "alias="); ok {
			info.aliases = append(info.aliases, alias)
		}
	}
	return info, nil
}
