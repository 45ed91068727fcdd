// Command registry is the scripts' registry on loopback, holding one small image for several platforms.
package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func main() {
	if len(os.Args) < 2 {
		log.Fatal("usage: registry ADDRESS [REPOSITORY:TAG=OS/ARCH | REPOSITORY:TAG=LAYOUT-DIRECTORY]...")
	}
	l, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), ReadHeaderTimeout: time.Minute}
	go func() { log.Fatal(server.Serve(l)) }()
	for _, spec := range os.Args[2:] {
		if err := push(l.Addr().String(), spec); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println("ready")
	os.Stdout.Close()
	time.Sleep(5 * time.Minute) // the script ends it
}

// pushLayout pushes the one image of an OCI layout.
func pushLayout(addr, repository, dir string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(addr + "/" + repository)
	if err != nil {
		return err
	}
	return remote.Write(ref, img)
}

func push(addr, spec string) error {
	parts := strings.Split(spec, "=")
	if filepath.IsAbs(parts[1]) {
		return pushLayout(addr, parts[0], parts[1])
	}
	osName, arch, _ := strings.Cut(parts[1], "/")
	img := empty.Image
	cfg := &v1.ConfigFile{OS: osName, Architecture: arch, Config: v1.Config{Cmd: []string{"/bin/busybox", "echo", "from the registry"}, Env: []string{"FROM_REGISTRY=yes"}}}
	img, err := mutate.ConfigFile(img, cfg)
	if err != nil {
		return err
	}
	binary, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, h := range []*tar.Header{{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(binary))}} {
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if h.Size > 0 {
			if _, err := w.Write(binary); err != nil {
				return err
			}
		}
	}
	w.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return err
	}
	if img, err = mutate.AppendLayers(img, l); err != nil {
		return err
	}
	ref, err := name.ParseReference(addr + "/" + parts[0])
	if err != nil {
		return err
	}
	return remote.Write(ref, img)
}
