// Command atoll-agent is PID 1 of every guest: /init of the initramfs that Atoll makes.
package main

import (
	"os"
	"runtime"

	"github.com/atollvm/atoll/internal/agent/guest"
)

var version = "dev" // set by the linker

// The main thread does nothing but wait: a goroutine that takes its thread into a container and ends it must not get this one.
func init() { runtime.LockOSThread() }

func main() {
	if os.Args[0] == guest.BesideName {
		println("atoll-agent: " + guest.Beside(version, os.Args).Error())
		os.Exit(1)
	}
	if module, ok := guest.IsModprobe(os.Args); ok && os.Getpid() != 1 {
		if err := guest.Modprobe(module); err != nil {
			println("loading module " + module + ": " + err.Error())
			os.Exit(1) // the kernel says what it could not do
		}
		return
	}
	if os.Getpid() != 1 {
		println("atoll-agent: this is the init of Atoll's guests and runs nowhere else")
		os.Exit(2)
	}
	failed := make(chan error)
	go func() { failed <- guest.Run(version) }()
	// PID 1 must not return: the kernel panics, which ends the machine with these words on its console.
	panic(<-failed)
}
