package process

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// DefaultPath is where programs are looked for when an environment does not say.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Error is a process that could not be started through its caller's fault.
type Error struct {
	Class   agentv1.FailureClass
	Message string
}

func (e *Error) Error() string { return e.Message }

func invalid(message string) error {
	return &Error{agentv1.FailureClass_FAILURE_CLASS_INVALID, message}
}

// reason is an error without the operation and path, which the caller says.
func reason(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// withDefaults adds HOME and PATH where the environment has none.
func withDefaults(env []string, home string) []string {
	env = env[:len(env):len(env)]
	if _, ok := lookUpEnv(env, "PATH"); !ok {
		env = append(env, "PATH="+DefaultPath)
	}
	if v, _ := lookUpEnv(env, "HOME"); v == "" {
		env = append(env, "HOME="+home)
	}
	return env
}

func lookUpEnv(env []string, key string) (value string, ok bool) {
	for _, e := range env {
		if k, v, _ := strings.Cut(e, "="); k == key {
			value, ok = v, true
		}
	}
	return value, ok
}

// lookUpCommand finds argv[0] as a shell would: a name with a slash is a path, else PATH is searched.
func lookUpCommand(name string, env []string, dir string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name, name, dir)
	}
	path, _ := lookUpEnv(env, "PATH")
	failure := error(&Error{agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND, "exec: " + strconv.Quote(name) + ": executable file not found in $PATH"})
	for _, d := range filepath.SplitList(path) {
		if d == "" {
			d = "."
		}
		file := filepath.Join(d, name)
		if !strings.Contains(file, "/") {
			file = "./" + file
		}
		err := executable(name, file, dir)
		if err == nil {
			return file, nil
		}
		// A file that is there and cannot be executed is worth more words than "not found".
		var e *Error
		if errors.As(err, &e) && e.Class == agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE {
			failure = err
		}
	}
	return "", failure
}

func executable(name, file, dir string) error {
	if !filepath.IsAbs(file) {
		file = filepath.Join(dir, file)
	}
	class, why := agentv1.FailureClass_FAILURE_CLASS_NOT_EXECUTABLE, ""
	st, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		class, why = agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND, "no such file or directory"
	case err != nil:
		why = reason(err)
	case st.IsDir():
		why = "is a directory"
	case st.Mode()&0o111 == 0:
		why = "permission denied"
	default:
		return nil
	}
	return &Error{class, "exec: " + strconv.Quote(name) + ": " + why}
}
