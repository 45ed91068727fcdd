package cli

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// logOption is the flag --log-opt, with the options of Docker's json-file driver that bound a log.
type logOption struct{ spec *atollv1.MachineSpec }

func (l logOption) String() string { return "" }
func (l logOption) Type() string   { return "KEY=VALUE" }

func (l logOption) Set(s string) error {
	key, value, _ := strings.Cut(s, "=")
	switch key {
	case "max-size":
		n, err := units.RAMInBytes(value)
		if err == nil && n <= 0 {
			err = errors.New("want more than 0")
		}
		l.spec.LogMaxBytes = n
		return err
	case "max-file":
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil || n == 0 {
			return errors.New("want a number from 1 on")
		}
		l.spec.LogMaxFiles = uint32(n)
		return nil
	}
	return fmt.Errorf("unknown option %q: want max-size or max-file", key)
}
