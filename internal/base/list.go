package base

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/atollvm/atoll/internal/debian"
	"github.com/atollvm/atoll/internal/hint"
)

// List returns the images that Build knows.
func List() []Base {
	var all []Base
	for _, r := range []struct{ version, codename string }{{"12", "bookworm"}, {"13", "trixie"}} {
		title := "Debian " + r.version
		b := Base{family: apt{debian.Debian()}, release: r.codename}
		all = append(all, b.named("debian", r.codename, r.version, "", title+", minimal"))
		s, i := b, b
		s.slim, i.init = true, true
		all = append(all, s.named("debian", r.codename, r.version, "-slim", title+", minimal, without documentation"),
			i.named("debian", r.codename, r.version, "-systemd", title+" that boots systemd"))
	}
	for _, r := range []struct{ version, codename string }{{"20.04", "focal"}, {"22.04", "jammy"}, {"24.04", "noble"}} {
		title := "Ubuntu " + r.version
		b := Base{family: apt{debian.Ubuntu(runtime.GOARCH)}, release: r.codename}
		i := b
		i.init = true
		all = append(all, b.named("ubuntu", r.codename, r.version, "", title+", minimal"), i.named("ubuntu", r.codename, r.version, "-systemd", title+" that boots systemd"))
	}
	for _, version := range []string{"3.21", "3.22"} {
		b := Base{family: alpine{}, release: "v" + version}
		i := b
		i.init = true
		all = append(all, b.named("alpine", version, "", "", "Alpine "+version), i.named("alpine", version, "", "-openrc", "Alpine "+version+" that boots OpenRC"))
	}
	for _, version := range []string{"8", "9", "10"} {
		b := Base{family: ubi{}, release: version}
		i := b
		i.init = true
		all = append(all, b.named("ubi", version, "", "", "Red Hat UBI "+version+", from Red Hat's registry"),
			i.named("ubi", version, "", "-systemd", "Red Hat UBI "+version+" that boots systemd, from Red Hat's registry"))
	}
	return append(all, Base{Name: "busybox", Aliases: []string{"busybox:latest"}, Description: "Busybox of Debian 12, one static program", family: busybox{}, release: "bookworm"})
}

// named completes a base: name:tag+suffix, also known by other+suffix.
func (b Base) named(name, tag, other, suffix, description string) Base {
	b.Name, b.Description = name+":"+tag+suffix, description
	if other != "" {
		b.Aliases = []string{name + ":" + other + suffix}
	}
	return b
}

// Find returns the base with that name or alias, or errdefs.ErrNotFound.
func Find(name string) (Base, error) {
	var known []string
	for _, b := range List() {
		for _, n := range append([]string{b.Name}, b.Aliases...) {
			if n == name {
				return b, nil
			}
		}
		known = append(known, b.Name)
	}
	return Base{}, hint.With(fmt.Errorf("base %q: %w", name, errdefs.ErrNotFound), "the bases are: %s", strings.Join(known, " "))
}
