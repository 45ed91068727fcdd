package cloudconfig

import (
	"net/netip"
	"path"
	"regexp"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/provision/form"
	"github.com/atollvm/atoll/internal/provision/zone"
)

// settings is a config that has been read. Where it matters which key a fault is at, that stays beside the value.
type settings struct {
	users      []*user
	usersGiven bool
	noDefault  bool // users are given, and default is not among them
	deflt      *user
	groups     []string
	members    map[string][]item // of groups
	keys       []string
	keysAt     item
	sshKeys    []*agentv1.SSHHostKey
	passwords  []password
	root       *bool // disable_root

	hostname, fqdn string
	preserve       bool
	preferFQDN     bool
	noHosts        bool
	timezone       string
	locale         string
	ntp            []string

	files    []file
	packages *agentv1.Packages
	mounts   []*agentv1.FileSystemMount
	trusted  [][]byte
	bootcmd  []string // shell
	runcmd   []string
	final    string
	pwauth   *bool
	warnings []string
}

// keys are those that are carried out.
var keys = map[string]func(s *settings, it item){
	"users":                      readUsers,
	"user":                       readDefaultUser,
	"groups":                     readGroups,
	"ssh_authorized_keys":        func(s *settings, it item) { s.keys, s.keysAt = it.texts(item.publicKey), it },
	"ssh_keys":                   readHostKeys,
	"ssh_deletekeys":             func(_ *settings, it item) { it.want(true, "the image's host keys never stay") },
	"ssh_pwauth":                 readPasswordAuth,
	"allow_public_ssh_keys":      func(_ *settings, it item) { it.want(true, "not implemented: leave the keys out") },
	"disable_root":               func(s *settings, it item) { is := it.bool(); s.root = &is },
	"password":                   func(s *settings, it item) { s.passwords = append(s.passwords, password{at: it, hash: it.hash()}) },
	"chpasswd":                   readPasswords,
	"write_files":                readFiles,
	"packages":                   readPackages,
	"package_update":             func(s *settings, it item) { s.wantPackages().Update = it.bool() },
	"package_upgrade":            func(s *settings, it item) { s.wantPackages().Upgrade = it.bool() },
	"package_reboot_if_required": func(_ *settings, it item) { it.want(false, "not implemented") },
	"runcmd":                     func(s *settings, it item) { s.runcmd = it.texts(item.shell) },
	"bootcmd":                    func(s *settings, it item) { s.bootcmd = it.texts(item.shell) },
	"hostname":                   func(s *settings, it item) { s.hostname = it.host() },
	"fqdn":                       func(s *settings, it item) { s.fqdn = it.host() },
	"prefer_fqdn_over_hostname":  func(s *settings, it item) { s.preferFQDN = it.bool() },
	"preserve_hostname":          func(s *settings, it item) { s.preserve = it.bool() },
	"create_hostname_file":       func(_ *settings, it item) { it.want(true, "the guest's agent always sets the name") },
	"manage_etc_hosts":           readManageHosts,
	"timezone":                   readTimezone,
	"locale":                     readLocale,
	"ntp":                        readNTP,
	"mounts":                     readMounts,
	"growpart":                   readGrowpart,
	"resize_rootfs":              readResize,
	"ca_certs":                   readAuthorities,
	"final_message":              readFinalMessage,
	"output":                     readOutput,
}

// others are keys of cloud-init that are not carried out: whoever wrote one has made no mistake of spelling.
var others = strings.Fields(`
	allow_userdata ansible apk_repos apt apt_mirror apt_preserve_sources_list apt_proxy apt_reboot_if_required apt_sources apt_update
	apt_upgrade autoinstall bootstrap byobu_by_default chef cloud_config_modules cloud_final_modules cloud_init_modules datasource
	datasource_list debug def_log_file device_aliases disable_ec2_metadata disable_root_opts disk_setup drivers fan fs_setup
	hotplug keyboard landscape launch_index locale_configfile log_cfgs lxd manage_resolv_conf mcollective merge_how merge_type
	mount_default_fields network no_ssh_fingerprints phone_home power_state puppet random_seed reporting resolv_conf rh_subscription rpi
	rsyslog runcmd_once salt_minion snap spacewalk ssh ssh_fp_console_blacklist ssh_genkeytypes ssh_import_id ssh_key_console_blacklist
	ssh_publish_hostkeys ssh_quiet_keygen ssh_svcname swap syslog_fix_perms system_info ubuntu_advantage ubuntu_pro unverified_modules
	updates vendor_data vendor_data2 version wireguard write_files_deferred yum_repo_dir yum_repos zypper`)

// want refuses the value that cannot be had.
func (it item) want(is bool, why string) {
	if it.bool() != is {
		it.fault("%s", why)
	}
}

func (it item) formed(ok func(string) bool, what string) string {
	s := it.text()
	if s != "" && !ok(s) {
		it.fault("not %s", what)
	}
	return s
}

func (it item) host() string { return it.formed(form.Host, "a host name") }
func (it item) name() string { return it.formed(form.User, "a name of a user or group") }

// hash never shows its value: it may be a password.
func (it item) hash() string {
	return it.formed(form.PasswordHash, "a hash of crypt(5): passwords in the clear are not taken; make one with openssl passwd -6")
}

func (it item) absolute() string {
	s := it.text()
	if s != "" && (!strings.HasPrefix(s, "/") || path.Clean(s) != s || s == "/" || len(s) > 4000) {
		it.fault("not an absolute path without . and ..")
	}
	return s
}

// shell is a command for a shell: a string as it is, a list as words.
func (it item) shell() string {
	if !it.isList() {
		return it.text()
	}
	var words []string
	for _, w := range it.texts(item.text) {
		words = append(words, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
	}
	return strings.Join(words, " ")
}

func (s *settings) warn(format string) { s.warnings = append(s.warnings, format) }

func (s *settings) wantPackages() *agentv1.Packages {
	if s.packages == nil {
		s.packages = &agentv1.Packages{}
	}
	return s.packages
}

func readPackages(s *settings, it item) {
	p := s.wantPackages()
	for _, e := range it.items() {
		switch {
		case e.isMapping():
			e.fault("packages of one manager only: not implemented")
		case e.isList():
			words := e.items()
			if len(words) != 2 {
				e.fault("want a name and a version")
				continue
			}
			p.Names = append(p.Names, words[0].formed(form.Package, "a name of a package")+"="+words[1].formed(form.Package, "a version"))
		default:
			p.Names = append(p.Names, e.formed(form.Package, "a name of a package"))
		}
	}
}

func readManageHosts(s *settings, it item) {
	if n := it.value(); n.Value == "localhost" || n.Value == "template" {
		return
	}
	s.noHosts = !it.bool()
}

func readTimezone(s *settings, it item) {
	s.timezone = it.text()
	if s.timezone == "" {
		return
	}
	if _, err := zone.Find(s.timezone); err != nil {
		it.fault("no such time zone (%s)", hint.Of(err))
	}
}

func readLocale(s *settings, it item) {
	if it.isBool() && !it.bool() {
		return // as it is
	}
	s.locale = it.formed(form.Locale, "a locale, as de_DE.UTF-8")
}

func readNTP(s *settings, it item) {
	if it.isNull() {
		return // the host keeps the clock
	}
	enabled := true
	servers := func(it item) {
		if it.isNull() {
			return
		}
		for _, e := range it.items() {
			h := e.text()
			if _, err := netip.ParseAddr(h); err != nil && h != "" && !form.Host(h) {
				e.fault("not a host")
			}
			s.ntp = append(s.ntp, h)
		}
	}
	it.fields(map[string]func(item){
		"enabled": func(it item) { enabled = it.bool() },
		"servers": servers,
		"pools":   servers,
		"ntp_client": func(it item) {
			if it.text() != "auto" {
				it.fault("not implemented: the guest's agent asks")
			}
		},
	}, "peers", "allow", "config")
	if !enabled {
		s.ntp = nil
	}
}

// readMounts takes lines of fstab: source, place, type, options, and two numbers that only fsck and dump read.
func readMounts(s *settings, it item) {
	for _, line := range it.items() {
		fields := line.items()
		if len(fields) < 2 || len(fields) > 6 {
			line.fault("want a device, a path, and maybe a type and options; the defaults of cloud-init's own mounts are not implemented")
			continue
		}
		m := &agentv1.FileSystemMount{Type: "auto", Options: "defaults,nofail"}
		if m.Source = fields[0].text(); m.Source == "swap" || strings.HasPrefix(m.Source, "ephemeral") || m.Source == "root" || m.Source == "ami" {
			fields[0].fault("devices by a cloud's names are not implemented")
		}
		if isDevice.MatchString(m.Source) {
			m.Source = "/dev/" + m.Source
		}
		if len(fields) > 2 {
			m.Type = fields[2].text()
		}
		switch {
		case fields[1].isNull():
			fields[1].fault("taking a default mount away is not implemented")
		case m.Type == "swap":
			m.Path = "none"
		default:
			m.Path = fields[1].absolute()
		}
		if len(fields) > 3 {
			m.Options = fields[3].text()
		}
		if strings.ContainsAny(m.Source+m.Type+m.Options, " \t\n") {
			line.fault("there is a space in a field")
		}
		for _, e := range fields[min(4, len(fields)):] {
			if n := e.text(); n != "0" && n != "1" && n != "2" {
				e.fault("want 0, 1 or 2")
			}
		}
		s.mounts = append(s.mounts, m)
	}
}

var isDevice = regexp.MustCompile(`^(x?v|s)d[a-z]+[0-9]*$`)

// readGrowpart takes what is true already: the disk has the size that was asked for.
func readGrowpart(_ *settings, it item) {
	it.fields(map[string]func(item){
		"mode": func(it item) {
			if it.isBool() && !it.bool() {
				return
			}
			switch it.text() {
			case "auto", "growpart", "gpart", "off":
			default:
				it.fault("want auto, growpart, gpart or off")
			}
		},
		"devices": func(it item) {
			for _, e := range it.items() {
				if e.text() != "/" {
					e.fault("only / has grown")
				}
			}
		},
		"ignore_growroot_disabled": func(it item) { it.bool() },
	})
}

func readResize(_ *settings, it item) {
	if it.value().Value != "noblock" {
		it.bool()
	}
}

func readAuthorities(s *settings, it item) {
	it.fields(map[string]func(item){
		"remove_defaults": func(it item) { it.want(false, "not implemented") },
		"trusted": func(it item) {
			for _, e := range it.items() {
				pem := e.text()
				if !isCertificate(pem) {
					e.fault("no certificate in PEM")
				}
				s.trusted = append(s.trusted, []byte(pem))
			}
		},
	})
}

func readFinalMessage(s *settings, it item) {
	if s.final = it.text(); strings.ContainsAny(s.final, "$") || strings.Contains(s.final, "{{") {
		it.fault("variables are not implemented")
	}
}

func readOutput(s *settings, it item) {
	if !it.isMapping() {
		it.fault("want keys with values")
	}
	s.warn("user-data: output: what commands write is in atoll logs --provisioning, and nowhere else")
}

func readPasswordAuth(s *settings, it item) {
	if it.value().Value == "unchanged" {
		return
	}
	is := it.bool()
	s.pwauth = &is
}
