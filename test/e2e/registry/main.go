// Command registry is the scripts' registry on loopback, holding one small image for several platforms. With -login it lets nobody in
// without; the layer of an image whose specification ends in =zstd is compressed so.
package main

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	login := flag.String("login", "", "USER:PASSWORD that everybody needs")
	flag.Parse()
	if flag.NArg() < 1 {
		log.Fatal("usage: registry [-login USER:PASSWORD] ADDRESS [REPOSITORY:TAG=OS/ARCH[=zstd]...]")
	}
	l, err := net.Listen("tcp", flag.Arg(0))
	if err != nil {
		log.Fatal(err)
	}
	var handler http.Handler = registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	if *login != "" {
		handler = guard(handler, *login)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	go func() { log.Fatal(server.Serve(l)) }()
	for _, spec := range flag.Args()[1:] {
		if err := push(l.Addr().String(), spec); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println("ready")
	os.Stdout.Close()
	time.Sleep(5 * time.Minute) // the script ends it
}

// guard lets in who gives the login, by HTTP's basic authentication.
func guard(next http.Handler, login string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user+":"+password != login {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func push(addr, spec string) error {
	parts := strings.Split(spec, "=")
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
	var options []tarball.LayerOption
	if len(parts) > 2 && parts[2] == "zstd" {
		options = []tarball.LayerOption{tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd)}
		img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil }, options...)
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
