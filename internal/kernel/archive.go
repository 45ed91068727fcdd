package kernel

import (
	"archive/zip"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// The modules that a guest's kernel may ask for while it runs lie in one archive beside the kernel, with an index of what they are called.
const (
	archiveFile = "modules.zip"
	indexFile   = "index.json" // in the archive, beside NAME.ko
	moduleMax   = 16 << 20     // bytes of one module
)

// archived are the directories of a kernel's modules from which a guest's kernel gets what it asks for: networks and packet filters, file
// systems, their ciphers, and devices that are made of software. A machine has no other hardware than what every guest's kernel loads.
var archived = []string{"net/", "fs/", "crypto/", "lib/", "arch/", "drivers/net/", "drivers/block/", "drivers/md/"}

// companions are modules that no kernel asks for, but the programs that use another one expect with it: Docker has modprobe load these.
var companions = map[string][]string{"bridge": {"br_netfilter"}}

// Modules is what a guest's kernel may ask for of a kernel of the store. It may be used from several goroutines.
type Modules struct {
	path string
	read sync.Once // of the index, at the first question
	err  error
	index
}

// index of an archive. Each name is written with underscores.
type index struct {
	Depends map[string][]string // by module: those to load before it
	Aliases map[string][]string // what a module is asked for as beside its name
}

// Modules returns the modules that guests of a kernel may ask for; nil for a kernel that has none, as everything is built in or it was fetched by
// an older Atoll.
func (s *Store) Modules(name string) *Modules {
	path := filepath.Join(s.opts.Dir, name, archiveFile)
	if !nameRE.MatchString(name) || !isFile(path) {
		return nil
	}
	return &Modules{path: path}
}

// Find returns the names of the modules to load, in that order, for what a kernel asks for: a module's name or an alias.
func (m *Modules) Find(request string) ([]string, error) {
	m.read.Do(func() { m.err = m.readIndex() })
	if m.err != nil {
		return nil, m.err
	}
	var order []string
	var add func(name string)
	add = func(name string) {
		depends, ok := m.Depends[name]
		if !ok || slices.Contains(order, name) {
			return
		}
		for _, d := range depends {
			add(d)
		}
		order = append(order, name)
		for _, c := range companions[name] {
			add(c)
		}
	}
	request = underscored(request)
	add(request)
	for _, name := range m.Aliases[request] {
		add(name)
	}
	if len(order) == 0 {
		return nil, fmt.Errorf("kernel module %q: %w", request, errdefs.ErrNotFound)
	}
	return order, nil
}

func (m *Modules) readIndex() error {
	data, err := m.open(indexFile)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &m.index); err != nil {
		return fmt.Errorf("reading %s of %s: %w", indexFile, m.path, err)
	}
	return nil
}

// Read returns a module by its name.
func (m *Modules) Read(name string) ([]byte, error) { return m.open(name + ".ko") }

func (m *Modules) open(name string) ([]byte, error) {
	z, err := zip.OpenReader(m.path)
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's modules: %w", err)
	}
	defer z.Close()
	z.RegisterDecompressor(zstd.ZipMethodWinZip, zstd.ZipDecompressor(zstd.WithDecoderConcurrency(1)))
	f, err := z.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading %s of the kernel's modules: %w", name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, moduleMax))
	if err != nil {
		return nil, fmt.Errorf("reading %s of the kernel's modules: %w", name, err)
	}
	return data, nil
}

// archive writes the modules that guests may ask for. files are the paths of all by name, dirs the directories that they have in the kernel's
// package; edit, which may cut a signature, gets each.
func archive(to string, files, dirs map[string]string, edit func([]byte) []byte) error {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	z := zip.NewWriter(f)
	z.RegisterCompressor(zstd.ZipMethodWinZip, zstd.ZipCompressor(zstd.WithEncoderLevel(zstd.SpeedFastest)))
	write := func(name string, data []byte) error {
		w, err := z.CreateHeader(&zip.FileHeader{Name: name, Method: zstd.ZipMethodWinZip})
		if err == nil {
			_, err = w.Write(data)
		}
		if err != nil {
			return noSpace(to, err)
		}
		return nil
	}
	x := index{Depends: map[string][]string{}, Aliases: map[string][]string{}}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !slices.ContainsFunc(archived, func(dir string) bool { return strings.HasPrefix(dirs[name], dir) }) {
			continue
		}
		info, err := readModinfo(files[name])
		if err != nil {
			return err
		}
		x.Depends[name] = append(info.soft, info.hard...)
		for _, alias := range info.aliases {
			// Those with wildcards name devices of a bus, by which udev looks; a kernel asks for one thing.
			if !strings.ContainsAny(alias, "*?[") {
				alias = underscored(alias)
				x.Aliases[alias] = append(x.Aliases[alias], name)
			}
		}
		data, err := os.ReadFile(files[name])
		if err != nil {
			return err
		}
		if err := write(name+".ko", edit(data)); err != nil {
			return err
		}
	}
	text, err := json.Marshal(x)
	if err != nil {
		return err
	}
	if err := write(indexFile, text); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return noSpace(to, err)
	}
	if err := f.Sync(); err != nil {
		return noSpace(to, err)
	}
	return f.Close()
}

func underscored(name string) string { return strings.ReplaceAll(name, "-", "_") }

// moduleDirectory is where a package has a module, below lib/modules/VERSION/kernel/.
func moduleDirectory(file string) string {
	_, below, _ := strings.Cut(file, "/kernel/")
	return path.Dir(below) + "/"
}
