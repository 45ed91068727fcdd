package cli

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// addDiskFlags adds the flags of machines that boot a disk image.
func addDiskFlags(cmd *cobra.Command, spec *atollv1.MachineSpec) {
	f := cmd.Flags()
	f.StringVar(&spec.Disk, "disk", "", "boot this disk image, a qcow2 or raw `FILE` of the daemon's host, instead\nof an image; it is not written to")
	f.StringVar(&spec.Firmware, "firmware", "", "with --disk, what boots it: bios or uefi (default bios; uefi on arm64)")
	complete(cmd, "firmware", "bios", "uefi")
	if err := cmd.MarkFlagFilename("disk", "qcow2", "img", "raw"); err != nil {
		panic(err) // the flag is not there
	}
}

// bootArgs holds that a machine boots one thing: an image, which may have a command, or a disk image.
func bootArgs(cmd *cobra.Command, args []string) error {
	disk := cmd.Flags().Changed("disk")
	switch {
	case disk && len(args) > 0:
		return fmt.Errorf("with --disk there is no image and no command, but there is %q", args[0])
	case !disk && len(args) == 0:
		return cobra.MinimumNArgs(1)(cmd, args)
	}
	return nil
}

func resolveDisk(spec *atollv1.MachineSpec) error {
	if spec.Disk == "" {
		return nil
	}
	path, err := filepath.Abs(spec.Disk)
	if err != nil {
		return fmt.Errorf("--disk %s: %w", spec.Disk, err)
	}
	spec.Disk = path
	return nil
}
