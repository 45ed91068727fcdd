package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/vmm"
)

// variablesFile keeps what a guest's UEFI remembers, such as its boot entries. It stays as long as the instance's directory.
const variablesFile = "uefi-vars.fd"

// uefi is a build of EDK II: its code, shared by all instances, and the variables that an instance begins with.
type uefi struct{ code, variables string }

// builds are where distributions keep EDK II without Secure Boot: Debian and Ubuntu, Fedora and Red Hat, Arch.
func builds(arch string) []uefi {
	if arch == "arm64" {
		return []uefi{
			{"/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"},
			{"/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"},
			{"/usr/share/edk2/aarch64/QEMU_CODE.fd", "/usr/share/edk2/aarch64/QEMU_VARS.fd"},
		}
	}
	return []uefi{
		{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
		{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
		{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
		{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
	}
}

// FindUEFI returns the path of this host's UEFI firmware.
func FindUEFI() (string, error) {
	u, err := findUEFI(arch)
	return u.code, err
}

func findUEFI(arch string) (uefi, error) {
	for _, u := range builds(arch) {
		_, noCode := os.Stat(u.code)
		_, noVariables := os.Stat(u.variables)
		if noCode == nil && noVariables == nil {
			return u, nil
		}
	}
	name := "ovmf"
	if arch == "arm64" {
		name = "qemu-efi-aarch64"
	}
	return uefi{}, hint.With(fmt.Errorf("finding UEFI firmware: %s is not there, nor where other distributions have it: %w", builds(arch)[0].code, errdefs.ErrNotFound),
		"install it: sudo apt install %s", name)
}

// makeVariables gives an instance its variables, unless it has them from an earlier start.
func (u uefi) makeVariables(dir string) error {
	path := filepath.Join(dir, variablesFile)
	from, err := os.Open(u.variables)
	if err != nil {
		return fmt.Errorf("reading the firmware's variables: %w", err)
	}
	defer from.Close()
	template, err := from.Stat()
	if err != nil {
		return fmt.Errorf("reading the firmware's variables: %w", err)
	}
	if have, err := os.Stat(path); err == nil && have.Size() == template.Size() {
		return nil // of another size they would not fit the code: another build's, or cut short
	}
	to, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("keeping the firmware's variables: %w", err)
	}
	_, err = io.Copy(to, from)
	if err == nil {
		err = to.Sync() // a name for what a power cut may leave without its content is worse than none
	}
	if err := errors.Join(err, to.Close()); err != nil {
		return fmt.Errorf("keeping the firmware's variables: %w", err)
	}
	return os.Rename(path+".new", path)
}

func firmwareMachine(spec vmm.Spec, h host) string {
	name := "q35,graphics=off,vmport=off" // without graphics SeaBIOS, and boot loaders through it, speak on the serial port
	if h.arch == "arm64" {
		name = "virt,gic-version=max"
	}
	if spec.Firmware.Kind == vmm.UEFI {
		name += ",pflash0=uefi-code,pflash1=uefi-variables"
	}
	return name
}

// firmwareArguments are those of a machine that boots from its disk.
func firmwareArguments(spec vmm.Spec, h host) []string {
	f := spec.Firmware
	var args []string
	if f.UUID != "" {
		args = append(args, "-uuid", f.UUID)
	}
	system := []string{"type=1", "manufacturer=Atoll", "product=Atoll machine"}
	if f.Serial != "" {
		system = append(system, "serial="+escape(f.Serial))
	}
	args = append(args, "-smbios", strings.Join(system, ","))
	if f.Kind == vmm.UEFI {
		args = append(args,
			"-blockdev", "driver=raw,node-name=uefi-code,read-only=on,file.driver=file,file.locking=off,file.filename="+escape(h.uefi.code),
			"-blockdev", "driver=raw,node-name=uefi-variables,file.driver=file,file.filename="+escape(filepath.Join(spec.Dir, variablesFile)))
	}
	panics := "pvpanic"
	if h.arch == "arm64" {
		panics = "pvpanic-pci"
	}
	return append(args, "-device", panics)
}
