package embedded

import "embed"

//go:embed all:bin/amd64
var files embed.FS

const (
	builtFor = "amd64"
	dir      = "bin/amd64/"
)
