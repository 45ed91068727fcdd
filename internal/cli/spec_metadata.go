package cli

import (
	"errors"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// metadataValue is the flag for the metadata service.
type metadataValue struct{ to **atollv1.Metadata }

func (metadataValue) Type() string { return "off|v2|v1" }

func (v metadataValue) String() string {
	switch {
	case v.to == nil || *v.to == nil:
		return ""
	case (*v.to).GetDisabled():
		return "off"
	case (*v.to).GetV1():
		return "v1"
	}
	return "v2"
}

func (v metadataValue) Set(s string) error {
	switch s {
	case "off", "v2", "v1":
		*v.to = &atollv1.Metadata{Disabled: s == "off", V1: s == "v1"}
		return nil
	}
	return errors.New("want off, v2 or v1")
}
