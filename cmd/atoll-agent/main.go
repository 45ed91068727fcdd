// Command atoll-agent is PID 1 of every guest: /init of the initramfs that Atoll makes.
package main

import (
	"os"

	"github.com/atollvm/atoll/internal/agent/guest"
)

var version = "dev" // set by the linker

func main() {
	if os.Args[0] == guest.BesideName {
		println("atoll-agent: " + guest.Beside(version).Error())
		os.Exit(1)
	}
	if os.Getpid() != 1 {
		println("atoll-agent: this is the init of Atoll's guests and runs nowhere else")
		os.Exit(2)
	}
	// PID 1 must not return: the kernel panics, which ends the machine with these words on its console.
	panic(guest.Run(version))
}
