// Command guestinit is the init of the boot test: it loads the initramfs's modules in the order of their names, says what the
// kernel then has, and resets the machine.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	defer unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	defer time.Sleep(100 * time.Millisecond) // nothing tells when the serial port has sent its last byte
	for _, m := range []struct{ dir, kind string }{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			fmt.Println("mounting", m.dir, err)
		}
	}
	files, _ := filepath.Glob("/lib/modules/atoll/*.ko")
	began := time.Now()
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			fmt.Println("opening", path, err)
			continue
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			fmt.Println("FAILED", path, err)
		}
		f.Close()
	}
	var up unix.Sysinfo_t
	unix.Sysinfo(&up)
	fmt.Println("loaded in", time.Since(began), "uptime", up.Uptime)
	modules, _ := os.ReadFile("/proc/modules")
	filesystems, _ := os.ReadFile("/proc/filesystems")
	fmt.Printf("MODULES\n%s\nFILESYSTEMS\n%s\n", modules, filesystems)
	devices, _ := filepath.Glob("/sys/bus/virtio/drivers/*/virtio*")
	fmt.Println("DEVICES", devices)
	onDemand, _ := filepath.Glob("/lib/modules/atoll/*/*.ko")
	fmt.Println("ON DEMAND", onDemand)
	fmt.Println("DONE")
}
