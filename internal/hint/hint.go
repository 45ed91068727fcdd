// Package hint carries a person's next step along with an error, as data. A leaf: every room may import it; only cli/ui prints it.
package hint

import (
	"errors"
	"fmt"
)

type hinted struct {
	error
	text string
}

func (h *hinted) Unwrap() error { return h.error }

// With adds the next step to err. A nil err stays nil.
func With(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hinted{err, fmt.Sprintf(format, args...)}
}

// Of returns the outermost hint in err's chain, or "".
func Of(err error) string {
	var h *hinted
	if errors.As(err, &h) {
		return h.text
	}
	return ""
}
