//go:build linux

package daemon

import (
	"context"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/kernel"
	"github.com/atollvm/atoll/internal/server"
	"github.com/atollvm/atoll/internal/vmm/qemu"
	"github.com/docker/go-units"
)

const lowDisk = 2 << 30

// doctor looks at what this host lacks, with the command that mends it.
func (s *system) doctor(ctx context.Context, c Config) []server.Check {
	return []server.Check{
		s.checkVMM(ctx),
		checkTool("runc", "runs the RUN steps of atoll build", "apt install runc, or build with --isolation vm"),
		checkVirtiofsd(),
		checkUEFI(),
		checkTool("git", "fetches build contexts from git repositories", "apt install git"),
		checkTool("mmdebstrap", "makes Debian base images", "apt install mmdebstrap"),
		s.checkKernel(),
		checkKernelBuild(ctx),
		checkDisk(c.Home),
		s.checkBoot(ctx),
	}
}

func (s *system) checkVMM(ctx context.Context) server.Check {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	caps, err := s.qemu.Probe(ctx)
	switch {
	case err != nil:
		return server.Check{Name: "qemu, kvm", Level: server.Fail, Message: err.Error(), Hint: hint.Of(err)}
	case caps.Warning != "":
		return server.Check{Name: "qemu, kvm", Level: server.Warn, Message: fmt.Sprintf("QEMU %s, %s: %s", caps.Version, caps.Accelerator, caps.Warning), Hint: caps.Hint}
	default:
		return server.Check{Name: "qemu, kvm", Level: server.OK, Message: fmt.Sprintf("QEMU %s runs guests with %s", caps.Version, caps.Accelerator)}
	}
}

func checkTool(name, use, install string) server.Check {
	path, err := exec.LookPath(name)
	if err != nil {
		return server.Check{Name: name, Level: server.Warn, Message: "not found; it " + use, Hint: install}
	}
	return server.Check{Name: name, Level: server.OK, Message: path}
}

func checkVirtiofsd() server.Check {
	path, err := qemu.FindVirtiofsd()
	if err != nil {
		return server.Check{Name: "virtiofsd", Level: server.Warn, Message: "not found; atoll build --isolation vm needs it", Hint: hint.Of(err)}
	}
	return server.Check{Name: "virtiofsd", Level: server.OK, Message: path}
}

func checkUEFI() server.Check {
	path, err := qemu.FindUEFI()
	if err != nil {
		return server.Check{Name: "uefi", Level: server.Warn, Message: "not found; atoll run --disk FILE --firmware uefi needs it", Hint: hint.Of(err)}
	}
	return server.Check{Name: "uefi", Level: server.OK, Message: path}
}

func (s *system) checkKernel() server.Check {
	k, err := s.kernels.Get("")
	if err != nil {
		return server.Check{Name: "kernel", Level: server.Warn, Message: "no kernel yet; the first run gets one", Hint: "atoll kernel pull"}
	}
	return server.Check{Name: "kernel", Level: server.OK, Message: k.Name}
}

func checkKernelBuild(ctx context.Context) server.Check {
	const name = "kernel build"
	if missing, install := kernel.MissingBuildTools(ctx, runtime.GOARCH, runtime.GOARCH); len(missing) > 0 {
		return server.Check{Name: name, Level: server.Warn, Message: strings.Join(missing, ", ") + ": not found; atoll kernel build uses them", Hint: install}
	}
	return server.Check{Name: name, Level: server.OK, Message: "all tools are there"}
}

func checkDisk(home string) server.Check {
	var st syscall.Statfs_t
	if err := syscall.Statfs(home, &st); err != nil {
		return server.Check{Name: "disk", Level: server.Fail, Message: fmt.Sprintf("%s: %v", home, err)}
	}
	free := int64(st.Bavail) * st.Bsize
	check := server.Check{Name: "disk", Level: server.OK, Message: fmt.Sprintf("%s has %s free", home, units.BytesSize(float64(free)))}
	if free < lowDisk {
		check.Level, check.Hint = server.Warn, "remove images that are not needed: atoll rmi IMAGE; or choose another ATOLL_HOME"
	}
	return check
}

// checkBoot: the initramfs can be made, which needs the agent inside this binary.
func (s *system) checkBoot(ctx context.Context) server.Check {
	if _, err := s.kernels.Get(""); err != nil {
		return server.Check{Name: "initramfs", Level: server.OK, Message: "made with the first kernel"}
	}
	if _, _, err := (&kernelsOf{s}).Boot(ctx, ""); err != nil {
		return server.Check{Name: "initramfs", Level: server.Fail, Message: err.Error(), Hint: hint.Of(err)}
	}
	return server.Check{Name: "initramfs", Level: server.OK, Message: "ready"}
}
