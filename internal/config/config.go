// Package config is the one struct of settings, filled once: defaults, then the environment, then flags. The only room that knows
// the names of environment variables; it reads them through a function that it is handed. A leaf.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
)

// Config is what the command line and the daemon have in common.
type Config struct {
	Home         string // all state; absolute
	Host         string // the daemon's address
	HostChosen   bool   // Host was asked for; not this Home's own daemon, so none is started for it
	DockerConfig string // the directory of Docker's config.json with registry credentials
	NoColor      bool
}

// Flags are the settings that a command line can make; empty ones are not made.
type Flags struct {
	Host string
}

const (
	socketName = "atoll.sock"
	// maxHome leaves room for what the daemon puts below its home: the longest socket there is about 45 characters further down,
	// and sun_path ends at 107 (unix(7)).
	maxHome = 107 - 45
)

// Load fills a Config for the user uid from the environment that lookup knows, and flags.
func Load(lookup func(string) (string, bool), uid int, flags Flags) (Config, error) {
	get := func(key string) string {
		v, _ := lookup(key)
		return v
	}
	userHome := get("HOME")
	c := Config{DockerConfig: get("DOCKER_CONFIG"), NoColor: get("NO_COLOR") != ""}
	if c.DockerConfig == "" && userHome != "" {
		c.DockerConfig = filepath.Join(userHome, ".docker")
	}

	home, err := homeDir(get, uid, userHome)
	if err != nil {
		return Config{}, err
	}
	c.Home = home
	if len(c.Home) > maxHome {
		return Config{}, hint.With(
			fmt.Errorf("state directory %s: %d characters, at most %d leave room for the sockets below it: %w", c.Home, len(c.Home), maxHome, errdefs.ErrInvalidArgument),
			"set ATOLL_HOME to a shorter path")
	}

	own := "unix://" + c.Socket()
	c.Host = cmp.Or(flags.Host, get("ATOLL_HOST"), own)
	c.HostChosen = c.Host != own
	return c, nil
}

// Socket is where the daemon of this home listens.
func (c Config) Socket() string { return filepath.Join(c.Home, socketName) }

func homeDir(get func(string) string, uid int, userHome string) (string, error) {
	if h := get("ATOLL_HOME"); h != "" {
		abs, err := filepath.Abs(h)
		if err != nil {
			return "", fmt.Errorf("state directory %s: %w", h, err)
		}
		return abs, nil
	}
	if uid == 0 {
		return "/var/lib/atoll", nil
	}
	// A relative XDG_DATA_HOME is to be ignored (XDG Base Directory Specification).
	if data := get("XDG_DATA_HOME"); filepath.IsAbs(data) {
		return filepath.Join(data, "atoll"), nil
	}
	if userHome == "" {
		return "", hint.With(errors.New("finding the state directory: HOME is not set"), "set ATOLL_HOME to a directory of your own")
	}
	return filepath.Join(userHome, ".local/share/atoll"), nil
}
