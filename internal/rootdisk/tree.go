package rootdisk

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The layers are read from the top down, so what is in the tree already wins. Layers are counted from the top: 0 is the topmost,
// and a node with cut n hides what layers greater than n have beneath it.
const noCut = math.MaxInt

// budget bounds what strangers can make of a tree: its memory, and the bytes of the disk, holes included.
type budget struct {
	memory int64 // bytes left
	data   int64
}

const (
	maxMemory = 3 << 29   // 1.5 GiB: about four million names
	maxData   = 256 << 30 // a layer of zeros packs a thousandfold; what is to be read takes its time
	nodeCost  = 384       // a node, its inode and its place in a map, measured (TestMemoryOfTree)
)

func (b *budget) spend(n int64) error {
	if b.memory -= n; b.memory < 0 {
		return fmt.Errorf("the layers have too many or too long names and attributes: their tree would take more than %d MiB: %w", maxMemory>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (b *budget) write(n int64) error {
	if b.data -= n; b.data < 0 {
		return fmt.Errorf("the layers unpack to more than %d GiB: %w", maxData>>30, errdefs.ErrResourceExhausted)
	}
	return nil
}

// node is a name in the tree.
type node struct {
	parent *node
	kids   map[string]*node // nil unless a directory
	ino    *inode           // nil: a directory that only its children have told of so far; or a whiteout
	layer  int              // the topmost that has the name
	meta   int              // the layer that ino is from
	gone   bool             // a whiteout: lower layers do not have the name
	cut    int
}

func newDir(parent *node, layer int) *node {
	return &node{parent: parent, kids: map[string]*node{}, layer: layer, cut: noCut}
}

func (n *node) isLink() bool {
	return n.ino != nil && n.ino.real().mode&unix.S_IFMT == unix.S_IFLNK
}

// hide keeps what layers below the given one have beneath n out of the tree.
func (n *node) hide(layer int) { n.cut = min(n.cut, layer) }

// dir walks to a directory and makes what is missing on the way. It returns nil when an upper layer hides the place.
// A symbolic link of the same layer on the way is followed within the tree, as extracting the layer would do; one of a lower
// layer is not: the directory takes its name, as it does in overlayfs.
func (n *node) dir(path []string, layer int, left *budget) (*node, error) {
	root, links := n, 0
	for len(path) > 0 {
		name := path[0]
		path = path[1:]
		switch name {
		case "", ".":
			continue
		case "..": // only in targets of links
			if n.parent != nil {
				n = n.parent
			}
			continue
		}
		if n.cut < layer {
			return nil, nil
		}
		kid := n.kids[name]
		switch {
		case kid == nil:
			if err := left.spend(nodeCost + int64(len(name))); err != nil {
				return nil, err
			}
			kid = newDir(n, layer)
			n.kids[name] = kid
		case kid.kids != nil:
		case kid.layer < layer:
			return nil, nil
		case kid.gone:
			kid = newDir(n, layer)
			kid.cut = layer
			n.kids[name] = kid
		case kid.isLink():
			if links++; links > 40 {
				return nil, errors.New("too many levels of symbolic links above it")
			}
			target := kid.ino.real().target
			path = append(strings.Split(target, "/"), path...)
			if strings.HasPrefix(target, "/") {
				n = root
			}
			continue
		default:
			return nil, fmt.Errorf("%q above it is not a directory", name)
		}
		n = kid
	}
	if n.cut < layer {
		return nil, nil
	}
	return n, nil
}

// visible says whether an entry of the layer would show at that name, and notes that what is there replaces lower directories.
func (n *node) visible(name string, layer int, isDir bool) bool {
	old := n.kids[name]
	switch {
	case old == nil:
		return true
	case old.kids == nil:
		return old.layer == layer
	case isDir:
		return old.cut >= layer && (old.ino == nil || old.meta == layer)
	case old.layer == layer:
		return true
	}
	old.hide(layer)
	return false
}

// put sets what a visible name is.
func (n *node) put(name string, layer int, ino *inode) {
	old := n.kids[name]
	if !ino.isDir() {
		n.kids[name] = &node{parent: n, ino: ino, layer: layer, meta: layer}
		return
	}
	if old == nil || old.kids == nil {
		dir := newDir(n, layer)
		if old != nil && old.gone {
			dir.cut = layer
		}
		n.kids[name] = dir
		old = dir
	}
	old.ino, old.meta = ino, layer
}

// whiteout hides a name that lower layers may have.
func (n *node) whiteout(name string, layer int) {
	switch old := n.kids[name]; {
	case old == nil:
		n.kids[name] = &node{parent: n, layer: layer, gone: true}
	case old.kids != nil:
		old.hide(layer)
	}
}
