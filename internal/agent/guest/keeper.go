package guest

import (
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"golang.org/x/sys/unix"
)

// keepPause is between a death of the agent beside init and its next life; it doubles while that lives no longer than keepSteady.
const (
	keepPause  = 50 * time.Millisecond
	keepMost   = 5 * time.Second
	keepSteady = 10 * time.Second
)

// keep starts the agent beside init, and again whenever it dies: where PID 1 is the image's, root of the guest can kill it. Only who kills
// the keeper too is rid of both; the host sees that the port is closed, and says so.
func keep(c *agentv1.Config) error {
	ignoreEnd()
	// For want of memory the kernel is to kill others. What the agent starts is put back.
	os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	closeOnExec(true)
	pause := keepPause
	for life := 1; ; life++ {
		began := time.Now()
		pid, err := startBeside(c, life)
		if err != nil {
			return err
		}
		if life == 1 {
			unix.Close(fdPort)
		}
		for {
			var status unix.WaitStatus
			if _, err := unix.Wait4(pid, &status, 0, nil); err != unix.EINTR {
				break
			}
		}
		console("the agent beside the image's init was ended; it starts again")
		if time.Since(began) > keepSteady {
			pause = keepPause
		}
		time.Sleep(pause)
		pause = min(2*pause, keepMost)
	}
}

// startBeside starts a life of the agent beside init, with the files that prepareInit gave the keeper.
func startBeside(c *agentv1.Config, life int) (pid int, err error) {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer ours.Close()
	defer theirs.Close()
	files := []uintptr{0, 1, 2, fdHandOver: theirs.Fd(), fdMaster: fdMaster, fdSlave: fdSlave}
	var st unix.Stat_t
	if life == 1 && unix.Fstat(fdPort, &st) == nil {
		files = append(files, fdPort)
	}
	attr := &syscall.ProcAttr{Dir: "/", Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	if pid, err = syscall.ForkExec("/proc/self/exe", []string{BesideName, strconv.Itoa(life)}, attr); err != nil {
		return 0, err
	}
	return pid, transport.WriteMsg(ours, c)
}

// ignoreEnd: whoever ends all processes, as sysvinit and busybox do on their way down, means the others first. Caught, not ignored: children
// would inherit that.
func ignoreEnd() {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE, syscall.SIGALRM)
}

// closeOnExec keeps what was handed over from further processes. Where there was no port, its number is another file's by now.
func closeOnExec(port bool) {
	unix.CloseOnExec(fdMaster)
	unix.CloseOnExec(fdSlave)
	if port {
		unix.CloseOnExec(fdPort)
	}
}

// spareFromSendsigs keeps Debian's sendsigs, which ends all processes for sysvinit, OpenRC and runit, from waiting ten seconds for the agent,
// and from ending it before it has told the host.
func spareFromSendsigs() {
	const dir = "/run/sendsigs.omit.d"
	if _, err := os.Stat("/etc/init.d/sendsigs"); err != nil {
		return
	}
	if os.MkdirAll(dir, 0o755) == nil {
		_ = os.WriteFile(dir+"/atoll-agent", []byte(strconv.Itoa(os.Getppid())+"\n"+strconv.Itoa(os.Getpid())+"\n"), 0o644)
	}
}
