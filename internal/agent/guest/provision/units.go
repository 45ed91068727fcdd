package provision

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

const (
	unitDir = "/etc/systemd/system"
	// presetFile is Ignition's. systemd itself reads presets at a machine's first boot only, which ours never look like to it: machine-id is
	// there already. So the links are made here too.
	presetFile = "/etc/systemd/system-preset/20-ignition.preset"
	maxUnit    = 1 << 20
)

// unitDirs are where units are, the first that has one counts.
var unitDirs = []string{unitDir, "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// unitTypes are the ends of units' names.
var unitTypes = []string{".service", ".socket", ".device", ".mount", ".automount", ".swap", ".target", ".path", ".timer", ".slice", ".scope"}

func isUnitName(name string) bool {
	prefix, instance, _ := strings.Cut(strings.TrimSuffix(name, path.Ext(name)), "@")
	return len(name) <= 255 && slices.Contains(unitTypes, path.Ext(name)) && prefix != "" && only(prefix, `:_.\-`) && only(instance, `:_.\-`)
}

// units writes, masks and enables systemd units.
func (r *Provisioner) units() error {
	if r.root.exists("/usr/lib/systemd/systemd") || r.root.exists("/lib/systemd/systemd") {
		for _, u := range r.GetUnits() {
			if err := r.unit(u); err != nil {
				return element("systemd unit", u.GetName(), err)
			}
		}
		if err := r.writePresets(); err != nil {
			return fmt.Errorf("systemd units: %w", err)
		}
		return r.enableUnits()
	}
	return element("systemd unit", r.GetUnits()[0].GetName(), errors.New("the image has no systemd (systemd.units needs one)"))
}

func (r *Provisioner) unit(u *agentv1.Unit) error {
	if !isUnitName(u.GetName()) {
		return errors.New("not a name of a unit")
	}
	for _, d := range u.GetDropIns() {
		if d.GetName() != path.Base(d.GetName()) || !strings.HasSuffix(d.GetName(), ".conf") || strings.ContainsRune(d.GetName(), 0) {
			return fmt.Errorf("drop-in %q: not a name of a file that ends in .conf", d.GetName())
		}
		if err := r.root.put(path.Join(unitDir, u.GetName()+".d", d.GetName()), d.GetContents(), 0o644); err != nil {
			return fmt.Errorf("drop-in %q: %w", d.GetName(), err)
		}
	}
	file := path.Join(unitDir, u.GetName())
	if len(u.GetContents()) > 0 { // an empty one would hide the image's
		if err := r.root.put(file, u.GetContents(), 0o644); err != nil {
			return err
		}
	}
	if u.Masked == nil {
		return nil
	}
	if u.GetMasked() {
		return r.root.link(file, "/dev/null")
	}
	if r.root.readlink(file) == "/dev/null" {
		return r.root.remove(file)
	}
	return nil
}

// writePresets says in systemd's own words what is enabled, so that its tools agree.
func (r *Provisioner) writePresets() error {
	presets := map[string][]string{} // "enable echo@.service" → instances
	said := map[string]bool{}
	for _, u := range r.GetUnits() {
		if u.Enabled == nil {
			continue
		}
		template, instance := splitInstance(u.GetName())
		verb := "disable "
		if u.GetEnabled() {
			verb = "enable "
		}
		said[template] = true
		if presets[verb+template] = append(presets[verb+template], instance); instance == "" {
			presets[verb+template] = slices.DeleteFunc(presets[verb+template], func(i string) bool { return i == "" })
		}
	}
	if len(presets) == 0 {
		return nil
	}
	var lines []string
	for line, instances := range presets {
		lines = append(lines, strings.TrimSpace(line+" "+strings.Join(slices.Compact(instances), " ")))
	}
	// Sorted by the units, as Ignition has them.
	slices.SortFunc(lines, func(a, b string) int {
		_, a, _ = strings.Cut(a, " ")
		_, b, _ = strings.Cut(b, " ")
		return strings.Compare(a, b)
	})
	old, _, err := r.root.read(presetFile, maxUnit)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for line := range strings.Lines(string(old)) {
		if f := strings.Fields(line); len(f) > 1 && !said[f[1]] {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return r.root.put(presetFile, []byte(strings.Join(lines, "\n")+"\n"), 0o644)
}

// splitInstance takes echo@a.service apart into echo@.service and a.
func splitInstance(name string) (template, instance string) {
	prefix, rest, ok := strings.Cut(name, "@")
	if !ok {
		return name, ""
	}
	dot := strings.LastIndex(rest, ".")
	return prefix + "@" + rest[dot:], rest[:dot]
}

// enableUnits makes and removes the links that [Install] asks for, as systemctl enable and disable do. A unit that is not there may come
// with the packages: then it is tried once more.
func (r *Provisioner) enableUnits() error {
	missing := false
	for _, u := range r.GetUnits() {
		if u.Enabled == nil {
			continue
		}
		do := r.enableUnit
		if !u.GetEnabled() {
			do = r.disableUnit
		}
		found, err := do(u.GetName(), map[string]bool{})
		if err != nil {
			return element("systemd unit", u.GetName(), err)
		}
		missing = missing || !found
		if !found && u.GetEnabled() && !r.late {
			r.say("systemd unit %q: there is no such unit in the image", u.GetName())
		}
	}
	if missing && !r.late && r.wantsPackages() {
		r.again = append(r.again, part{"units", true, r.enableUnits})
	}
	return nil
}

// install is the [Install] section of a unit.
type install struct {
	wantedBy, requiredBy, upheldBy, alias, also []string
	instance                                    string
}

// readInstall reads a unit's section with those of its drop-ins. No file: there is no such unit.
func (r *Provisioner) readInstall(name string) (file string, in install, err error) {
	template, _ := splitInstance(name)
	for _, name := range slices.Compact([]string{name, template}) {
		for _, dir := range unitDirs {
			data, _, err := r.root.read(path.Join(dir, name), maxUnit)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return path.Join(dir, name), in, err // masked: it is no regular file
			}
			in.parse(string(data))
			file = path.Join(dir, name)
			break
		}
		if file != "" {
			break
		}
	}
	if file == "" {
		return "", in, nil
	}
	for _, name := range slices.Compact([]string{template, name}) {
		for _, dir := range slices.Backward(unitDirs) {
			names, err := r.root.list(path.Join(dir, name+".d"))
			if err != nil {
				return file, in, err
			}
			slices.Sort(names)
			for _, n := range names {
				if !strings.HasSuffix(n, ".conf") {
					continue
				}
				if data, _, err := r.root.read(path.Join(dir, name+".d", n), maxUnit); err == nil {
					in.parse(string(data))
				}
			}
		}
	}
	return file, in, nil
}

// parse adds what a file says in [Install]. An empty value forgets what was said before.
func (in *install) parse(text string) {
	text = strings.ReplaceAll(text, "\\\n", " ")
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
		}
		key, value, ok := strings.Cut(line, "=")
		if section != "[Install]" || !ok || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		words := strings.Fields(value)
		list := map[string]*[]string{"WantedBy": &in.wantedBy, "RequiredBy": &in.requiredBy, "UpheldBy": &in.upheldBy, "Alias": &in.alias, "Also": &in.also}[strings.TrimSpace(key)]
		switch {
		case strings.TrimSpace(key) == "DefaultInstance":
			in.instance = strings.TrimSpace(value)
		case list == nil:
		case len(words) == 0:
			*list = nil
		default:
			*list = append(*list, words...)
		}
	}
}

func (in *install) by() map[string][]string {
	return map[string][]string{".wants": in.wantedBy, ".requires": in.requiredBy, ".upholds": in.upheldBy}
}

// enableUnit links a unit where its [Install] says. seen are those that Also has led to.
func (r *Provisioner) enableUnit(name string, seen map[string]bool) (found bool, err error) {
	if seen[name] {
		return true, nil
	}
	seen[name] = true
	if r.root.readlink(path.Join(unitDir, name)) == "/dev/null" {
		r.say("systemd unit %q: it is masked, so enabling it does nothing", name)
		return true, nil
	}
	file, in, err := r.readInstall(name)
	if err != nil || file == "" {
		return false, err
	}
	template, instance := splitInstance(name)
	if name == template && strings.Contains(name, "@") {
		if in.instance == "" {
			return true, errors.New("a template that has no default instance: name one, as in x@one.service")
		}
		instance = in.instance
		name = strings.Replace(template, "@.", "@"+instance+".", 1)
	}
	if len(in.wantedBy)+len(in.requiredBy)+len(in.upheldBy)+len(in.alias)+len(in.also) == 0 {
		r.say("systemd unit %q: it has no [Install] section, so nothing starts it", name)
	}
	for suffix, targets := range in.by() {
		for _, target := range targets {
			if target, err = expandUnit(target, name, instance); err != nil {
				return true, err
			}
			if err := r.root.link(path.Join(unitDir, target+suffix, name), file); err != nil {
				return true, err
			}
		}
	}
	for _, alias := range in.alias {
		if alias, err = expandUnit(alias, name, instance); err != nil {
			return true, err
		}
		if alias != name {
			if err := r.root.link(path.Join(unitDir, alias), file); err != nil {
				return true, err
			}
		}
	}
	for _, also := range in.also {
		if also, err = expandUnit(also, name, instance); err != nil {
			return true, err
		}
		if _, err := r.enableUnit(also, seen); err != nil {
			return true, fmt.Errorf("also %q: %w", also, err)
		}
	}
	return true, nil
}

// disableUnit removes the links to a unit, and to all instances of a template.
func (r *Provisioner) disableUnit(name string, seen map[string]bool) (found bool, err error) {
	if seen[name] {
		return true, nil
	}
	seen[name] = true
	file, in, err := r.readInstall(name)
	if err != nil {
		return false, err
	}
	_, instance := splitInstance(name)
	is := func(link, target string) bool {
		t, _ := splitInstance(link)
		return link == name || t == name || path.Base(target) == name // itself, an instance of it, an alias
	}
	dirs, err := r.root.list(unitDir)
	if err != nil {
		return file != "", err
	}
	for _, dir := range dirs {
		full := path.Join(unitDir, dir)
		if target := r.root.readlink(full); target != "" {
			if dir != name && isUnitName(dir) && path.Base(target) == name {
				if err := r.root.remove(full); err != nil {
					return true, err
				}
			}
			continue
		}
		if ext := path.Ext(dir); ext != ".wants" && ext != ".requires" && ext != ".upholds" {
			continue
		}
		links, err := r.root.list(full)
		if err != nil {
			return true, err
		}
		for _, link := range links {
			if target := r.root.readlink(path.Join(full, link)); target != "" && isUnitName(link) && is(link, target) {
				if err := r.root.remove(path.Join(full, link)); err != nil {
					return true, err
				}
			}
		}
	}
	for _, also := range in.also {
		if also, err = expandUnit(also, name, instance); err != nil {
			return true, err
		}
		if _, err := r.disableUnit(also, seen); err != nil {
			return true, fmt.Errorf("also %q: %w", also, err)
		}
	}
	return file != "", nil
}

// expandUnit fills in the specifiers that [Install] may have (systemd.unit(5)) and checks that the result is the name of a unit.
func expandUnit(text, name, instance string) (string, error) {
	dot := strings.LastIndex(name, ".")
	prefix, _, _ := strings.Cut(name[:dot], "@")
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '%' || i+1 == len(text) {
			b.WriteByte(text[i])
			continue
		}
		i++
		switch text[i] {
		case 'n':
			b.WriteString(name)
		case 'N':
			b.WriteString(name[:dot])
		case 'p':
			b.WriteString(prefix)
		case 'i':
			b.WriteString(instance)
		case 'j':
			b.WriteString(prefix[strings.LastIndex(prefix, "-")+1:])
		case '%':
			b.WriteByte('%')
		default:
			return "", fmt.Errorf("[Install] says %q: %%%c is not known there", text, text[i])
		}
	}
	if out := b.String(); isUnitName(out) {
		return out, nil
	}
	return "", fmt.Errorf("[Install] says %q, which is no name of a unit", text)
}
