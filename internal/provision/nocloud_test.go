package provision

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIP1dRhxJrbtEaXN0076HpDkl57c7c4wa743FFznLVOR somebody"

// User-data goes through byte for byte; what flags say becomes what cloud-init reads.
func TestNoCloud(t *testing.T) {
	uid := uint32(1234)
	r := Request{
		UserData: []byte("#!/bin/sh\necho $x \"'\n"), SSHAuthorizedKeys: []string{testKey}, Timezone: "Europe/Berlin", Locale: "C.UTF-8",
		NTPServers: []string{"ntp.example"}, Packages: []string{"curl"},
		Users:  []User{{Name: "anna", UID: &uid, Groups: []string{"adm"}, Sudo: true, PasswordHash: "$6$a$b"}, {Name: "bert", SSHAuthorizedKeys: []string{testKey + "2"}}},
		Files:  []File{{Path: "/etc/a", Data: []byte("b\x00\n"), Mode: 0o600, Owner: "anna"}, {Path: "/etc/b"}},
		Mounts: []FileSystemMount{{Path: "/mnt", Type: "tmpfs"}},
	}
	if err := r.CheckNoCloud(); err != nil {
		t.Fatal(err)
	}
	files, err := r.NoCloud("i-1", "web")
	if err != nil {
		t.Fatal(err)
	}
	if string(files["user-data"]) != string(r.UserData) {
		t.Errorf("user-data %q", files["user-data"])
	}
	read := func(name string) (v map[string]any) {
		t.Helper()
		if err := yaml.Unmarshal(files[name], &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	if d := cmp.Diff(map[string]any{"instance-id": "i-1", "local-hostname": "web", "public-keys": []any{testKey}}, read("meta-data")); d != "" {
		t.Error(d)
	}
	if !strings.HasPrefix(string(files["vendor-data"]), "#cloud-config\n") {
		t.Errorf("vendor-data %q", files["vendor-data"])
	}
	want := map[string]any{
		"timezone": "Europe/Berlin", "locale": "C.UTF-8", "ntp": map[string]any{"enabled": true, "servers": []any{"ntp.example"}},
		"packages": []any{"curl"}, "package_update": true,
		"users": []any{
			"default",
			map[string]any{
				"name": "anna", "uid": 1234, "groups": []any{"adm"}, "sudo": "ALL=(ALL) NOPASSWD:ALL", "hashed_passwd": "$6$a$b", "lock_passwd": false,
				"ssh_authorized_keys": []any{testKey},
			},
			map[string]any{"name": "bert", "ssh_authorized_keys": []any{testKey + "2"}},
		},
		"write_files": []any{
			map[string]any{"path": "/etc/a", "encoding": "b64", "content": "YgAK", "permissions": "0600", "owner": "anna:anna"},
			map[string]any{"path": "/etc/b", "encoding": "b64", "content": "", "permissions": "0644"},
		},
		"mounts": []any{[]any{"tmpfs", "/mnt", "tmpfs", "defaults", "0", "0"}},
	}
	if d := cmp.Diff(want, read("vendor-data")); d != "" {
		t.Error(d)
	}

	if files, err = (&Request{}).NoCloud("i-1", "web"); err != nil || len(files["vendor-data"])+len(files["user-data"]) != 0 {
		t.Errorf("nothing asked for: %q, %v", files, err)
	}
}

// What cannot be handed over is refused by name.
func TestCheckNoCloud(t *testing.T) {
	r := Request{Ignition: []byte("{}"), Secrets: []Secret{{Name: "a"}}, Timezone: "Mars/Base", UserData: []byte("anything")}
	err := r.CheckNoCloud()
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	for _, word := range []string{"ignition", "secrets", "Mars/Base"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s is not named: %v", word, err)
		}
	}
	if strings.Contains(err.Error(), "anything") {
		t.Errorf("user-data is looked at: %v", err)
	}
}
