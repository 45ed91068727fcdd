package provision

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/atollvm/atoll/internal/provision/hostkey"
)

// CheckNoCloud is Check for a system of its own with cloud-init in it: user-data is what cloud-init makes of it, and is not looked at.
func (r *Request) CheckNoCloud() error {
	var f faults
	if len(r.UserData) > MaxDocument {
		f.add("user-data", "", "it has %d bytes, more than %d", len(r.UserData), MaxDocument)
	}
	if r.Ignition != nil {
		f.add("ignition", "give it as cloud-config, with --user-data", "a disk image has cloud-init, not Ignition")
	}
	if len(r.Secrets) > 0 {
		f.add("secrets", "give them as --file, or in --user-data", "a disk image's system has no /run/secrets of Atoll")
	}
	rest := *r
	rest.UserData, rest.Ignition, rest.Secrets = nil, nil, nil
	_, err := rest.Check()
	return errors.Join(append(f, err)...)
}

// NoCloud is the request as the files of cloud-init's data source NoCloud, for a guest without our agent. User-data is handed over as it is;
// what flags ask for comes as vendor-data, which user-data overrides.
func (r *Request) NoCloud(instanceID, hostname string) (map[string][]byte, error) {
	meta := map[string]any{"instance-id": instanceID, "local-hostname": hostname}
	if len(r.SSHAuthorizedKeys) > 0 {
		meta["public-keys"] = r.SSHAuthorizedKeys
	}
	config, err := r.cloudConfig()
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"user-data": r.UserData, "vendor-data": nil}
	if files["meta-data"], err = json.Marshal(meta); err != nil { // JSON is YAML as well
		return nil, err
	}
	if len(config) > 0 {
		text, err := json.Marshal(config)
		if err != nil {
			return nil, err
		}
		files["vendor-data"] = append([]byte("#cloud-config\n"), text...)
	}
	return files, nil
}

// cloudConfig is what flags ask for, in cloud-init's words.
func (r *Request) cloudConfig() (map[string]any, error) {
	c := map[string]any{}
	set := func(is bool, key string, value any) {
		if is {
			c[key] = value
		}
	}
	set(r.Timezone != "", "timezone", r.Timezone)
	set(r.Locale != "", "locale", r.Locale)
	set(len(r.NTPServers) > 0, "ntp", map[string]any{"enabled": true, "servers": r.NTPServers})
	set(len(r.Packages) > 0, "packages", r.Packages)
	set(len(r.Packages) > 0, "package_update", true)
	users := []any{"default"}
	for _, u := range r.Users {
		users = append(users, u.cloudUser(r.SSHAuthorizedKeys))
	}
	set(len(r.Users) > 0, "users", users)
	var files, mounts []any
	for _, f := range r.Files {
		mode := f.Mode
		if mode == 0 {
			mode = 0o644
		}
		file := map[string]any{"path": f.Path, "encoding": "b64", "content": append([]byte{}, f.Data...), "permissions": fmt.Sprintf("%#o", mode)}
		if f.Owner != "" {
			user, group, err := owners(f.Owner)
			if err != nil {
				return nil, err
			}
			file["owner"] = user + ":" + group
		}
		files = append(files, file)
	}
	set(len(files) > 0, "write_files", files)
	for _, m := range r.Mounts {
		source, options := m.Source, m.Options
		if source == "" {
			source = m.Type
		}
		if options == "" {
			options = "defaults"
		}
		mounts = append(mounts, []string{source, m.Path, m.Type, options, "0", "0"})
	}
	set(len(mounts) > 0, "mounts", mounts)
	keys, err := r.HostKeys(nil)
	if err != nil {
		return nil, err
	}
	set(len(keys) > 0, "ssh_keys", cloudHostKeys(keys))
	return c, nil
}

func cloudHostKeys(keys []hostkey.Key) map[string]string {
	out := map[string]string{}
	for _, k := range keys {
		out[k.Type+"_private"], out[k.Type+"_public"] = string(k.Private), string(k.Public)
	}
	return out
}

func (u User) cloudUser(keys []string) map[string]any {
	out := map[string]any{"name": u.Name}
	set := func(is bool, key string, value any) {
		if is {
			out[key] = value
		}
	}
	if u.UID != nil {
		out["uid"] = *u.UID
	}
	set(u.Home != "", "homedir", u.Home)
	set(u.Shell != "", "shell", u.Shell)
	set(len(u.Groups) > 0, "groups", u.Groups)
	set(u.Sudo, "sudo", "ALL=(ALL) NOPASSWD:ALL")
	set(u.PasswordHash != "", "hashed_passwd", u.PasswordHash)
	set(u.PasswordHash != "", "lock_passwd", false)
	if len(u.SSHAuthorizedKeys) > 0 {
		keys = u.SSHAuthorizedKeys
	}
	set(len(keys) > 0, "ssh_authorized_keys", keys)
	return out
}
