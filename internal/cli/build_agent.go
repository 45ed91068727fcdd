package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/hint"
)

// agentDial opens a connection to an SSH agent.
type agentDial func(context.Context) (net.Conn, error)

func (c *buildCall) readAgents() error {
	given := c.ssh
	url := c.start.GetContextUrl()
	if _, ok := c.env.LookupEnv("SSH_AUTH_SOCK"); ok && len(given) == 0 && (strings.HasPrefix(url, "ssh://") || scp.MatchString(url)) {
		given = []string{"default"} // as Docker does for a git context over SSH
	}
	for _, g := range given {
		id, paths, _ := strings.Cut(g, "=")
		if id == "" {
			return usagef("--ssh %q: write it as default, ID, ID=SOCKET or ID=KEY", g)
		}
		if c.agents[id] != nil {
			return usagef("--ssh %q: this ID has been given before", g)
		}
		dial, err := c.agent(paths)
		if err != nil {
			return fmt.Errorf("--ssh %s: %w", g, err)
		}
		c.agents[id] = dial
		c.start.Ssh = append(c.start.Ssh, id)
	}
	return nil
}

// agent makes an agent of a socket, or of key files.
func (c *buildCall) agent(paths string) (agentDial, error) {
	if paths == "" {
		socket, ok := c.env.LookupEnv("SSH_AUTH_SOCK")
		if !ok || socket == "" {
			return nil, hint.With(fmt.Errorf("SSH_AUTH_SOCK is not set: %w", errdefs.ErrFailedPrecondition),
				"start an agent (eval $(ssh-agent); ssh-add), or give a key: --ssh default=FILE")
		}
		paths = socket
	}
	if info, err := os.Stat(paths); err == nil && info.Mode()&os.ModeSocket != 0 {
		return func(ctx context.Context) (net.Conn, error) { return dialAgent(ctx, paths) }, nil
	}
	keys := agent.NewKeyring()
	for path := range strings.SplitSeq(paths, ",") {
		if err := addKey(keys, path); err != nil {
			return nil, err
		}
	}
	return func(context.Context) (net.Conn, error) { return serveAgent(keys), nil }, nil
}

func addKey(keys agent.Agent, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	key, err := ssh.ParseRawPrivateKey(data)
	if missing := (*ssh.PassphraseMissingError)(nil); errors.As(err, &missing) {
		return hint.With(fmt.Errorf("key %s has a passphrase: %w", path, errdefs.ErrInvalidArgument), "add it to an agent (ssh-add %s) and give --ssh default", path)
	}
	if err != nil {
		return fmt.Errorf("%s is neither a socket nor a private key: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return keys.Add(agent.AddedKey{PrivateKey: key})
}

// dialAgent connects to a user's agent. What a build step may ask of it is to list keys and to sign.
func dialAgent(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connecting to the SSH agent: %w", err)
	}
	return serveAgentThen(signingOnly{agent.NewClient(conn)}, conn), nil
}

func serveAgent(a agent.Agent) net.Conn { return serveAgentThen(signingOnly{a}, nil) }

func serveAgentThen(a agent.Agent, then io.Closer) net.Conn {
	ours, theirs := net.Pipe()
	go func() { // ends when ours is closed
		_ = agent.ServeAgent(a, theirs)
		theirs.Close()
		if then != nil {
			then.Close()
		}
	}()
	return ours
}

// signingOnly refuses to change an agent.
type signingOnly struct{ agent.Agent }

var errSigningOnly = errors.New("a build may list keys and sign, nothing else")

func (signingOnly) Add(agent.AddedKey) error       { return errSigningOnly }
func (signingOnly) Remove(ssh.PublicKey) error     { return errSigningOnly }
func (signingOnly) RemoveAll() error               { return errSigningOnly }
func (signingOnly) Lock([]byte) error              { return errSigningOnly }
func (signingOnly) Unlock([]byte) error            { return errSigningOnly }
func (signingOnly) Signers() ([]ssh.Signer, error) { return nil, errSigningOnly }

// agentConns are the connections that the daemon has opened to this side's agents.
type agentConns struct {
	stream *buildStream
	agents map[string]agentDial

	mu    sync.Mutex
	conns map[uint32]net.Conn // guarded by mu
}

func newAgentConns(stream *buildStream, agents map[string]agentDial) *agentConns {
	return &agentConns{stream: stream, agents: agents, conns: map[uint32]net.Conn{}}
}

func (a *agentConns) send(number uint32, data []byte, end bool) error {
	return a.stream.send(&atollv1.BuildRequest{Kind: &atollv1.BuildRequest_Agent{Agent: &atollv1.AgentData{Connection: number, Data: data, Close: end}}})
}

// take does what the daemon says of one connection.
func (a *agentConns) take(ctx context.Context, d *atollv1.AgentData) {
	a.mu.Lock()
	conn := a.conns[d.GetConnection()]
	a.mu.Unlock()
	if conn == nil {
		dial := a.agents[d.GetId()]
		if dial == nil {
			return
		}
		var err error
		if conn, err = dial(ctx); err != nil {
			_ = a.send(d.GetConnection(), nil, true) // the stream's end is seen where it is read
			return
		}
		a.mu.Lock()
		a.conns[d.GetConnection()] = conn
		a.mu.Unlock()
		go a.answer(d.GetConnection(), conn)
	}
	if _, err := conn.Write(d.GetData()); err != nil || d.GetClose() {
		conn.Close()
	}
}

// answer sends what an agent says until its connection ends.
func (a *agentConns) answer(number uint32, conn net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := conn.Read(buf)
		if n > 0 && a.send(number, buf[:n], false) != nil {
			return
		}
		if err != nil {
			_ = a.send(number, nil, true) // the stream's end is seen where it is read
			a.mu.Lock()
			delete(a.conns, number)
			a.mu.Unlock()
			return
		}
	}
}

func (a *agentConns) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.Close()
	}
}
