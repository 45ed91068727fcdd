package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/hostkey"
	"github.com/atollvm/atoll/internal/provision/ignition"
	"github.com/atollvm/atoll/internal/provision/zone"
)

// provisionFlags are the flags of run, create and start that say what is set in the guest at its first boot.
type provisionFlags struct {
	request  *atollv1.Provisioning
	userData string
	ignition string
	keys     []string
	hostKeys []string
	users    []string
	files    []string
	secrets  []string
	mounts   []string
}

// provisionFlagNames are those that addProvisionFlags adds.
var provisionFlagNames = []string{"user-data", "ignition", "ssh-key", "ssh-host-key", "timezone", "locale", "ntp", "package", "add-user", "file", "secret", "mount"}

func addProvisionFlags(cmd *cobra.Command) *provisionFlags {
	p := &provisionFlags{request: &atollv1.Provisioning{}}
	f := cmd.Flags()
	f.StringVar(&p.userData, "user-data", "", "set the guest up from a `FILE` at the first boot, or - for standard input: a\nscript (#!), #cloud-config, multi-part, Ignition or Butane")
	f.StringVar(&p.ignition, "ignition", "", "set the guest up from a `FILE` of Ignition (JSON) or Butane (YAML)")
	f.StringArrayVar(&p.keys, "ssh-key", nil, "public SSH `KEY`, or a file of them, for root and the users of --add-user")
	f.StringArrayVar(&p.hostKeys, "ssh-host-key", nil, "`FILE` with a private key for the guest's SSH server (default: made for\nthe machine)")
	f.StringVar(&p.request.Timezone, "timezone", "", "time zone, such as Europe/Berlin (default UTC)")
	f.StringVar(&p.request.Locale, "locale", "", "locale, such as de_DE.UTF-8")
	f.StringSliceVar(&p.request.NtpServers, "ntp", nil, "time `SERVER` for the guest to ask (default: the host's clock alone)")
	f.StringSliceVar(&p.request.Packages, "package", nil, "install a package of the image's distribution (apt, apk, dnf) by `NAME`")
	f.StringArrayVar(&p.users, "add-user", nil, "add a user: `NAME[:KEY=VALUE,...]` with the keys uid, groups=A+B, shell,\nhome, sudo, password-hash, password-hash-file, ssh-key")
	f.StringArrayVar(&p.files, "file", nil, "put a file there: `FILE:PATH[:MODE[:OWNER]]`, with the owner as USER[:GROUP]")
	f.StringArrayVar(&p.secrets, "secret", nil, "a file in the guest's /run/secrets: `id=NAME[,src=FILE|,env=VAR]`\n[,uid=UID][,gid=GID][,mode=0400] (default root's alone)")
	f.StringArrayVar(&p.mounts, "mount", nil, "mount at each boot: `type=TYPE,target=PATH[,source=DEVICE][,options=A+B]`")
	complete(cmd, "locale", "C.UTF-8", "en_US.UTF-8", "en_GB.UTF-8", "de_DE.UTF-8", "fr_FR.UTF-8", "es_ES.UTF-8")
	complete(cmd, "mount", "type=tmpfs,target=", "type=ext4,source=/dev/vdc,target=")
	if err := cmd.RegisterFlagCompletionFunc("timezone", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return zone.Names(), cobra.ShellCompDirectiveNoFileComp
	}); err != nil {
		panic(err) // the flag does not exist: a mistake in this package
	}
	return p
}

// given says whether any of the flags was.
func (p *provisionFlags) given(cmd *cobra.Command) bool {
	for _, name := range provisionFlagNames {
		if cmd.Flags().Changed(name) {
			return true
		}
	}
	return false
}

// provisioning reads what the flags name here; the daemon checks the rest. nil: nothing was asked for.
func (p *provisionFlags) provisioning(e *environment, cmd *cobra.Command) (*atollv1.Provisioning, error) {
	if !p.given(cmd) {
		return nil, nil
	}
	var faults []error
	var err error
	p.request.UserData, err = p.document(e, cmd, "user-data", p.userData)
	faults = append(faults, err)
	p.request.Ignition, err = p.document(e, cmd, "ignition", p.ignition)
	faults = append(faults, err)
	for _, given := range p.keys {
		keys, err := publicKeys("--ssh-key", given)
		p.request.SshAuthorizedKeys = append(p.request.SshAuthorizedKeys, keys...)
		faults = append(faults, err)
	}
	for _, file := range p.hostKeys {
		data, err := readFile("--ssh-host-key", file, maxSecret)
		if err == nil {
			_, err = hostkey.Parse(data)
			err = wrapFlag("--ssh-host-key "+file, err)
		}
		p.request.SshHostKeys = append(p.request.SshHostKeys, data)
		faults = append(faults, err)
	}
	if cmd.Flags().Changed("timezone") {
		_, err := zone.Find(p.request.GetTimezone())
		faults = append(faults, wrapFlag("--timezone", err))
	}
	for flag, values := range map[string][]string{"ntp": p.request.GetNtpServers(), "package": p.request.GetPackages()} {
		if cmd.Flags().Changed(flag) && len(values) == 0 {
			faults = append(faults, usagef("--%s: it is empty", flag))
		}
	}
	for _, given := range p.users {
		u, err := parseUser(given)
		p.request.Users = append(p.request.Users, u)
		faults = append(faults, err)
	}
	for _, given := range p.files {
		f, err := parseFile(given)
		p.request.Files = append(p.request.Files, f)
		faults = append(faults, err)
	}
	for _, given := range p.secrets {
		s, err := e.machineSecret(given)
		p.request.Secrets = append(p.request.Secrets, s)
		faults = append(faults, err)
	}
	for _, given := range p.mounts {
		m, err := parseMount(given)
		p.request.Mounts = append(p.request.Mounts, m)
		faults = append(faults, err)
	}
	return p.request, errors.Join(faults...)
}

// wrapFlag says which flag a fault is about.
func wrapFlag(flag string, err error) error {
	if err == nil {
		return nil
	}
	return usageError{hint.With(fmt.Errorf("%s: %w", flag, err), "%s", hint.Of(err))}
}

// maxDocument is what the daemon takes of user-data and of Ignition.
const maxDocument = 16 << 20

func (p *provisionFlags) document(e *environment, cmd *cobra.Command, flag, path string) ([]byte, error) {
	if !cmd.Flags().Changed(flag) {
		return nil, nil
	}
	if path != "-" {
		data, err := readFile("--"+flag, path, maxDocument)
		if err != nil || !ignition.IsButane(data) {
			return data, err
		}
		// Here, as files that it embeds are here.
		data, warnings, err := ignition.Translate(data, filepath.Dir(path))
		ui.Warnings(e.Stderr, warnings)
		return data, wrapFlag("--"+flag+" "+path, err)
	}
	if stdin := cmd.Flags().Lookup("interactive"); stdin != nil && stdin.Changed {
		return nil, usagef("--%s - and --interactive: both would read standard input", flag)
	}
	if p.userData == p.ignition {
		return nil, usagef("--user-data - and --ignition -: both would read standard input")
	}
	if _, terminal := ui.Terminal(e.Stdin); terminal {
		return nil, hint.With(fmt.Errorf("--%s -: it is not typed at a terminal", flag), "name a file, or redirect the input")
	}
	return readAll("--"+flag+" -", e.Stdin, maxDocument)
}

func readFile(flag, path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hint.With(fmt.Errorf("%s %q: no such file: %w", flag, path, errdefs.ErrNotFound), "check the path")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	defer f.Close()
	return readAll(flag+" "+path, f, most)
}

func readAll(what string, r io.Reader, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if int64(len(data)) > most {
		return nil, usagef("%s: it is larger than %s", what, ui.Size(most))
	}
	if len(data) == 0 {
		return nil, usagef("%s: it is empty", what)
	}
	return data, nil
}

// publicKeys returns a literal key, or those of a file.
func publicKeys(flag, given string) ([]string, error) {
	text := given
	if !strings.Contains(given, " ") || isFile(given) {
		data, err := readFile(flag, given, maxSecret)
		if err != nil {
			return nil, err
		}
		text = string(data)
	}
	if hostkey.IsPrivate([]byte(text)) {
		return nil, hint.With(usageError{fmt.Errorf("%s: it is a private key, which must stay where it is", flag)}, "give the public key, which is in the file that ends in .pub")
	}
	var keys []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			keys = append(keys, line)
		}
	}
	if len(keys) == 0 {
		return nil, usagef("%s %q: there is no key in it", flag, given)
	}
	return keys, nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir()
}

// parseUser reads NAME[:KEY=VALUE,...].
func parseUser(given string) (*atollv1.User, error) {
	name, rest, more := strings.Cut(given, ":")
	u := &atollv1.User{Name: name}
	if name == "" {
		return u, usagef("--add-user %q: want NAME[:KEY=VALUE,...]", given)
	}
	if !more {
		return u, nil
	}
	if rest == "sudo" || strings.HasPrefix(rest, "sudo,") { // attributes wants KEY=VALUE
		rest = "sudo=true" + strings.TrimPrefix(rest, "sudo")
	}
	rest = strings.ReplaceAll(rest+",", ",sudo,", ",sudo=true,")
	flag := "--add-user " + name
	attrs, err := attributes(flag, strings.TrimSuffix(rest, ","), "", "uid", "groups", "shell", "home", "sudo", "password-hash", "password-hash-file", "ssh-key")
	if err != nil {
		return u, err
	}
	u.Shell, u.Home, u.PasswordHash = attrs["shell"], attrs["home"], attrs["password-hash"]
	if v, ok := attrs["uid"]; ok {
		uid, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return u, usagef("%s: uid %q is not a number", flag, v)
		}
		u.Uid = proto.Uint32(uint32(uid))
	}
	if v := attrs["groups"]; v != "" {
		u.Groups = strings.Split(v, "+")
	}
	if v, ok := attrs["sudo"]; ok {
		if u.Sudo, err = strconv.ParseBool(v); err != nil {
			return u, usagef("%s: sudo=%s: want true or false", flag, v)
		}
	}
	if file := attrs["password-hash-file"]; file != "" {
		if u.PasswordHash != "" {
			return u, usagef("%s: password-hash and password-hash-file: give one of them", flag)
		}
		data, err := readFile(flag+": password-hash-file", file, 1<<10)
		if err != nil {
			return u, err
		}
		u.PasswordHash = string(bytes.TrimSpace(data))
	}
	if v := attrs["ssh-key"]; v != "" {
		u.SshAuthorizedKeys, err = publicKeys(flag+": ssh-key", v)
	}
	return u, err
}

// parseFile reads FILE:PATH[:MODE[:OWNER]]. Without a mode the file's own permissions count.
func parseFile(given string) (*atollv1.File, error) {
	parts := strings.SplitN(given, ":", 4)
	f := &atollv1.File{}
	if len(parts) < 2 || parts[0] == "" || parts[1] == "" {
		return f, usagef("--file %q: want FILE:PATH[:MODE[:OWNER]]", given)
	}
	f.Path = parts[1]
	if !filepath.IsAbs(f.Path) {
		return f, usagef("--file %q: %s is not an absolute path of the guest", given, f.Path)
	}
	if strings.HasSuffix(f.Path, "/") {
		f.Path += filepath.Base(parts[0])
	}
	info, err := os.Stat(parts[0])
	if errors.Is(err, fs.ErrNotExist) {
		return f, hint.With(fmt.Errorf("--file %s: no such file: %w", parts[0], errdefs.ErrNotFound), "check the path")
	}
	if err != nil {
		return f, fmt.Errorf("--file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return f, hint.With(usageError{fmt.Errorf("--file %s: it is not a regular file", parts[0])}, "put directories into the image with COPY")
	}
	f.Mode = uint32(info.Mode().Perm())
	if len(parts) > 2 && parts[2] != "" {
		mode, err := strconv.ParseUint(parts[2], 8, 32)
		if err != nil || mode > 0o7777 || mode == 0 {
			return f, usagef("--file %q: %q is not a mode such as 0644", given, parts[2])
		}
		f.Mode = uint32(mode)
	}
	if len(parts) > 3 {
		f.Owner = parts[3]
	}
	if f.Data, err = os.ReadFile(parts[0]); err != nil {
		return f, fmt.Errorf("--file: %w", err)
	}
	return f, nil
}

// machineSecret reads --secret; who may read it is said as of a RUN --mount=type=secret, by the numbers of a user and a group.
func (e *environment) machineSecret(given string) (*atollv1.Secret, error) {
	attrs, err := attributes("--secret", given, "", append([]string{"uid", "gid", "mode"}, secretKeys...)...)
	if err != nil {
		return nil, err
	}
	s := &atollv1.Secret{}
	if s.Name, s.Data, err = e.secret(given, attrs); err != nil {
		return nil, err
	}
	for _, key := range []string{"uid", "gid"} {
		if v, ok := attrs[key]; !ok {
			attrs[key] = "0"
		} else if _, err := strconv.ParseUint(v, 10, 32); err != nil {
			return nil, usagef("--secret %q: %s=%s: want a number", given, key, v)
		}
	}
	if attrs["uid"] != "0" || attrs["gid"] != "0" {
		s.Owner = attrs["uid"] + ":" + attrs["gid"]
	}
	if v, ok := attrs["mode"]; ok {
		mode, err := strconv.ParseUint(v, 8, 32)
		if err != nil || mode > 0o777 || mode == 0 {
			return nil, usagef("--secret %q: mode=%s: want an octal number such as 0440", given, v)
		}
		s.Mode = uint32(mode)
	}
	return s, nil
}

// parseMount reads docker's --mount, as far as it is about file systems.
func parseMount(given string) (*atollv1.FileSystemMount, error) {
	m := &atollv1.FileSystemMount{}
	known := []string{"type", "target", "dst", "destination", "source", "src", "options", "readonly", "ro", "tmpfs-size", "tmpfs-mode"}
	for _, alone := range []string{"readonly", "ro"} { // attributes wants KEY=VALUE
		given = strings.TrimSuffix(strings.ReplaceAll(given+",", ","+alone+",", ","+alone+"=true,"), ",")
	}
	attrs, err := attributes("--mount", given, "", known...)
	if err != nil {
		return m, err
	}
	first := func(keys ...string) string {
		for _, k := range keys {
			if v := attrs[k]; v != "" {
				return v
			}
		}
		return ""
	}
	m.Type, m.Path, m.Source = attrs["type"], first("target", "dst", "destination"), first("source", "src")
	var options []string
	if v := attrs["options"]; v != "" {
		options = strings.Split(v, "+")
	}
	if v := first("readonly", "ro"); v != "" {
		ro, err := strconv.ParseBool(v)
		if err != nil {
			return m, usagef("--mount %q: readonly=%s: want true or false", given, v)
		}
		if ro {
			options = append(options, "ro")
		}
	}
	for _, key := range []string{"tmpfs-size", "tmpfs-mode"} {
		if v := attrs[key]; v != "" {
			if m.Type != "tmpfs" {
				return m, usagef("--mount %q: %s is for type=tmpfs", given, key)
			}
			options = append(options, strings.TrimPrefix(key, "tmpfs-")+"="+v)
		}
	}
	m.Options = strings.Join(options, ",")
	switch {
	case m.Type == "" || m.Type == "bind" || m.Type == "volume":
		return m, hint.With(usageError{fmt.Errorf("--mount %q: a machine cannot have directories of the host or volumes yet", given)},
			"give the type of a file system, such as type=tmpfs; files come by --file")
	case m.Path == "":
		return m, usagef("--mount %q: target= is missing", given)
	}
	return m, nil
}
