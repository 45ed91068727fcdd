package qemu

const (
	arch        = "amd64"
	binaryName  = "qemu-system-x86_64"
	packageName = "qemu-system-x86"
)
