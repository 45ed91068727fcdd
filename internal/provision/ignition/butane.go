package ignition

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/coreos/ignition/v2/butane/config/common"
	fcos1_0 "github.com/coreos/ignition/v2/butane/config/fcos/v1_0"
	fcos1_1 "github.com/coreos/ignition/v2/butane/config/fcos/v1_1"
	fcos1_2 "github.com/coreos/ignition/v2/butane/config/fcos/v1_2"
	fcos1_3 "github.com/coreos/ignition/v2/butane/config/fcos/v1_3"
	fcos1_4 "github.com/coreos/ignition/v2/butane/config/fcos/v1_4"
	fcos1_5 "github.com/coreos/ignition/v2/butane/config/fcos/v1_5"
	fcos1_6 "github.com/coreos/ignition/v2/butane/config/fcos/v1_6"
	fcos1_7 "github.com/coreos/ignition/v2/butane/config/fcos/v1_7"
	fcos1_8_exp "github.com/coreos/ignition/v2/butane/config/fcos/v1_8_exp"
	fiot1_0 "github.com/coreos/ignition/v2/butane/config/fiot/v1_0"
	fiot1_1_exp "github.com/coreos/ignition/v2/butane/config/fiot/v1_1_exp"
	flatcar1_0 "github.com/coreos/ignition/v2/butane/config/flatcar/v1_0"
	flatcar1_1 "github.com/coreos/ignition/v2/butane/config/flatcar/v1_1"
	flatcar1_2_exp "github.com/coreos/ignition/v2/butane/config/flatcar/v1_2_exp"
	r4e1_0 "github.com/coreos/ignition/v2/butane/config/r4e/v1_0"
	r4e1_1 "github.com/coreos/ignition/v2/butane/config/r4e/v1_1"
	r4e1_2_exp "github.com/coreos/ignition/v2/butane/config/r4e/v1_2_exp"
	"github.com/coreos/ignition/v2/butane/config/util"
	"github.com/coreos/ignition/v2/butane/translate"
	latest "github.com/coreos/ignition/v2/config/v3_7_experimental"
	"github.com/coreos/ignition/v2/config/v3_7_experimental/types"
	"github.com/coreos/vcontext/path"
	"github.com/coreos/vcontext/report"
	vyaml "github.com/coreos/vcontext/yaml"
	"gopkg.in/yaml.v3"
)

type translator func([]byte, common.TranslateBytesOptions) ([]byte, report.Report, error)

// variants are those that translate to Ignition alone, each with its versions. Butane's own list is not used: it links openshift, whose
// fifteen versions make MachineConfigs for an operator that no machine here runs.
func variants() map[string]map[string]translator {
	return map[string]map[string]translator{
		"fcos": {
			"1.0.0": fcos1_0.ToIgn3_0Bytes, "1.1.0": fcos1_1.ToIgn3_1Bytes, "1.2.0": fcos1_2.ToIgn3_2Bytes,
			"1.3.0": fcos1_3.ToIgn3_2Bytes, "1.4.0": fcos1_4.ToIgn3_3Bytes, "1.5.0": fcos1_5.ToIgn3_4Bytes,
			"1.6.0": fcos1_6.ToIgn3_5Bytes, "1.7.0": fcos1_7.ToIgn3_6Bytes, "1.8.0-experimental": fcos1_8_exp.ToIgn3_7Bytes,
		},
		"flatcar": {"1.0.0": flatcar1_0.ToIgn3_3Bytes, "1.1.0": flatcar1_1.ToIgn3_4Bytes, "1.2.0-experimental": flatcar1_2_exp.ToIgn3_7Bytes},
		"fiot":    {"1.0.0": fiot1_0.ToIgn3_4Bytes, "1.1.0-experimental": fiot1_1_exp.ToIgn3_7Bytes},
		"r4e":     {"1.0.0": r4e1_0.ToIgn3_3Bytes, "1.1.0": r4e1_1.ToIgn3_4Bytes, "1.2.0-experimental": r4e1_2_exp.ToIgn3_7Bytes},
	}
}

func translatorFor(variant, version string) (translator, error) {
	all := variants()
	versions, ok := all[variant]
	switch {
	case variant == "openshift":
		return nil, errors.New("$.variant: openshift makes a MachineConfig for OpenShift's operator; write fcos for a machine of your own")
	case !ok:
		return nil, fmt.Errorf("$.variant: %q is not known; %s are", variant, strings.Join(slices.Sorted(maps.Keys(all)), ", "))
	case versions[version] == nil:
		return nil, fmt.Errorf("$.version: version %q of variant %s is not known; %s are", version, variant, strings.Join(slices.Sorted(maps.Keys(versions)), ", "))
	}
	return versions[version], nil
}

// Translate turns a Butane config into Ignition. Files that it embeds (local, trees) are read below filesDir; where that is empty, such
// fields are faults. Keys that Butane does not know are faults too, and so is what Atoll does not implement.
func Translate(raw []byte, filesDir string) (ignition []byte, warnings []string, err error) {
	ignition, warnings, faults := translateButane(raw, filesDir)
	if len(faults) > 0 {
		return nil, nil, invalid("the Butane config", faults)
	}
	// Whoever gets the Ignition config says of it what the library says of both.
	_, again, _ := parse(ignition)
	warnings = slices.DeleteFunc(warnings, func(w string) bool {
		_, text, _ := strings.Cut(w, ": ")
		return slices.ContainsFunc(again, func(a string) bool { return strings.HasSuffix(a, ": "+text) })
	})
	return ignition, warnings, nil
}

func parseButane(raw []byte) (config types.Config, warnings, faults []string) {
	document, warnings, faults := translateButane(raw, "")
	if len(faults) > 0 {
		return config, nil, faults
	}
	config, rep, err := latest.ParseCompatibleVersion(document)
	if err != nil {
		_, faults = sorted(rep)
		return config, nil, append(faults, err.Error())
	}
	return config, warnings, nil
}

func translateButane(raw []byte, filesDir string) (document []byte, warnings, faults []string) {
	if len(raw) > mostDocument {
		return nil, nil, []string{fmt.Sprintf("%d bytes are more than a config may have (%d)", len(raw), mostDocument)}
	}
	var head struct {
		Variant string `yaml:"variant"`
		Version string `yaml:"version"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&head); err != nil {
		return nil, nil, []string{err.Error()}
	}
	// Butane reads the first document and says nothing of others.
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, nil, []string{"more than one YAML document: what follows the second --- would be ignored"}
	}
	root, err := vyaml.UnmarshalToContext(raw)
	if err != nil || root == nil {
		return nil, nil, []string{fmt.Sprintf("no YAML mapping: %v", err)}
	}
	t, err := translatorFor(head.Variant, head.Version)
	if err != nil {
		return nil, nil, []string{err.Error()}
	}
	document, rep, err := t(raw, common.TranslateBytesOptions{TranslateOptions: common.TranslateOptions{FilesDir: filesDir}})
	for i, e := range rep.Entries {
		// A person has written this file: a key that Butane does not know is a slip. (butane --strict; Ignition itself lets such keys pass.)
		if strings.HasPrefix(e.Message, "unused key") {
			rep.Entries[i].Kind = report.Error
		}
	}
	warnings, faults = sorted(rep)
	if err != nil && len(faults) == 0 {
		faults = append(faults, err.Error())
	}
	for i, f := range faults {
		faults[i] = strings.Replace(f, common.ErrNoFilesDir.Error(), "local files are embedded when atoll is given the config by its file's name; here only its text has come", 1)
	}
	var ours report.Report
	for _, key := range []string{"boot_device", "grub"} {
		if _, err := root.Get(path.New("yaml", key)); err == nil {
			ours.AddOnError(path.New("yaml", key), fmt.Errorf("%s is not implemented: a machine's kernel and root disk come from Atoll", key))
		}
	}
	switch {
	case len(ours.Entries) > 0: // what they stand for is not named too
	case err != nil:
		// What is refused is said along with the other faults, as far as it can be read.
		for _, field := range []string{"disks", "raid", "luks", "filesystems"} {
			if _, err := root.Get(path.New("yaml", "storage", field)); err == nil {
				ours.AddOnError(path.New("yaml", "storage", field), noStorage(field))
			}
		}
	default:
		config, _, err := latest.ParseCompatibleVersion(document)
		if err != nil {
			return nil, nil, append(faults, err.Error())
		}
		ours = util.TranslateReportPaths(refusals(config), translate.TranslationSet{})
	}
	ours.Correlate(root)
	_, more := sorted(ours)
	return document, warnings, append(faults, more...)
}
