// Package rootdisk turns image layers into read-only root disks (EROFS files, each of neighbouring layers and with its dm-verity hash
// tree), which images share and all machines of an image too, and formats the scratch disk (ext4) that a machine writes to.
// It knows nothing of references, registries or machines: layers come in as readers, disks go out as files. Nothing of an image
// is ever unpacked on the host; the tree lives in memory and file contents go straight into the disk.
// Imported by machine, build and daemon. A Store may be used from several goroutines and several processes.
package rootdisk
