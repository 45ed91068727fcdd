package base

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atollvm/atoll/internal/event"
	"github.com/atollvm/atoll/internal/image"
	"github.com/atollvm/atoll/internal/state"
)

// TestUBIItself runs where Red Hat's registry can be reached.
func TestUBIItself(t *testing.T) {
	if testing.Short() {
		t.Skip("short: it fetches an image")
	}
	conn, err := net.DialTimeout("tcp", ubiRegistry+":443", 5*time.Second)
	if err != nil {
		t.Skipf("Red Hat's registry cannot be reached from here, so nothing was tested with it: %v", err)
	}
	conn.Close()
	db, err := state.Open(filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	images, err := image.Open(image.Options{Dir: t.TempDir(), DB: db, DockerConfigDir: t.TempDir(), Events: event.New(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	b := builder(t)
	b.Pull = func(ctx context.Context, reference string, _ func(string)) (ocispec.Descriptor, error) {
		img, err := images.Pull(ctx, reference, image.PullOptions{})
		return img.ManifestDesc, err
	}
	for _, name := range []string{"ubi:9", "ubi:9-systemd"} {
		if _, err := b.Build(t.Context(), name, Options{}, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
