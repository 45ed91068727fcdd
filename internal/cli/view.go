package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
)

// The views are what --format shows: JSON by their tags, templates by their field names. Both are stable.

// words is a command line.
type words []string

func (w words) String() string {
	quoted := make([]string, len(w))
	for i, s := range w {
		if quoted[i] = s; s == "" || strings.ContainsAny(s, " \t\n\"'$\\") {
			quoted[i] = strconv.Quote(s)
		}
	}
	return strings.Join(quoted, " ")
}

type port struct {
	HostAddress string `json:"hostAddress"`
	HostPort    uint32 `json:"hostPort"`
	GuestPort   uint32 `json:"guestPort"`
	Protocol    string `json:"protocol"`
}

func (p port) host() string { return net.JoinHostPort(p.HostAddress, fmt.Sprint(p.HostPort)) }

type ports []port

func (p ports) String() string {
	s := make([]string, len(p))
	for i, m := range p {
		s[i] = fmt.Sprintf("%s->%d/%s", m.host(), m.GuestPort, m.Protocol)
	}
	return strings.Join(s, ", ")
}

func portViews(list []*atollv1.PortMapping) ports {
	out := ports{}
	for _, p := range list {
		v := port{p.GetHostAddress(), p.GetHostPort(), p.GetGuestPort(), p.GetProtocol()}
		if v.HostAddress == "" {
			v.HostAddress = "127.0.0.1"
		}
		out = append(out, v)
	}
	return out
}

type labels map[string]string

func (l labels) String() string {
	var s []string
	for _, k := range slices.Sorted(maps.Keys(l)) {
		s = append(s, k+"="+l[k])
	}
	return strings.Join(s, ",")
}

// machineView is a machine in ps. It has no environment: that may hold secrets.
type machineView struct {
	ID          string     `json:"id"`
	Name        string     `json:"name"`
	Image       string     `json:"image"`
	ImageDigest string     `json:"imageDigest"`
	Command     words      `json:"command"`
	State       string     `json:"state"`
	Status      string     `json:"status"` // the state for people
	Reason      string     `json:"reason"` // of the last stop
	ExitCode    int32      `json:"exitCode"`
	Error       string     `json:"error"`
	FailedStep  string     `json:"failedStep"`
	CreatedAt   time.Time  `json:"createdAt"`
	StartedAt   *time.Time `json:"startedAt"`
	FinishedAt  *time.Time `json:"finishedAt"`
	Address     string     `json:"address"`
	Ports       ports      `json:"ports"` // as bound; none unless it runs
	Labels      labels     `json:"labels"`
	Health      string     `json:"health"` // starting, healthy or unhealthy; empty: there is no check
}

// Names is Docker's word for Name in templates.
func (m machineView) Names() string { return m.Name }

func newMachineView(m *atollv1.Machine, now time.Time) machineView {
	v := machineView{
		ID: m.GetId(), Name: m.GetSpec().GetName(), Image: m.GetImageRef(), ImageDigest: m.GetImageDigest(), Command: m.GetArgv(),
		State: stateName(m.GetState()), Status: status(m, now), Reason: m.GetReason(), ExitCode: m.GetExitCode(),
		Error: m.GetError(), FailedStep: m.GetFailedStep(),
		CreatedAt: clock(m.GetCreatedAt()), StartedAt: clockOrNil(m.GetStartedAt()), FinishedAt: clockOrNil(m.GetFinishedAt()),
		Address: m.GetNetwork().GetAddress(), Ports: ports{}, Labels: m.GetSpec().GetLabels(),
		Health: m.GetHealth().GetStatus(),
	}
	if v.Image == "" {
		v.Image = m.GetSpec().GetImage()
	}
	if v.Labels == nil {
		v.Labels = labels{}
	}
	if v.Command == nil {
		v.Command = words{}
	}
	if live(m) {
		v.Ports = portViews(m.GetNetwork().GetPorts())
	}
	return v
}

// machineDetail is a machine in inspect: all there is.
type machineDetail struct {
	machineView
	Host    string       `json:"host"`
	Spec    specView     `json:"spec"`
	Network *networkView `json:"network"`
	VMM     *vmmView     `json:"vmm"`
	Steps   []stepView   `json:"steps"` // of the last start

	HealthStatus *healthView         `json:"healthStatus"` // null: there is no check
	ExposedPorts []string            `json:"exposedPorts"` // of the image
	Volumes      []string            `json:"volumes"`      // that it declares
	Provisioning provisionStatusView `json:"provisioning"`
}

type specView struct {
	Image         string   `json:"image"`
	Command       words    `json:"command"`
	Entrypoint    words    `json:"entrypoint"`
	SetEntrypoint bool     `json:"setEntrypoint"`
	Env           []string `json:"env"`
	WorkingDir    string   `json:"workingDir"`
	User          string   `json:"user"`
	TTY           bool     `json:"tty"`
	Stdin         bool     `json:"stdin"`
	Remove        bool     `json:"remove"`
	Hostname      string   `json:"hostname"`
	CPUs          uint32   `json:"cpus"`
	MemoryBytes   int64    `json:"memoryBytes"`
	DiskBytes     int64    `json:"diskBytes"`
	Ports         ports    `json:"ports"`
	Network       string   `json:"network"`
	Kernel        string   `json:"kernel"`
	VMM           string   `json:"vmm"`
	Platform      string   `json:"platform"`
	StopSignal    string   `json:"stopSignal"`
	Verity        bool     `json:"verity"`
	StopTimeout   string   `json:"stopTimeout"`
	Init          string   `json:"init"` // auto, agent or image
	LogMaxBytes   int64    `json:"logMaxBytes"`
	LogMaxFiles   uint32   `json:"logMaxFiles"`
	guestView
	Profiles []string `json:"profiles"`
	Disk     string   `json:"disk"`     // a disk image in the place of an image
	Firmware string   `json:"firmware"` // that boots it: bios, uefi, or none

	Provisioning *provisionView `json:"provisioning"` // null: nothing was asked for
}

type networkView struct {
	Name    string `json:"name"`
	MAC     string `json:"mac"`
	Address string `json:"address"`
	Gateway string `json:"gateway"`
	Ports   ports  `json:"ports"`
}

type vmmView struct {
	Driver      string `json:"driver"`
	Accelerator string `json:"accelerator"`
	PID         int32  `json:"pid"`
	Kernel      string `json:"kernel"`
	Console     string `json:"console"`
}

type stepView struct {
	Name string `json:"name"`
	Took string `json:"took"`
}

func newMachineDetail(m *atollv1.Machine, now time.Time) machineDetail {
	s := m.GetSpec()
	d := machineDetail{machineView: newMachineView(m, now), Host: m.GetHost(), Steps: []stepView{}, Spec: specView{
		Image: s.GetImage(), Command: list(s.GetCommand()), Entrypoint: list(s.GetEntrypoint()), SetEntrypoint: s.GetSetEntrypoint(),
		Env: list(s.GetEnv()), WorkingDir: s.GetWorkingDir(), User: s.GetUser(), TTY: s.GetTty(), Stdin: s.GetStdin(),
		Remove: s.GetRemove(), Hostname: s.GetHostname(), CPUs: s.GetCpus(), MemoryBytes: s.GetMemoryBytes(), DiskBytes: s.GetDiskBytes(),
		Ports: portViews(s.GetPorts()), Network: s.GetNetwork(), Kernel: s.GetKernel(), VMM: s.GetVmm(), Platform: s.GetPlatform(),
		StopSignal: s.GetStopSignal(), Verity: s.GetVerity(), Init: s.GetInit(), guestView: newGuestView(s),
		Profiles: list(s.GetProfiles()), Disk: s.GetDisk(), Firmware: s.GetFirmware(),
		LogMaxBytes: s.GetLogMaxBytes(), LogMaxFiles: s.GetLogMaxFiles(),
	}, HealthStatus: newHealthView(m.GetHealth()), ExposedPorts: list(m.GetExposedPorts()), Volumes: list(m.GetVolumes())}
	d.Spec.Provisioning, d.Provisioning = newProvisionView(s.GetProvisioning()), newProvisionStatusView(m.GetProvisioning())
	if t := s.GetStopTimeout(); t != nil {
		d.Spec.StopTimeout = t.AsDuration().String()
	}
	if n := m.GetNetwork(); n != nil {
		d.Network = &networkView{n.GetName(), n.GetMac(), n.GetAddress(), n.GetGateway(), d.Ports}
	}
	if v := m.GetVmm(); v != nil {
		d.VMM = &vmmView{v.GetDriver(), v.GetAccelerator(), v.GetPid(), v.GetKernel(), v.GetConsole()}
	}
	for _, t := range m.GetSteps() {
		d.Steps = append(d.Steps, stepView{t.GetName(), t.GetTook().AsDuration().String()})
	}
	return d
}

func stateName(s atollv1.MachineState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "MACHINE_STATE_"))
}

// live says whether there is something to talk to.
func live(m *atollv1.Machine) bool {
	switch m.GetState() {
	case atollv1.MachineState_MACHINE_STATE_STARTING, atollv1.MachineState_MACHINE_STATE_RUNNING,
		atollv1.MachineState_MACHINE_STATE_PAUSED, atollv1.MachineState_MACHINE_STATE_STOPPING:
		return true
	}
	return false
}

// status is Docker's sentence about a machine's state.
func status(m *atollv1.Machine, now time.Time) string {
	since := func(t *timestamppb.Timestamp) string {
		if t == nil {
			return ""
		}
		return " " + units.HumanDuration(now.Sub(t.AsTime()))
	}
	ago := func(t *timestamppb.Timestamp) string {
		if t == nil {
			return ""
		}
		return since(t) + " ago"
	}
	switch m.GetState() {
	case atollv1.MachineState_MACHINE_STATE_RUNNING:
		return "Up" + since(m.GetStartedAt()) + healthNote(m.GetHealth())
	case atollv1.MachineState_MACHINE_STATE_PAUSED:
		return "Up" + since(m.GetStartedAt()) + " (Paused)"
	case atollv1.MachineState_MACHINE_STATE_STOPPED:
		s := fmt.Sprintf("Exited (%d)%s", m.GetExitCode(), ago(m.GetFinishedAt()))
		if r := m.GetReason(); r != "" && r != "exited" {
			s += ", " + r
		}
		return s
	case atollv1.MachineState_MACHINE_STATE_FAILED:
		s := "Failed"
		if step := m.GetFailedStep(); step != "" {
			s += " (" + step + ")"
		}
		return s + ago(m.GetFinishedAt())
	}
	name := stateName(m.GetState())
	return strings.ToUpper(name[:1]) + name[1:]
}

// imageView is one reference of an image in image ls; an image without any has one row.
type imageView struct {
	ID            string    `json:"id"`
	Repository    string    `json:"repository"`
	Tag           string    `json:"tag"`
	Reference     string    `json:"reference"`
	Digest        string    `json:"digest"` // as its registry has it: of the index, where it came from one
	CreatedAt     time.Time `json:"createdAt"`
	SizeBytes     int64     `json:"sizeBytes"`
	RootDiskBytes int64     `json:"rootDiskBytes"`
	Platform      string    `json:"platform"`
}

func imageViews(images []*atollv1.Image) []imageView {
	var rows []imageView
	for _, i := range images {
		row := imageView{
			ID: i.GetDigest(), Repository: "<none>", Tag: "<none>", CreatedAt: clock(i.GetCreatedAt()), SizeBytes: i.GetSizeBytes(),
			RootDiskBytes: i.GetRootDiskBytes(), Platform: platform(i),
		}
		if len(i.GetReferences()) == 0 {
			rows = append(rows, row)
		}
		for _, ref := range i.GetReferences() {
			row.Reference = ref
			row.Repository, row.Tag = splitReference(ref)
			row.Digest = ""
			for _, d := range i.GetRepoDigests() {
				if name, digest, ok := strings.Cut(d, "@"); ok && name == row.Repository {
					row.Digest = digest
				}
			}
			rows = append(rows, row)
		}
	}
	return rows
}

func splitReference(ref string) (repository, tag string) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref, "<none>"
	}
	tag = "<none>"
	if t, ok := named.(reference.Tagged); ok {
		tag = t.Tag()
	}
	return reference.FamiliarName(named), tag
}

func platform(i *atollv1.Image) string {
	s := i.GetOs() + "/" + i.GetArchitecture()
	if v := i.GetVariant(); v != "" {
		s += "/" + v
	}
	return s
}

// imageDetail is an image in image inspect.
type imageDetail struct {
	ID            string         `json:"id"`
	References    []string       `json:"references"`
	RepoDigests   []string       `json:"repoDigests"` // name@digest, as its registries have it
	CreatedAt     time.Time      `json:"createdAt"`
	Author        string         `json:"author"`
	SizeBytes     int64          `json:"sizeBytes"`
	OS            string         `json:"os"`
	Architecture  string         `json:"architecture"`
	Variant       string         `json:"variant"`
	Config        map[string]any `json:"config"` // with the keys of the image specification: Cmd, Env, …
	Layers        []layerView    `json:"layers"`
	DiffIDs       []string       `json:"diffIds"`     // of the layers, uncompressed
	IndexDigest   string         `json:"indexDigest"` // of the index that it came from; empty: it came from none
	Variants      []variantView  `json:"variants"`    // of that index
	Referrers     []referrerView `json:"referrers"`   // the artifacts here that refer to it
	RootDisk      string         `json:"rootDisk"`    // the lowest
	RootDiskBytes int64          `json:"rootDiskBytes"`
	// RootDiskOwnBytes is of those that no other image uses.
	RootDiskOwnBytes int64          `json:"rootDiskOwnBytes"`
	RootDisks        []rootDiskView `json:"rootDisks"` // the lowest first
}

type rootDiskView struct {
	Path      string   `json:"path"`
	SizeBytes int64    `json:"sizeBytes"`
	Images    uint32   `json:"images"` // that use it
	Layers    []string `json:"layers"`
	RootHash  string   `json:"rootHash"`
	Salt      string   `json:"salt"`
}

// RepoTags is Docker's word for References in templates.
func (d imageDetail) RepoTags() []string { return d.References }

type variantView struct {
	Digest   string `json:"digest"`
	Platform string `json:"platform"`
	Here     bool   `json:"here"` // with all its content
}

type referrerView struct {
	Digest       string `json:"digest"`
	ArtifactType string `json:"artifactType"`
	SizeBytes    int64  `json:"sizeBytes"`
}

type layerView struct {
	Digest    string `json:"digest"`
	MediaType string `json:"mediaType"`
	SizeBytes int64  `json:"sizeBytes"`
}

func newImageDetail(i *atollv1.Image) (imageDetail, error) {
	d := imageDetail{
		ID: i.GetDigest(), References: list(i.GetReferences()), CreatedAt: clock(i.GetCreatedAt()), SizeBytes: i.GetSizeBytes(),
		OS: i.GetOs(), Architecture: i.GetArchitecture(), Variant: i.GetVariant(), Layers: []layerView{},
		RootDisk: i.GetRootDisk(), RootDiskBytes: i.GetRootDiskBytes(), RootDiskOwnBytes: i.GetRootDiskOwnBytes(), RootDisks: []rootDiskView{},
		RepoDigests: list(i.GetRepoDigests()), DiffIDs: []string{}, IndexDigest: i.GetIndexDigest(), Variants: []variantView{}, Referrers: []referrerView{},
	}
	for _, r := range i.GetRootDisks() {
		d.RootDisks = append(d.RootDisks, rootDiskView{r.GetPath(), r.GetSizeBytes(), r.GetImages(), list(r.GetLayers()), r.GetRootHash(), r.GetSalt()})
	}
	for _, v := range i.GetVariants() {
		d.Variants = append(d.Variants, variantView{v.GetDigest(), v.GetPlatform(), v.GetHere()})
	}
	for _, r := range i.GetReferrers() {
		d.Referrers = append(d.Referrers, referrerView{r.GetDigest(), r.GetArtifactType(), r.GetSizeBytes()})
	}
	for _, l := range i.GetLayers() {
		d.Layers = append(d.Layers, layerView{l.GetDigest(), l.GetMediaType(), l.GetSizeBytes()})
	}
	if len(i.GetConfigJson()) > 0 {
		var whole struct {
			Author string         `json:"author"`
			Config map[string]any `json:"config"`
			RootFS struct {
				DiffIDs []string `json:"diff_ids"`
			} `json:"rootfs"`
		}
		if err := json.Unmarshal(i.GetConfigJson(), &whole); err != nil {
			return d, fmt.Errorf("reading the config of image %s: %w", i.GetDigest(), err)
		}
		d.Author, d.Config, d.DiffIDs = whole.Author, whole.Config, list(whole.RootFS.DiffIDs)
	}
	return d, nil
}

type baseView struct {
	Name        string     `json:"name"`
	Digest      string     `json:"digest"` // empty: not built yet
	BuiltAt     *time.Time `json:"builtAt"`
	Description string     `json:"description"`
	SizeBytes   int64      `json:"sizeBytes"` // of the built image's compressed layers; 0: not built yet
	Aliases     []string   `json:"aliases"`
}

func newBaseView(b *atollv1.Base) baseView {
	return baseView{b.GetName(), b.GetDigest(), clockOrNil(b.GetBuiltAt()), b.GetDescription(), b.GetSizeBytes(), list(b.GetAliases())}
}

type kernelView struct {
	Name         string    `json:"name"`
	Version      string    `json:"version"`
	Digest       string    `json:"digest"`
	Architecture string    `json:"architecture"`
	Source       string    `json:"source"`
	Args         string    `json:"args"`
	SizeBytes    int64     `json:"sizeBytes"`
	Default      bool      `json:"default"`
	CreatedAt    time.Time `json:"createdAt"`
	Path         string    `json:"path"`
	Modules      []string  `json:"modules"` // in load order
	ConfigDigest string    `json:"configDigest"`
}

func newKernelView(k *atollv1.Kernel) kernelView {
	return kernelView{
		k.GetName(), k.GetVersion(), k.GetDigest(), k.GetArchitecture(), k.GetSource(), k.GetArgs(), k.GetSizeBytes(), k.GetDefault(),
		clock(k.GetCreatedAt()), k.GetPath(), list(k.GetModules()), k.GetConfigDigest(),
	}
}

type profileView struct {
	Name      string         `json:"name"`
	Source    string         `json:"source"`
	Spec      map[string]any `json:"spec"` // as protobuf's JSON
	CreatedAt time.Time      `json:"createdAt"`
	UpdatedAt time.Time      `json:"updatedAt"`
}

func newProfileView(p *atollv1.Profile) (profileView, error) {
	v := profileView{p.GetName(), string(p.GetSource()), nil, clock(p.GetCreatedAt()), clock(p.GetUpdatedAt())}
	spec, err := protojson.Marshal(p.GetSpec())
	if err == nil {
		err = json.Unmarshal(spec, &v.Spec)
	}
	if err != nil {
		return v, fmt.Errorf("profile %q: %w", v.Name, err)
	}
	return v, nil
}

type eventView struct {
	Seq        uint64    `json:"seq"`
	Time       time.Time `json:"time"`
	Type       string    `json:"type"`
	Action     string    `json:"action"`
	ID         string    `json:"id"`
	Attributes labels    `json:"attributes"`
}

// String is a line of atoll events.
func (v eventView) String() string {
	s := fmt.Sprintf("%s %s %s %s", v.Time.Local().Format(time.RFC3339Nano), v.Type, v.Action, v.ID)
	if len(v.Attributes) > 0 {
		s += " (" + strings.ReplaceAll(v.Attributes.String(), ",", ", ") + ")"
	}
	return s
}

func newEventView(e *atollv1.Event) eventView {
	v := eventView{e.GetSeq(), clock(e.GetTime()), e.GetType(), e.GetAction(), e.GetId(), e.GetAttributes()}
	if v.Attributes == nil {
		v.Attributes = labels{}
	}
	return v
}

type versionView struct {
	Client buildView   `json:"client"`
	Server *serverView `json:"server"`
}

type buildView struct {
	Version   string `json:"version"`
	Commit    string `json:"commit"`
	GoVersion string `json:"goVersion"`
	Platform  string `json:"platform"`
}

type serverView struct {
	buildView
	PID  int32  `json:"pid"`
	Home string `json:"home"`
}

type checkView struct {
	Name    string `json:"name"`
	Level   string `json:"level"` // ok, warn, fail
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

func clock(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func clockOrNil(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// list is s, and [] in JSON where s is nil.
func list(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
