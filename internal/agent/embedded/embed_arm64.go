package embedded

import "embed"

//go:embed all:bin/arm64
var files embed.FS

const (
	builtFor = "arm64"
	dir      = "bin/arm64/"
)
