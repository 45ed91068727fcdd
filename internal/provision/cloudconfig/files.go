package cloudconfig

import (
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"io"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/provision/form"
)

// mostFiles bounds what all files have, unpacked.
const mostFiles = 64 << 20

// file is one of write_files.
type file struct {
	*agentv1.File
	data   []byte
	append bool
}

func readFiles(s *settings, it item) {
	total := 0
	for _, e := range it.items() {
		f := file{File: &agentv1.File{Node: &agentv1.Node{Overwrite: proto.Bool(true), Mode: proto.Uint32(0o644)}}}
		n := f.GetNode()
		var encoding, content item
		e.fields(map[string]func(item){
			"path":        func(it item) { n.Path = it.absolute() },
			"content":     func(it item) { content = it },
			"encoding":    func(it item) { encoding = it },
			"owner":       func(it item) { n.User, n.Group = owners(it) },
			"permissions": func(it item) { n.Mode = proto.Uint32(it.mode()) },
			"append":      func(it item) { f.append = it.bool() },
			"defer":       func(it item) { f.Defer = it.bool() },
		}, "source")
		if n.GetPath() == "" {
			e.fault("a file without a path")
		}
		f.data = contents(content, encoding, mostFiles-total)
		if total += len(f.data); total > mostFiles {
			e.fault("all files have more than %d bytes", mostFiles)
			return
		}
		if f.append {
			n.Overwrite = nil
		}
		if n.GetUser() == nil {
			n.User, n.Group = &agentv1.Owner{Id: proto.Uint32(0)}, &agentv1.Owner{Id: proto.Uint32(0)}
		}
		s.files = append(s.files, f)
	}
}

// contents undoes an encoding; no more than most bytes and one come out.
func contents(content, encoding item, most int) []byte {
	if content.node == nil || content.isNull() {
		return nil
	}
	n := content.value()
	data := []byte(n.Value)
	if n.ShortTag() == "!!binary" {
		data = fromBase64(content, n.Value)
	} else if !plain(n) || !content.isBool() {
		content.text() // only for its faults
	} else {
		content.fault("%s is a boolean in YAML: put it in quotes", n.Value)
	}
	if encoding.node == nil {
		return data
	}
	switch strings.ToLower(encoding.text()) {
	case "text/plain":
		return data
	case "b64", "base64":
		return fromBase64(content, string(data))
	case "gz", "gzip":
		return fromGzip(content, data, most)
	case "gz+b64", "gz+base64", "gzip+b64", "gzip+base64":
		return fromGzip(content, fromBase64(content, string(data)), most)
	}
	encoding.fault("want text/plain, b64, gzip or gz+b64")
	return nil
}

func fromBase64(it item, text string) []byte {
	text = strings.Join(strings.Fields(text), "")
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		it.fault("it is not base64")
	}
	return data
}

func fromGzip(it item, data []byte, most int) []byte {
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err == nil {
		data, err = io.ReadAll(io.LimitReader(z, int64(most)+1))
	}
	if err != nil {
		it.fault("it is not gzip")
		return nil
	}
	return data
}

// owners reads USER:GROUP. A group that is not given is the one with the user's name, or number.
func owners(it item) (user, group *agentv1.Owner) {
	u, g, both := strings.Cut(it.text(), ":")
	if !both {
		g = u
	}
	owner := func(name string) *agentv1.Owner {
		if n, err := strconv.ParseUint(name, 10, 32); err == nil {
			return &agentv1.Owner{Id: proto.Uint32(uint32(n))}
		}
		if !form.User(name) {
			it.fault("want USER:GROUP")
		}
		return &agentv1.Owner{Name: name}
	}
	return owner(u), owner(g)
}

func isCertificate(text string) bool {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return false
	}
	_, err := x509.ParseCertificate(block.Bytes)
	return err == nil
}
