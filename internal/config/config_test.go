package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atollvm/atoll/internal/hint"
)

func TestLoad(t *testing.T) {
	tests := []struct {
		name  string
		env   map[string]string
		uid   int
		flags Flags
		want  Config
	}{
		{
			name: "root",
			env:  map[string]string{"HOME": "/root", "XDG_DATA_HOME": "/x"},
			want: Config{Home: "/var/lib/atoll", Host: "unix:///var/lib/atoll/atoll.sock", DockerConfig: "/root/.docker"},
		},
		{
			name: "user",
			env:  map[string]string{"HOME": "/home/ann", "NO_COLOR": "1"},
			uid:  1000,
			want: Config{Home: "/home/ann/.local/share/atoll", Host: "unix:///home/ann/.local/share/atoll/atoll.sock", DockerConfig: "/home/ann/.docker", NoColor: true},
		},
		{
			name: "user with XDG_DATA_HOME",
			env:  map[string]string{"HOME": "/home/ann", "XDG_DATA_HOME": "/data", "DOCKER_CONFIG": "/d"},
			uid:  1000,
			want: Config{Home: "/data/atoll", Host: "unix:///data/atoll/atoll.sock", DockerConfig: "/d"},
		},
		{
			name: "ATOLL_HOME and ATOLL_HOST",
			env:  map[string]string{"ATOLL_HOME": "/a", "ATOLL_HOST": "unix:///b.sock"},
			want: Config{Home: "/a", Host: "unix:///b.sock", HostChosen: true},
		},
		{
			name: "ATOLL_HOST is the home's own",
			env:  map[string]string{"ATOLL_HOME": "/a", "ATOLL_HOST": "unix:///a/atoll.sock"},
			want: Config{Home: "/a", Host: "unix:///a/atoll.sock"},
		},
		{
			name:  "the flag beats the environment",
			env:   map[string]string{"ATOLL_HOME": "/a", "ATOLL_HOST": "unix:///b.sock"},
			flags: Flags{Host: "unix:///c.sock"},
			want:  Config{Home: "/a", Host: "unix:///c.sock", HostChosen: true},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Load(lookup(tt.env), tt.uid, tt.flags)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"a home that is too long for sockets": {"ATOLL_HOME": "/" + strings.Repeat("x", 62)},
		"no home at all":                      {},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(lookup(env), 1000, Flags{})
			if err == nil || hint.Of(err) == "" {
				t.Errorf("err = %v, hint %q; want both", err, hint.Of(err))
			}
		})
	}
	if _, err := Load(lookup(map[string]string{"ATOLL_HOME": "/" + strings.Repeat("x", 61)}), 0, Flags{}); err != nil {
		t.Errorf("the longest home: %v", err)
	}
}

func lookup(env map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) {
		v, ok := env[k]
		return v, ok
	}
}
