//go:build linux

package server

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/prototext"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/profile"
)

func TestProfileWithholds(t *testing.T) {
	spec := &atollv1.MachineSpec{MemoryBytes: 1, Provisioning: &atollv1.Provisioning{
		Timezone: "Europe/Berlin", UserData: []byte("HIDE"), Ignition: []byte("HIDE"), SshHostKeys: [][]byte{[]byte("HIDE")},
		Users:   []*atollv1.User{{Name: "ann", PasswordHash: "HIDE"}},
		Files:   []*atollv1.File{{Path: "/f", Data: []byte("HIDE")}},
		Secrets: []*atollv1.Secret{{Name: "tok", Data: []byte("HIDE")}},
	}}
	shown := profileTo(profile.Profile{Name: "p", Spec: spec}).GetSpec()
	if text := prototext.Format(shown); strings.Contains(text, "HIDE") || shown.GetMemoryBytes() != 1 || shown.GetProvisioning().GetTimezone() != "Europe/Berlin" {
		t.Error(text)
	}
	want := []string{"userData", "ignition", "sshHostKeys", "users.ann.passwordHash", "files./f", "secrets.tok"}
	if d := cmp.Diff(want, shown.GetProvisioning().GetWithheld()); d != "" {
		t.Error(d)
	}
	if string(spec.GetProvisioning().GetUserData()) != "HIDE" {
		t.Error("the profile itself has lost its contents")
	}
}
