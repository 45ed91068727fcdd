package provision

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The files of accounts.
const (
	passwdFile  = "/etc/passwd"
	groupFile   = "/etc/group"
	shadowFile  = "/etc/shadow"
	gshadowFile = "/etc/gshadow"
)

// maxTable bounds what is read of a file of accounts.
const maxTable = 16 << 20

// Fields of passwd(5), group(5), shadow(5) and gshadow(5).
const (
	fieldName     = 0
	fieldPassword = 1
	fieldID       = 2 // of passwd and group
	passwdGID     = 3
	passwdGecos   = 4
	passwdHome    = 5
	passwdShell   = 6
	groupMembers  = 3 // of group and gshadow
)

// table is a file of colon-separated entries. Lines that are none (comments, NIS, nonsense) stay as they are.
type table struct {
	path    string
	fields  int
	mode    uint32
	uid     uint32
	gid     uint32
	there   bool
	lines   []string // without their ends
	changed bool
}

var tableFields = map[string]int{passwdFile: 7, groupFile: 4, shadowFile: 9, gshadowFile: 4}

func parseTable(path string, data []byte) *table {
	t := &table{path: path, fields: tableFields[path], mode: 0o644}
	if text := string(data); text != "" {
		t.lines = strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	}
	return t
}

func (t *table) bytes() []byte {
	if len(t.lines) == 0 {
		return nil
	}
	return []byte(strings.Join(t.lines, "\n") + "\n")
}

// entry returns the fields of a line, or nil: it is no entry.
func (t *table) entry(line string) []string {
	if line == "" || strings.ContainsAny(line[:1], "#+-") {
		return nil
	}
	e := strings.Split(line, ":")
	// Some leave out what is empty at the end.
	for len(e) >= 3 && len(e) < t.fields {
		e = append(e, "")
	}
	if len(e) != t.fields || e[fieldName] == "" {
		return nil
	}
	return e
}

// all calls f with each entry until f returns false.
func (t *table) all(f func(i int, e []string) bool) {
	for i, line := range t.lines {
		if e := t.entry(line); e != nil && !f(i, e) {
			return
		}
	}
}

// find returns the first entry of a name, or nil.
func (t *table) find(name string) []string {
	var found []string
	t.all(func(_ int, e []string) bool {
		if e[fieldName] == name {
			found = e
		}
		return found == nil
	})
	return found
}

// set writes an entry in the place of the first with its name, or at the end.
func (t *table) set(e []string) {
	line := strings.Join(e, ":")
	at := -1
	t.all(func(i int, old []string) bool {
		if old[fieldName] == e[fieldName] {
			at = i
		}
		return at < 0
	})
	switch {
	case at < 0:
		t.lines = append(t.lines, line)
	case t.lines[at] == line:
		return
	default:
		t.lines[at] = line
	}
	t.changed = true
}

// drop takes all entries of a name away.
func (t *table) drop(name string) {
	n := len(t.lines)
	t.lines = slices.DeleteFunc(t.lines, func(line string) bool {
		e := t.entry(line)
		return e != nil && e[fieldName] == name
	})
	t.changed = t.changed || len(t.lines) != n
}

// id returns the number of a name in passwd or group.
func (t *table) id(name string) (uint32, error) {
	e := t.find(name)
	if e == nil {
		return 0, fmt.Errorf("%q is not in %s", name, t.path)
	}
	id, err := strconv.ParseUint(e[fieldID], 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q has no number in %s", name, t.path)
	}
	return uint32(id), nil
}

// holder returns who has a number; empty: nobody.
func (t *table) holder(id uint32) string {
	name := ""
	t.all(func(_ int, e []string) bool {
		if n, err := strconv.ParseUint(e[fieldID], 10, 32); err == nil && uint32(n) == id {
			name = e[fieldName]
		}
		return name == ""
	})
	return name
}

// free chooses a number as useradd does: below the lowest of the system's range, else above the highest of the others'; when that end
// of the range is reached, the first that nobody has. also says what is taken elsewhere.
func (t *table) free(low, high uint32, system bool, also func(uint32) bool) (uint32, error) {
	taken := map[uint32]bool{}
	next := low
	if system {
		next = high
	}
	t.all(func(_ int, e []string) bool {
		n, err := strconv.ParseUint(e[fieldID], 10, 32)
		id := uint32(n)
		if err != nil || id < low || id > high {
			return true
		}
		taken[id] = true
		if system && id <= next {
			next = id - 1
		}
		if !system && id >= next {
			next = id + 1
		}
		return true
	})
	usable := func(id uint32) bool {
		return id >= low && id <= high && id != math.MaxUint32 && !taken[id] && !also(id)
	}
	if usable(next) {
		return next, nil
	}
	for i := uint32(0); i <= high-low; i++ {
		id := low + i
		if system {
			id = high - i
		}
		if usable(id) {
			return id, nil
		}
	}
	return 0, fmt.Errorf("all numbers from %d to %d of %s are taken", low, high, t.path)
}

// members of a group's or gshadow's entry.
func members(e []string) []string {
	if e[groupMembers] == "" {
		return nil
	}
	return strings.Split(e[groupMembers], ",")
}

// replace writes an entry in the place of line i.
func (t *table) replace(i int, e []string) {
	t.lines[i] = strings.Join(e, ":")
	t.changed = true
}

func (t *table) setMember(i int, e []string, user string, is bool) {
	list := members(e)
	if slices.Contains(list, user) == is {
		return
	}
	if is {
		list = append(list, user)
	} else {
		list = slices.DeleteFunc(list, func(m string) bool { return m == user })
	}
	e[groupMembers] = strings.Join(list, ",")
	t.replace(i, e)
}

// readTable reads one of the files. One that is not there is empty.
func (r *Provisioner) readTable(path string) (*table, error) {
	data, st, err := r.root.read(path, maxTable)
	if errors.Is(err, fs.ErrNotExist) {
		return parseTable(path, nil), nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	t := parseTable(path, data)
	t.there, t.mode, t.uid, t.gid = true, st.Mode, st.Uid, st.Gid
	return t, nil
}

// accounts are the four files, which are changed together.
type accounts struct {
	passwd, group, shadow, gshadow *table
	defs                           loginDefs
}

func (r *Provisioner) readAccounts() (*accounts, error) {
	a := &accounts{}
	for _, f := range []struct {
		to   **table
		path string
	}{{&a.passwd, passwdFile}, {&a.group, groupFile}, {&a.shadow, shadowFile}, {&a.gshadow, gshadowFile}} {
		t, err := r.readTable(f.path)
		if err != nil {
			return nil, err
		}
		*f.to = t
	}
	if !a.passwd.there {
		a.passwd.set([]string{"root", "x", "0", "0", "root", "/root", r.shell()})
	}
	if !a.group.there {
		a.group.set([]string{"root", "x", "0", ""})
	}
	if !a.shadow.there {
		// Hashes are for root's eyes, and for those of the programs that belong to its group.
		a.shadow.mode = 0o600
		if gid, err := a.group.id("shadow"); err == nil {
			a.shadow.mode, a.shadow.gid = 0o640, gid
		}
	}
	defs, err := r.readLoginDefs()
	a.defs = defs
	return a, err
}

// write writes those files that have changed. gshadow is written only where the image has one.
func (r *Provisioner) writeAccounts(a *accounts) error {
	for _, t := range []*table{a.group, a.gshadow, a.passwd, a.shadow} { // who is named is there first
		if !t.changed || t == a.gshadow && !t.there {
			continue
		}
		if err := r.rewrite(t.path, t.bytes(), t.uid, t.gid, t.mode); err != nil {
			return fmt.Errorf("writing %s: %w", t.path, err)
		}
	}
	return nil
}

// rewrite replaces what a path leads to, through links: a file of the system that somebody may have put elsewhere.
func (r *Provisioner) rewrite(name string, data []byte, uid, gid, mode uint32) error {
	for range 10 {
		target := r.root.readlink(name)
		if target == "" {
			return r.root.putAs(name, data, uid, gid, mode)
		}
		if !strings.HasPrefix(target, "/") {
			target = name[:strings.LastIndex(name, "/")+1] + target
		}
		name = target
	}
	return unix.ELOOP
}

// loginDefs is login.defs(5).
type loginDefs map[string]string

func (r *Provisioner) readLoginDefs() (loginDefs, error) {
	d := loginDefs{}
	data, _, err := r.root.read("/etc/login.defs", maxTable)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading /etc/login.defs: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) >= 2 && !strings.HasPrefix(f[0], "#") {
			d[f[0]] = f[1]
		}
	}
	return d, nil
}

// number returns a setting; base 0 takes C's prefixes, as login.defs does.
func (d loginDefs) number(key string, byDefault uint32) uint32 {
	if n, err := strconv.ParseUint(d[key], 0, 31); err == nil {
		return uint32(n)
	}
	return byDefault
}

// numbers is the range of a kind ("UID", "GID") of numbers.
func (d loginDefs) numbers(kind string, system bool) (low, high uint32) {
	low, high = d.number(kind+"_MIN", 1000), d.number(kind+"_MAX", 60000)
	if system {
		low, high = d.number("SYS_"+kind+"_MIN", 101), d.number("SYS_"+kind+"_MAX", low-1)
	}
	return low, max(low, high)
}
