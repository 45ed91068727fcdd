package cli

import (
	"time"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"google.golang.org/protobuf/types/known/durationpb"
)

// guestView is the part of a spec that guestFlags and healthFlags fill.
type guestView struct {
	ReadOnly    bool            `json:"readOnly"`
	Tmpfs       []tmpfsView     `json:"tmpfs"`
	Ulimits     []ulimitView    `json:"ulimits"`
	Sysctls     labels          `json:"sysctls"`
	AddHosts    []hostEntryView `json:"addHosts"`
	DNS         []string        `json:"dns"`
	DNSSearch   []string        `json:"dnsSearch"`
	DNSOptions  []string        `json:"dnsOptions"`
	PublishAll  bool            `json:"publishAll"`
	KernelArgs  []string        `json:"kernelArgs"`
	HealthCheck *checkSpecView  `json:"healthCheck"` // what was asked for; null: nothing
}

type tmpfsView struct {
	Path    string `json:"path"`
	Options string `json:"options"`
}

type ulimitView struct {
	Name string `json:"name"`
	Soft int64  `json:"soft"` // -1: unlimited
	Hard int64  `json:"hard"`
}

type hostEntryView struct {
	Address string   `json:"address"`
	Names   []string `json:"names"`
}

type checkSpecView struct {
	Test          words  `json:"test"`
	Interval      string `json:"interval"`
	Timeout       string `json:"timeout"`
	StartPeriod   string `json:"startPeriod"`
	StartInterval string `json:"startInterval"`
	Retries       uint32 `json:"retries"`
}

func newGuestView(s *atollv1.MachineSpec) guestView {
	v := guestView{
		ReadOnly: s.GetReadOnly(), Tmpfs: []tmpfsView{}, Ulimits: []ulimitView{}, Sysctls: s.GetSysctls(), AddHosts: []hostEntryView{},
		DNS: list(s.GetDns()), DNSSearch: list(s.GetDnsSearch()), DNSOptions: list(s.GetDnsOptions()), PublishAll: s.GetPublishAll(),
		KernelArgs: list(s.GetKernelArgs()), HealthCheck: newCheckView(s.GetHealthCheck()),
	}
	if v.Sysctls == nil {
		v.Sysctls = labels{}
	}
	for _, t := range s.GetTmpfs() {
		v.Tmpfs = append(v.Tmpfs, tmpfsView{t.GetPath(), t.GetOptions()})
	}
	for _, u := range s.GetUlimits() {
		v.Ulimits = append(v.Ulimits, ulimitView{u.GetName(), u.GetSoft(), u.GetHard()})
	}
	for _, h := range s.GetAddHosts() {
		v.AddHosts = append(v.AddHosts, hostEntryView{h.GetAddress(), list(h.GetNames())})
	}
	return v
}

func newCheckView(c *atollv1.HealthCheck) *checkSpecView {
	if c == nil {
		return nil
	}
	text := func(d *durationpb.Duration) string {
		if d == nil {
			return ""
		}
		return d.AsDuration().String()
	}
	return &checkSpecView{
		Test: list(c.GetTest()), Interval: text(c.GetInterval()), Timeout: text(c.GetTimeout()), StartPeriod: text(c.GetStartPeriod()),
		StartInterval: text(c.GetStartInterval()), Retries: c.GetRetries(),
	}
}

// healthView is what the health check has shown, and the check as it is made.
type healthView struct {
	Status        string             `json:"status"`
	FailingStreak uint32             `json:"failingStreak"`
	Check         *checkSpecView     `json:"check"`
	Log           []healthResultView `json:"log"` // the last five
}

type healthResultView struct {
	Start    time.Time `json:"start"`
	End      time.Time `json:"end"`
	ExitCode int32     `json:"exitCode"`
	Output   string    `json:"output"`
}

func newHealthView(h *atollv1.HealthStatus) *healthView {
	if h == nil {
		return nil
	}
	v := &healthView{Status: h.GetStatus(), FailingStreak: h.GetFailingStreak(), Check: newCheckView(h.GetCheck()), Log: []healthResultView{}}
	for _, r := range h.GetLog() {
		v.Log = append(v.Log, healthResultView{clock(r.GetStart()), clock(r.GetEnd()), r.GetExitCode(), r.GetOutput()})
	}
	return v
}

// healthNote is what Docker adds to the status of a machine that runs.
func healthNote(h *atollv1.HealthStatus) string {
	switch s := h.GetStatus(); s {
	case "":
		return ""
	case "starting":
		return " (health: starting)"
	default:
		return " (" + s + ")"
	}
}
