package machine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
)

// Who is PID 1 of the guest.
const (
	InitAuto  = "auto"  // the image's init where that is what the machine runs, else the agent
	InitAgent = "agent" // the agent, which runs the entrypoint as its child
	InitImage = "image" // the image's own init, with the agent beside it
)

// DefaultInitStopTimeout is for machines whose PID 1 is an init: it has services to stop.
const DefaultInitStopTimeout = 90 * time.Second

// initModules names those modules of a kernel that an init has use for. One that lacks them boots without.
const initModules = "init"

// defaultInit is what InitImage runs in an image that runs something else by itself.
const defaultInit = "/sbin/init"

// inits are the programs that expect to be PID 1 of a whole system. Not /init of s6-overlay, which ends when its service does: as PID 1
// of a machine that is a kernel panic.
func isInit(program string) bool {
	switch program {
	case "/sbin/init", "/usr/sbin/init", "/bin/init", "/usr/bin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/bin/systemd", "/usr/bin/systemd",
		"/sbin/openrc-init", "/usr/sbin/openrc-init", "/sbin/runit-init", "/usr/sbin/runit-init":
		return true
	}
	return false
}

// imageInit says whether PID 1 is the image's init.
func (m *Machine) imageInit() bool { return imageInit(m.Spec, m.Image) }

func imageInit(s Spec, img Image) bool {
	switch s.Init {
	case InitImage:
		return true
	case InitAgent:
		return false
	}
	words, err := argv(s, img)
	return err == nil && isInit(words[0])
}

// initArgv is what InitImage makes of the entrypoint's words: what the user did not choose gives way to the image's init.
func initArgv(s Spec, words []string) []string {
	if s.Init != InitImage || s.SetEntrypoint || len(s.Command) > 0 || len(words) > 0 && isInit(words[0]) {
		return words
	}
	return []string{defaultInit}
}

// checkInit refuses what an init cannot be.
func checkInit(s Spec, img Image) error {
	if !imageInit(s, img) {
		return nil
	}
	if u := cmp.Or(s.User, img.User); !slices.Contains([]string{"", "0", "root", "0:0", "root:root", "root:0", "0:root"}, u) {
		return hint.With(fmt.Errorf("user %q: the image's init must be root: %w", u, errdefs.ErrInvalidArgument),
			"leave out --user, or give --init agent to run the image's command as that user")
	}
	return nil
}

// initEnvironment takes out what would have an init believe that it is in a container (systemd's CONTAINER_INTERFACE; Red Hat's images
// set it), and keeps colours out of logs.
func initEnvironment(env []string, tty bool) []string {
	env = slices.DeleteFunc(env, func(e string) bool { return strings.HasPrefix(e, "container=") })
	if !tty && !slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
		env = append(env, "TERM=dumb", "SYSTEMD_COLORS=0")
	}
	return env
}

// goingDown says whether a signal, such as that of a Ctrl-C of somebody attached, asks a whole system to end: an init takes INT for a
// reboot and TERM for something else again. As a number it reaches the init.
func goingDown(signal string) bool {
	return slices.Contains([]string{"INT", "TERM", "QUIT", "HUP"}, signal)
}
