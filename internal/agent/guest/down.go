package guest

import (
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"golang.org/x/sys/unix"
)

const (
	// restGrace is what is left to processes beside the ended entrypoint; ownGrace is for the whole guest when it goes by itself.
	restGrace = time.Second
	ownGrace  = 5 * time.Second
	killGrace = 2 * time.Second
	// ackPatience is how long a host that watches may take to note that the guest goes.
	ackPatience = 2 * time.Second
)

// goDown ends the machine. The first reason counts.
func (a *Agent) goDown(reason agentv1.GoingDown_Reason) { a.goDownFor(reason, "") }

// goDownFor is goDown with words for a person.
func (a *Agent) goDownFor(reason agentv1.GoingDown_Reason, detail string) {
	a.down.Do(func() {
		a.mu.Lock()
		a.reason = reason
		root := a.root
		a.mu.Unlock()
		seq := a.events.add(&agentv1.Event{Kind: &agentv1.Event_GoingDown{GoingDown: &agentv1.GoingDown{Reason: reason, Detail: detail}}})
		own := reason == agentv1.GoingDown_REASON_POWEROFF || reason == agentv1.GoingDown_REASON_REBOOT || reason == agentv1.GoingDown_REASON_VERITY
		grace := restGrace
		if own {
			grace = ownGrace
		}
		if !a.processes.WaitEmpty(0) {
			unix.Kill(-1, unix.SIGTERM)
			unix.Kill(-1, unix.SIGCONT) // a stopped process hears it too
			if !a.processes.WaitEmpty(grace) {
				unix.Kill(-1, unix.SIGKILL)
				a.processes.WaitEmpty(killGrace)
			}
		}
		if root != nil {
			if err := root.Down(); err != nil {
				a.log(err.Error())
			}
		}
		if own || a.events.watched() {
			a.events.waitAck(seq, ackPatience) // only the host can tell one from the other
		}
		// With reboot=t a restart ends the VMM, which has -no-reboot; power off needs ACPI.
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	})
}
