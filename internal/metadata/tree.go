package metadata

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"
)

// trees is a document in each of its shapes, ready to be served.
type trees struct {
	source   json.RawMessage
	document *Document
	ec2      tree // below a version
	nocloud  map[string]string
	plain    any
}

// tree maps paths to values; a path that others go on from is a directory.
type tree struct {
	values map[string]string
	lists  map[string]string // directories
}

// versions are those that cloud-init asks for; all have the same tree.
var versions = []string{"2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"}

func newTrees(d *Document) *trees {
	t := &trees{document: d, ec2: ec2(d), nocloud: nocloud(d)}
	plain, err := json.Marshal(d)
	if err == nil {
		err = json.Unmarshal(plain, &t.plain)
	}
	if err != nil {
		panic(err) // it came from JSON
	}
	return t
}

func ec2(d *Document) tree {
	v := map[string]string{
		"meta-data/ami-id":                      d.Image,
		"meta-data/ami-launch-index":            "0",
		"meta-data/hostname":                    d.Hostname,
		"meta-data/instance-action":             "none",
		"meta-data/instance-id":                 d.InstanceID,
		"meta-data/instance-life-cycle":         "on-demand",
		"meta-data/instance-type":               instanceType(d),
		"meta-data/local-hostname":              d.Hostname,
		"meta-data/placement/availability-zone": zone,
		"meta-data/placement/host-id":           d.Host,
		"meta-data/placement/region":            zone,
		"dynamic/instance-identity/document":    identity(d),
	}
	if len(d.UserData) > 0 {
		v["user-data"] = string(d.UserData)
	}
	for i, nic := range d.Interfaces {
		if i == 0 {
			v["meta-data/local-ipv4"], v["meta-data/mac"] = nic.Address.Addr().String(), nic.MAC
		}
		for name, value := range map[string]string{
			"device-number":          fmt.Sprint(i),
			"interface-id":           "eni-" + strings.ReplaceAll(nic.MAC, ":", ""),
			"local-hostname":         d.Hostname,
			"local-ipv4s":            nic.Address.Addr().String(),
			"mac":                    nic.MAC,
			"subnet-ipv4-cidr-block": nic.Address.Masked().String(),
			"vpc-ipv4-cidr-block":    nic.Address.Masked().String(),
			"vpc-ipv4-cidr-blocks":   nic.Address.Masked().String(),
			"gateway-ipv4":           nic.Gateway.String(),
			"domain-name-servers":    joinAddrs(nic.DNS),
			"mtu":                    fmt.Sprint(nic.MTU),
			"network":                nic.Network,
		} {
			v["meta-data/network/interfaces/macs/"+nic.MAC+"/"+name] = value
		}
	}
	for key, value := range d.Labels {
		if key != "." && key != ".." && !strings.ContainsAny(key, "/\n") { // others have no path; they are in the plain tree
			v["meta-data/tags/instance/"+key] = value
		}
	}
	var keys strings.Builder
	for i, key := range d.PublicKeys {
		v[fmt.Sprintf("meta-data/public-keys/%d/openssh-key", i)] = key
		fmt.Fprintf(&keys, "%d=key%d\n", i, i)
	}
	t := tree{v, directories(v)}
	if keys.Len() > 0 { // the one directory whose list has names beside the paths
		t.lists["meta-data/public-keys"] = strings.TrimSuffix(keys.String(), "\n")
	}
	return t
}

// directories lists what is in each directory that the paths imply, directories with a slash.
func directories(values map[string]string) map[string]string {
	children := map[string]map[string]bool{}
	for p := range values {
		for name := path.Base(p); p != "."; name = path.Base(p) + "/" {
			p = path.Dir(p)
			if children[p] == nil {
				children[p] = map[string]bool{}
			}
			children[p][name] = true
		}
	}
	lists := map[string]string{}
	for p, names := range children {
		var sorted []string
		for name := range names {
			sorted = append(sorted, name)
		}
		slices.Sort(sorted)
		lists[p] = strings.Join(sorted, "\n")
	}
	return lists
}

// zone stands where a cloud's region does; cloud-init takes no package mirror for it.
const zone = "atoll"

func instanceType(d *Document) string { return fmt.Sprintf("c%d-m%d", d.CPUs, d.MemoryBytes>>20) }

func joinAddrs(addrs []netip.Addr) string {
	var words []string
	for _, a := range addrs {
		words = append(words, a.String())
	}
	return strings.Join(words, "\n")
}

// identity has the fields of EC2's, unsigned.
func identity(d *Document) string {
	arch := map[string]string{"amd64": "x86_64"}[d.Arch]
	if arch == "" {
		arch = d.Arch
	}
	var ip string
	if len(d.Interfaces) > 0 {
		ip = d.Interfaces[0].Address.Addr().String()
	}
	text, err := json.MarshalIndent(map[string]any{
		"accountId": nil, "architecture": arch, "availabilityZone": zone, "region": zone, "imageId": d.Image, "instanceId": d.InstanceID,
		"instanceType": instanceType(d), "pendingTime": d.Created.UTC().Format(time.RFC3339), "privateIp": ip, "version": "2017-09-30",
	}, "", "  ")
	if err != nil {
		panic(err) // strings only
	}
	return string(text)
}

// nocloud is the seed of cloud-init's NoCloud. All four are there, as cloud-init takes a missing one for a broken seed.
func nocloud(d *Document) map[string]string {
	quote := func(v any) string { // JSON is YAML as well
		text, err := json.Marshal(v)
		if err != nil {
			panic(err) // strings only
		}
		return string(text)
	}
	meta := "instance-id: " + quote(d.InstanceID) + "\nlocal-hostname: " + quote(d.Hostname) + "\n"
	if len(d.PublicKeys) > 0 {
		meta += "public-keys:\n"
		for _, k := range d.PublicKeys {
			meta += "- " + quote(k) + "\n"
		}
	}
	network := "version: 2\nethernets:"
	if len(d.Interfaces) == 0 {
		network += " {}"
	}
	network += "\n"
	for i, nic := range d.Interfaces {
		network += fmt.Sprintf("  nic%d:\n    match: {macaddress: %s}\n    dhcp4: true\n", i, quote(nic.MAC))
	}
	return map[string]string{"meta-data": meta, "user-data": string(d.UserData), "vendor-data": string(d.VendorData), "network-config": network}
}
