package cli

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

// maxSecret is more than the builder takes: enough to not read a whole disk.
const maxSecret = 1 << 20

func (c *buildCall) readContext(path string) error {
	if path == "-" && c.file == "-" {
		return usagef("the context and the Dockerfile cannot both come from standard input")
	}
	if _, terminal := ui.Terminal(c.env.Stdin); terminal && (path == "-" || c.file == "-") {
		return errNoStdin("atoll build")
	}
	var err error
	switch {
	case path == "-":
		c.start.ContextStream, c.stdin = true, true
	case isRemote(path):
		c.start.ContextUrl = path
	default:
		if c.start.ContextDir, err = contextDir(path); err != nil {
			return err
		}
	}
	switch {
	case c.file == "":
	case c.file == "-":
		c.start.DockerfileText, err = io.ReadAll(c.env.Stdin)
		if err != nil {
			return fmt.Errorf("reading the Dockerfile from standard input: %w", err)
		}
		if len(c.start.DockerfileText) == 0 {
			return hint.With(fmt.Errorf("the Dockerfile on standard input is empty: %w", errdefs.ErrInvalidArgument), "send it with a pipe or <FILE")
		}
	case c.start.ContextDir != "":
		// It is relative to where the command runs, not to the context.
		if info, statErr := os.Stat(c.file); statErr == nil && !info.IsDir() && !info.Mode().IsRegular() {
			c.start.DockerfileText, err = os.ReadFile(c.file) // a pipe, which only this process has
			if err != nil {
				return fmt.Errorf("reading the Dockerfile: %w", err)
			}
			break
		}
		if c.start.Dockerfile, err = filepath.Abs(c.file); err != nil {
			return fmt.Errorf("finding Dockerfile %q: %w", c.file, err)
		}
	default:
		c.start.Dockerfile = c.file // in the context
	}
	return nil
}

func contextDir(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("build context %q: %w", path, err)
	}
	info, err := os.Stat(abs)
	switch {
	case os.IsNotExist(err):
		return "", hint.With(fmt.Errorf("build context %q: no such directory: %w", path, errdefs.ErrNotFound), "the last argument is the directory to build from, often .")
	case err != nil:
		return "", fmt.Errorf("build context %q: %w", path, err)
	case !info.IsDir():
		return "", hint.With(fmt.Errorf("build context %q: not a directory: %w", path, errdefs.ErrInvalidArgument),
			"name the Dockerfile with -f and its directory as the last argument; send an archive by: atoll build - <%s", path)
	}
	return abs, nil
}

// scp is the short form of git over SSH.
var scp = regexp.MustCompile(`^[\w.-]+@[\w.-]+:`)

// isRemote tells the URL of a context from a path. What is here as a file is a path.
func isRemote(path string) bool {
	for _, scheme := range []string{"http://", "https://", "git://", "ssh://"} {
		if strings.HasPrefix(path, scheme) {
			return true
		}
	}
	if !scp.MatchString(path) && !strings.HasPrefix(path, "github.com/") {
		return false
	}
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

func (c *buildCall) readContexts() error {
	for _, given := range c.contexts {
		name, value, ok := strings.Cut(given, "=")
		if !ok || name == "" || value == "" {
			return usagef("--build-context %q: write it as NAME=VALUE", given)
		}
		layout, isLayout := strings.CutPrefix(value, "oci-layout://")
		switch {
		case isLayout:
			abs, err := filepath.Abs(layout)
			if err != nil {
				return fmt.Errorf("build context %q: %w", given, err)
			}
			value = "oci-layout://" + abs
		case strings.HasPrefix(value, "docker-image://") || isRemote(value):
		default:
			dir, err := contextDir(value)
			if err != nil {
				return hint.With(err, "a context is a directory, docker-image://REFERENCE, oci-layout://DIRECTORY[:TAG] or a URL")
			}
			value = "dir:" + dir
		}
		if c.start.BuildContexts == nil {
			c.start.BuildContexts = map[string]string{}
		}
		c.start.BuildContexts[name] = value
	}
	return nil
}

// attributes reads KEY=VALUE,… with CSV's quotes. Of a first field without = the key is first.
func attributes(flag, given, first string, known ...string) (map[string]string, error) {
	fields, err := csv.NewReader(strings.NewReader(given)).Read()
	if err != nil || given == "" {
		return nil, usagef("%s %q: write it as KEY=VALUE,KEY=VALUE", flag, given)
	}
	attrs := map[string]string{}
	for i, field := range fields {
		key, value, ok := strings.Cut(field, "=")
		if !ok && i == 0 && first != "" {
			key, value, ok = first, field, true
		}
		if !ok {
			return nil, usagef("%s %q: %q is not KEY=VALUE", flag, given, field)
		}
		key = strings.ToLower(strings.TrimSpace(key))
		if len(known) > 0 && !slices.Contains(known, key) {
			return nil, usagef("%s %q: unknown key %q; want %s", flag, given, key, strings.Join(known, ", "))
		}
		attrs[key] = value
	}
	return attrs, nil
}

func (c *buildCall) readSecrets() error {
	for _, given := range c.secrets {
		attrs, err := attributes("--secret", given, "", secretKeys...)
		if err != nil {
			return err
		}
		id, value, err := c.env.secret(given, attrs)
		if err != nil {
			return err
		}
		if c.start.Secrets == nil {
			c.start.Secrets = map[string][]byte{}
		}
		c.start.Secrets[id] = value
	}
	return nil
}

// secretKeys are those of --secret that say where it is.
var secretKeys = []string{"id", "type", "src", "source", "env"}

// secret reads what --secret names here, so that the daemon needs no right to the file.
func (e *environment) secret(given string, attrs map[string]string) (id string, value []byte, err error) {
	id, file, env := attrs["id"], attrs["src"], attrs["env"]
	if file == "" {
		file = attrs["source"]
	}
	if id == "" {
		return "", nil, usagef("--secret %q: id= is missing", given)
	}
	if attrs["type"] == "env" && env == "" {
		env, file = file, "" // as docker has it: type=env,src=NAME
	}
	if file == "" && env == "" {
		if _, ok := e.LookupEnv(id); ok {
			env = id
		} else {
			file = id
		}
	}
	value, err = e.secretValue(file, env)
	if err != nil {
		return "", nil, fmt.Errorf("secret %q: %w", id, err)
	}
	return id, value, nil
}

func (e *environment) secretValue(file, env string) ([]byte, error) {
	if file != "" && env != "" {
		return nil, usagef("src and env: give one of them")
	}
	if env != "" {
		value, ok := e.LookupEnv(env)
		if !ok {
			return nil, hint.With(fmt.Errorf("the environment has no %s: %w", env, errdefs.ErrNotFound), "export %s=…, or take a file: src=FILE", env)
		}
		return []byte(value), nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, hint.With(fmt.Errorf("%w: %w", err, errdefs.ErrNotFound), "--secret id=ID,src=FILE or --secret id=ID,env=NAME")
	}
	defer f.Close()
	value, err := io.ReadAll(io.LimitReader(f, maxSecret))
	if value == nil {
		value = []byte{}
	}
	return value, err
}

func (c *buildCall) readHosts() error {
	for _, given := range c.addHosts {
		name, ip, err := parseHost(given)
		if err == nil && net.ParseIP(ip) == nil {
			err = usagef("--add-host %q: write it as NAME:ADDRESS", given)
		}
		if err != nil {
			return err
		}
		c.start.AddHosts = append(c.start.AddHosts, name+"="+ip)
	}
	return nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func (c *buildCall) readCaches() error {
	for _, way := range []struct {
		flag, dir string
		given     []string
		to        *[]*atollv1.CacheOption
	}{{"--cache-to", "dest", c.cacheTo, &c.start.CacheTo}, {"--cache-from", "src", c.cacheFrom, &c.start.CacheFrom}} {
		for _, given := range way.given {
			attrs, err := attributes(way.flag, given, "ref")
			if err != nil {
				return err
			}
			kind := attrs["type"]
			if kind == "" && attrs["ref"] != "" {
				kind = "registry"
			}
			switch kind {
			case "registry", "local", "inline":
			default:
				return usagef("%s %q: want type=registry, local or inline", way.flag, given)
			}
			if kind == "local" && attrs[way.dir] == "" {
				return usagef("%s %q: %s=DIR is missing", way.flag, given, way.dir)
			}
			if dir := attrs[way.dir]; dir != "" && kind == "local" {
				if way.dir == "src" && !isDir(dir) { // the builder would make it
					return usagef("%s %q: %s is no directory", way.flag, given, dir)
				}
				if attrs[way.dir], err = filepath.Abs(dir); err != nil {
					return fmt.Errorf("%s %q: %w", way.flag, given, err)
				}
			}
			delete(attrs, "type")
			*way.to = append(*way.to, &atollv1.CacheOption{Type: kind, Attributes: attrs})
		}
	}
	return nil
}
