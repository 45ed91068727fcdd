package guest

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/guest/provision"
	"github.com/atollvm/atoll/internal/agent/transport"
)

// telling is what the host hears of a configuration. The host may go meanwhile; the machine is made all the same, and the next host
// finds it configured.
type telling struct {
	host io.Writer

	mu   sync.Mutex // guards what follows, and the order of what is told
	last string
}

func (t *telling) tell(p *agentv1.Progress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.UptimeNanos = int64(uptime())
	transport.WriteMsg(t.host, p)
}

// step says that a step begins.
func (t *telling) step(name string) {
	t.mu.Lock()
	t.last = name
	t.mu.Unlock()
	t.tell(&agentv1.Progress{Step: name})
}

// output passes on what a command of the step writes, in pieces that the host takes.
func (t *telling) output(data []byte) {
	const most = 32 << 10
	for piece := range slices.Chunk(data, most) {
		t.tell(&agentv1.Progress{Output: piece})
	}
}

// failed says that the step has failed.
func (t *telling) failed(err error) {
	t.mu.Lock()
	p := failed(t.last, err)
	t.mu.Unlock()
	t.tell(p)
}

// provisioning is the provisioning of a configuration in its three parts; nil parts have nothing to do.
type provisioning struct{ early, files, late func() error }

// provision prepares what is asked for. contents is where the host sends what belongs to it.
func (a *Agent) provision(c *agentv1.Config, contents io.Reader, t *telling) provisioning {
	p := c.GetProvision()
	if p == nil {
		return provisioning{}
	}
	var r *provision.Provisioner
	part := func(do func(*provision.Provisioner) error) func() error {
		return func() (err error) {
			if r == nil { // now, as there is the root
				if r, err = provision.New(p, provision.Options{
					Root: "/", Contents: contents, Init: c.GetInit(), Env: proxies(c.GetProcess().GetEnv()), Run: a.runProvision, Output: t.output,
					Step: func(name string) { t.step("provisioning: " + name) },
				}); err != nil {
					return err
				}
			}
			return do(r)
		}
	}
	if len(p.GetUnits()) > 0 && !c.GetInit() {
		return provisioning{early: func() error {
			t.step("provisioning: units")
			return fmt.Errorf("systemd unit %q: systemd is not this machine's init (systemd.units needs it): run the image with --init image", p.GetUnits()[0].GetName())
		}}
	}
	return provisioning{
		early: part((*provision.Provisioner).Early),
		files: part((*provision.Provisioner).Files),
		late: part(func(r *provision.Provisioner) error {
			defer r.Close()
			return r.Late()
		}),
	}
}

// proxies are the settings of the entrypoint's environment that who fetches packages needs too.
func proxies(env []string) (out []string) {
	for _, e := range env {
		switch name, _, _ := strings.Cut(e, "="); strings.ToLower(name) {
		case "http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy":
			out = append(out, e)
		}
	}
	return out
}

// runProvision runs a command to its end: its own, not that of what it leaves behind, also when that has its output open.
func (a *Agent) runProvision(c provision.Command) (int, error) {
	p, err := a.processes.Start(process.Spec{
		Argv: c.Argv, Env: c.Env, Dir: "/", Cgroup: process.CgroupRoot + "/provision-" + strconv.FormatUint(a.execs.Add(1), 10),
	})
	if err != nil {
		return 0, errors.New(err.Error()) // its class is for the entrypoint
	}
	var one sync.Mutex
	output := func(data []byte) {
		one.Lock()
		defer one.Unlock()
		if c.Output != nil {
			c.Output(data)
		}
	}
	carry(p, output, output)
	code := int(p.Exit().GetCode())
	p.Release()
	return code, nil
}

// setLanguage notes the machine's locale for what is run later.
func (a *Agent) setLanguage(c *agentv1.Config) {
	a.mu.Lock()
	a.language = c.GetProvision().GetLocale()
	a.mu.Unlock()
	if p := c.GetProcess(); p != nil {
		p.Env = a.withLanguage(p.GetEnv())
	}
}

// withLanguage adds the machine's locale to an environment that says nothing of one.
func (a *Agent) withLanguage(env []string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.language == "" || slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "LANG=") }) {
		return env
	}
	return append(slices.Clone(env), "LANG="+a.language)
}
