package guest

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/guest/container"
	"github.com/atollvm/atoll/internal/agent/guest/mounts"
	"github.com/atollvm/atoll/internal/agent/guest/process"
	"github.com/atollvm/atoll/internal/agent/transport"
)

// container runs a process in a container of its own. The host hears of its end when the guest holds nothing of the container's root
// and mounts any more, so that it may take them away.
func (a *Agent) container(s net.Conn, req *agentv1.Container) {
	in := &input{stream: s}
	if !a.ready() {
		in.send(execError(errNotReady))
		return
	}
	sp := spec(req.GetProcess(), "container-"+strconv.FormatUint(a.execs.Add(1), 10))
	sp.MakeDir = true
	last, err := a.runContainer(in, req, sp)
	if err != nil {
		last = execError(err)
	}
	in.send(last)
	os.Remove(sp.Cgroup)
}

func (a *Agent) runContainer(in *input, req *agentv1.Container, sp process.Spec) (*agentv1.ExecOutput, error) {
	group, err := process.OpenCgroup(sp.Cgroup)
	if err != nil {
		return nil, err
	}
	defer group.Close()
	sp.CgroupFile = group
	c, err := container.Open(req)
	if err != nil {
		return nil, fmt.Errorf("making the container: %w", err)
	}
	defer func() {
		c.Close()
		mounts.Forget()
	}()
	p, err := startIn(c, a.processes, sp)
	if err != nil {
		return nil, err
	}
	a.setContainer(req.GetId(), c)
	defer a.setContainer(req.GetId(), nil)
	go func() {
		<-p.Done()
		c.End() // what it left behind goes with it, as with a container's PID 1
	}()
	return attend(in, p), nil
}

func startIn(c *container.Container, s *process.Supervisor, sp process.Spec) (p *process.Process, err error) {
	if gone := c.Do(func() { p, err = s.Start(sp) }); gone != nil {
		return nil, gone
	}
	return p, err
}

// acceptIn hands the host one connection to a socket of a container.
func (a *Agent) acceptIn(s net.Conn, req *agentv1.Accept) {
	a.mu.Lock()
	c := a.containers[req.GetContainer()]
	a.mu.Unlock()
	if c == nil {
		transport.WriteMsg(s, &agentv1.AcceptReply{Error: fmt.Sprintf("container %q does not run", req.GetContainer())})
		return
	}
	conn, err := c.Accept(req.GetMount())
	if err != nil {
		transport.WriteMsg(s, &agentv1.AcceptReply{Error: err.Error()})
		return
	}
	defer conn.Close()
	if transport.WriteMsg(s, &agentv1.AcceptReply{}) != nil {
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(conn, s)
		conn.CloseWrite()
	}()
	io.Copy(s, conn)
	s.Close() // the host's end may still send
	<-ended
}

// startInside starts one more process in a container.
func (a *Agent) startInside(id string, sp process.Spec) (*process.Process, error) {
	a.mu.Lock()
	c := a.containers[id]
	a.mu.Unlock()
	if c == nil {
		return nil, fmt.Errorf("container %q does not run", id)
	}
	group, err := process.OpenCgroup(sp.Cgroup)
	if err != nil {
		return nil, err
	}
	defer group.Close()
	sp.CgroupFile = group
	p, err := startIn(c, a.processes, sp)
	if err != nil {
		os.Remove(sp.Cgroup) // Start cannot, in there
	}
	return p, err
}

func (a *Agent) setContainer(id string, c *container.Container) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c == nil {
		delete(a.containers, id)
		return
	}
	if a.containers == nil {
		a.containers = map[string]*container.Container{}
	}
	a.containers[id] = c
}

// ready says whether processes may be started.
func (a *Agent) ready() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.entrypoint != nil || a.waiting
}
