package qemu

const (
	arch        = "arm64"
	binaryName  = "qemu-system-aarch64"
	packageName = "qemu-system-arm"
)
