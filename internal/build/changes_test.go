//go:build linux

package build

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/hint"
)

func TestChanges(t *testing.T) {
	got, err := Changes([]string{
		`CMD ["/bin/app", "-x"]`, `ENTRYPOINT run this`, `ENV A=1 B="two words"`, `EXPOSE 80 53/udp`, `USER 1000:5`, `WORKDIR /srv`,
		`VOLUME /data`, `LABEL a=b`, `STOPSIGNAL SIGINT`, `ONBUILD RUN true`,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := dockerspec.DockerOCIImageConfig{}
	want.Cmd, want.Entrypoint = []string{"/bin/app", "-x"}, []string{"/bin/sh", "-c", "run this"}
	want.Env, want.User, want.WorkingDir, want.StopSignal = []string{"A=1", "B=two words"}, "1000:5", "/srv", "SIGINT"
	want.ExposedPorts, want.Volumes = map[string]struct{}{"80/tcp": {}, "53/udp": {}}, map[string]struct{}{"/data": {}}
	want.Labels, want.OnBuild = map[string]string{"a": "b"}, []string{"RUN true"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, line := range []string{"RUN true", "COPY a b", "FROM x", "NONSENSE 1", ""} {
		if _, err := Changes([]string{line}); !errdefs.IsInvalidArgument(err) || hint.Of(err) == "" {
			t.Errorf("Changes(%q) = %v, want an invalid argument with a hint", line, err)
		}
	}
}
