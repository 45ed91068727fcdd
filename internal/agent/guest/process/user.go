package process

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
)

type user struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

// lookUpUser resolves USER as Docker does: by name or number, with an optional group; a number needs no entry in /etc/passwd.
func lookUpUser(spec string) (*user, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	if name == "" {
		name = "0"
	}
	u := &user{home: "/"}
	id, idErr := strconv.ParseUint(name, 10, 31)
	found := false
	// A name that is a number is that name first, then the number.
	for _, match := range []func(e []string) bool{
		func(e []string) bool { return e[0] == name },
		func(e []string) bool { return idErr == nil && e[2] == strconv.FormatUint(id, 10) },
	} {
		if found = entry("/etc/passwd", 7, match, func(e []string) bool {
			uid, err1 := strconv.ParseUint(e[2], 10, 32)
			gid, err2 := strconv.ParseUint(e[3], 10, 32)
			u.uid, u.gid, u.home, name = uint32(uid), uint32(gid), e[5], e[0]
			return err1 == nil && err2 == nil
		}); found {
			break
		}
	}
	switch {
	case found:
	case idErr == nil:
		u.uid = uint32(id)
		if u.uid == 0 {
			u.home = "/root"
		}
	default:
		return nil, invalid("unable to find user " + name + ": no matching entries in passwd file")
	}

	if hasGroup && group != "" {
		gid, gidErr := strconv.ParseUint(group, 10, 31)
		found := entry("/etc/group", 3, func(e []string) bool { return e[0] == group }, func(e []string) bool {
			id, err := strconv.ParseUint(e[2], 10, 32)
			u.gid = uint32(id)
			return err == nil
		})
		if !found {
			if gidErr != nil {
				return nil, invalid("unable to find group " + group + ": no matching entries in group file")
			}
			u.gid = uint32(gid)
		}
		return u, nil // a group of its own means no supplementary ones
	}
	if found {
		entry("/etc/group", 4, func(e []string) bool { return listed(e[3], name) }, func(e []string) bool {
			if id, err := strconv.ParseUint(e[2], 10, 32); err == nil {
				u.groups = append(u.groups, uint32(id))
			}
			return false
		})
	}
	return u, nil
}

// allGroups are the supplementary groups. The group itself is one of them, as with Docker: a process that gives up its group for
// another does not so get around what is forbidden to the first (CVE-2022-36109).
func (u *user) allGroups() []uint32 {
	all := []uint32{u.gid}
	for _, g := range u.groups {
		if !slices.Contains(all, g) {
			all = append(all, g)
		}
	}
	return all
}

func listed(members, name string) bool {
	for m := range strings.SplitSeq(members, ",") {
		if m == name {
			return true
		}
	}
	return false
}

// entry calls use with each line of a colon-separated file that has enough fields and matches, until use is content.
func entry(path string, fields int, match, use func([]string) bool) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		e := strings.Split(strings.TrimSpace(lines.Text()), ":")
		if len(e) >= fields && match(e) && use(e) {
			return true
		}
	}
	return false
}
