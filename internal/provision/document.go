package provision

import (
	"bytes"
	"fmt"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/ignition"
	"github.com/atollvm/atoll/internal/provision/userdata"
	"github.com/containerd/errdefs"
)

// kind is the language of a document.
type kind int

const (
	unknown   kind = iota
	script         // begins with #!
	cloudInit      // what cloud-init reads but scripts: cloud-config, multi-part, gzip, #include
	ignitionOrButane
)

// kindOf tells languages apart by how a document begins, as cloud-init does.
func kindOf(doc []byte) kind {
	begins := func(words ...string) bool {
		for _, w := range words {
			if len(doc) >= len(w) && bytes.EqualFold(doc[:len(w)], []byte(w)) {
				return true
			}
		}
		return false
	}
	switch {
	case begins("#!"):
		return script
	case begins("\x1f\x8b", "#cloud-config", "#include", "content-type:", "mime-version:", "#cloud-boothook", "#part-handler", "## template:", "#upstart-job"):
		return cloudInit
	case ignition.Is(doc):
		return ignitionOrButane
	}
	return unknown
}

func (r *Request) checkDocuments(f *faults) (warnings []string) {
	if len(r.UserData) > MaxDocument {
		f.add("user-data", "", "it has %d bytes, more than %d", len(r.UserData), MaxDocument)
	} else if r.UserData != nil {
		more, err := checkUserData(r.UserData)
		warnings = append(warnings, more...)
		f.wrap("user-data", err)
	}
	if len(r.Ignition) > MaxDocument {
		f.add("ignition", "", "it has %d bytes, more than %d", len(r.Ignition), MaxDocument)
	} else if r.Ignition != nil {
		more, err := ignition.Check(r.Ignition)
		warnings = append(warnings, more...)
		f.wrap("ignition", err)
	}
	if r.Ignition != nil && kindOf(r.UserData) == ignitionOrButane {
		f.add("user-data", "give one of the two", "it is an Ignition config, and there is another one")
	}
	return warnings
}

// KernelArgs are those that a document adds to the kernel's command line, as far as that can be told without the network.
func (r *Request) KernelArgs() (args []string) {
	for _, doc := range [][]byte{r.Ignition, r.UserData} {
		if kindOf(doc) == ignitionOrButane {
			args = append(args, ignition.KernelArgs(doc)...)
		}
	}
	return args
}

func checkUserData(doc []byte) ([]string, error) {
	switch kindOf(doc) {
	case script:
		if len(doc) > MaxScript {
			err := fmt.Errorf("a script has at most %d bytes, this one has %d: %w", MaxScript, len(doc), errdefs.ErrInvalidArgument)
			return nil, hint.With(err, "give what it carries with --file, and have the script use that")
		}
		return nil, nil
	case cloudInit:
		return userdata.Check(doc)
	case ignitionOrButane:
		return ignition.Check(doc)
	}
	first, _, _ := bytes.Cut(doc, []byte("\n"))
	err := fmt.Errorf("its first line %q is of no language that is known here: %w", short(string(first)), errdefs.ErrInvalidArgument)
	return nil, hint.With(err, "a script begins with #!/bin/sh, cloud-config with #cloud-config; Ignition is JSON with an object \"ignition\", Butane has a line variant:")
}
