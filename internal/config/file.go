package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"

	"github.com/atollvm/atoll/internal/hint"
)

// FileName is the daemon's settings file, in its home. It is optional.
const FileName = "config.toml"

// Settings is what the settings file can say. The zero value is the default of everything.
type Settings struct {
	Registries map[string]Registry `toml:"registry"` // by host[:port], as docker.io
	Proxy      Proxy               `toml:"proxy"`
	TLS        TLS                 `toml:"tls"`
	Build      Build               `toml:"build"`
	Machine    Machine             `toml:"machine"` // what holds for machines that say nothing else
}

// Registry is how one registry is reached.
type Registry struct {
	Mirrors  []string `toml:"mirrors"`  // base URLs, tried in this order before the registry itself; for pulls only
	Insecure bool     `toml:"insecure"` // plain HTTP, or TLS whose certificate nobody checks
	CA       string   `toml:"ca"`       // PEM file with the registry's own certificate authority
}

// Proxy is handed to builds and guests; Atoll's own requests use it too. Empty fields come from the daemon's environment.
type Proxy struct {
	HTTP  string `toml:"http"`
	HTTPS string `toml:"https"`
	No    string `toml:"no"` // comma-separated, as NO_PROXY
}

// OrEnvironment fills empty fields from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, in either spelling; the lower one wins, as curl has it.
func (p Proxy) OrEnvironment(lookup func(string) (string, bool)) Proxy {
	for name, field := range map[string]*string{"http_proxy": &p.HTTP, "https_proxy": &p.HTTPS, "no_proxy": &p.No} {
		for _, spelling := range []string{name, strings.ToUpper(name)} {
			if value, ok := lookup(spelling); ok && *field == "" {
				*field = value
			}
		}
	}
	return p
}

// TLS names more certificate authorities.
type TLS struct {
	CA []string `toml:"ca"` // PEM files, trusted beside the system's: by Atoll, in RUN steps and in guests
}

// Build bounds the builder.
type Build struct {
	CacheSize Bytes    `toml:"cacheSize"` // as "10G"; 0: the builder's default
	Timeout   Duration `toml:"timeout"`   // of one whole build, as "2h"; 0: none
	Isolation string   `toml:"isolation"` // where RUN steps run: host (the default) or vm
	VMCPUs    int      `toml:"vmCPUs"`    // of a build's VM; 0: as many as the host has
	VMMemory  Bytes    `toml:"vmMemory"`  // of a build's VM, as "4G"; 0: a quarter of the host's, 2G at most
}

// Machine is what machines get that say nothing else, neither themselves nor by a profile.
type Machine struct {
	CPUs     int      `toml:"cpus"`
	Memory   Bytes    `toml:"memory"`
	DiskSize Bytes    `toml:"diskSize"`
	Kernel   string   `toml:"kernel"`
	Network  string   `toml:"network"`
	Profiles []string `toml:"profiles"` // for machines that name none
	// ProvisionTimeout is how long a command or the package manager may write nothing before a machine's start fails; 0: 10m.
	ProvisionTimeout Duration `toml:"provisionTimeout"`
}

// minVMMemory is what a build's VM boots with and has something left for a step.
const minVMMemory = 256 << 20

// Bytes is a size in bytes, written as 512M or 2G (binary units).
type Bytes int64

// UnmarshalText reads 512M.
func (b *Bytes) UnmarshalText(text []byte) error {
	n, err := units.RAMInBytes(string(text))
	if err != nil || n < 0 {
		return fmt.Errorf("size %q: write it as 512M or 2G", text)
	}
	*b = Bytes(n)
	return nil
}

// Duration is written as Go writes it.
type Duration time.Duration

// UnmarshalText reads 1h30m.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v < 0 {
		return fmt.Errorf("duration %q: write it as 90s or 2h", text)
	}
	*d = Duration(v)
	return nil
}

// LoadSettings reads the settings file of a home. A missing file is the default; an unknown key or a wrong value is an error with its line.
func LoadSettings(home string) (Settings, error) {
	path := filepath.Join(home, FileName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Settings{}, nil
	}
	if err != nil {
		return Settings{}, fmt.Errorf("reading the settings: %w", err)
	}
	s, err := parseSettings(data)
	if err != nil {
		return Settings{}, hint.With(fmt.Errorf("reading the settings %s: %w: %w", path, err, errdefs.ErrInvalidArgument), "mend that line, or move the file away")
	}
	return s, nil
}

func parseSettings(data []byte) (Settings, error) {
	var s Settings
	d := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	err := d.Decode(&s)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var faults []error
		for _, e := range unknown.Errors {
			row, _ := e.Position()
			faults = append(faults, fmt.Errorf("line %d: unknown key %s", row, strings.Join(e.Key(), ".")))
		}
		return s, errors.Join(faults...)
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		row, _ := wrong.Position()
		return s, fmt.Errorf("line %d: %w", row, wrong)
	}
	if err != nil {
		return s, err
	}
	return s, s.check()
}

// check gathers every fault.
func (s Settings) check() error {
	var faults []error
	for name, r := range s.Registries {
		for _, m := range r.Mirrors {
			if u, err := url.Parse(m); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
				faults = append(faults, fmt.Errorf("registry %q: mirror %q: it is no http or https URL", name, m))
			} else if u.User != nil { // it would be seen in process lists
				faults = append(faults, fmt.Errorf("registry %q: mirror %s: no name and password in the URL: use atoll login", name, u.Redacted()))
			}
		}
		if r.CA != "" && !filepath.IsAbs(r.CA) {
			faults = append(faults, fmt.Errorf("registry %q: ca %q: give an absolute path", name, r.CA))
		}
	}
	if i := s.Build.Isolation; i != "" && i != "host" && i != "vm" {
		faults = append(faults, fmt.Errorf("build: isolation %q: give host or vm", i))
	}
	if s.Machine.CPUs < 0 {
		faults = append(faults, fmt.Errorf("machine: cpus %d: give 1 or more", s.Machine.CPUs))
	}
	if s.Machine.ProvisionTimeout < 0 {
		faults = append(faults, fmt.Errorf("machine: provisionTimeout %s: give more than 0", time.Duration(s.Machine.ProvisionTimeout)))
	}
	if s.Build.VMCPUs < 0 {
		faults = append(faults, fmt.Errorf("build: vmCPUs %d: give 1 or more", s.Build.VMCPUs))
	}
	if m := s.Build.VMMemory; m != 0 && m < minVMMemory {
		faults = append(faults, fmt.Errorf("build: vmMemory of %s: give at least %s", units.BytesSize(float64(m)), units.BytesSize(minVMMemory)))
	}
	for _, path := range s.TLS.CA {
		if !filepath.IsAbs(path) {
			faults = append(faults, fmt.Errorf("tls: ca %q: give an absolute path", path))
		}
	}
	for key, value := range map[string]string{"http": s.Proxy.HTTP, "https": s.Proxy.HTTPS} {
		if u, err := url.Parse(value); value != "" && (err != nil || u.Host == "") {
			faults = append(faults, fmt.Errorf("proxy: %s %q: it is no URL", key, value))
		}
	}
	return errors.Join(faults...)
}
