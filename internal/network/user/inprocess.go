package user

import (
	"context"
	"log/slog"

	"github.com/atollvm/atoll/internal/network"
)

// InProcess is a network that works in this process and ends with it: for machines that do so as well. It is Closed by whoever opens
// it, and may be used from several goroutines.
type InProcess struct{ seg *segment }

// OpenInProcess starts a network whose sockets are in dir. resolvConf names the host's resolvers.
func OpenInProcess(dir string, n network.Network, resolvConf string, log *slog.Logger) (*InProcess, error) {
	seg, err := newSegment(context.Background(), dir, n, resolvConf, log)
	if err != nil {
		return nil, err
	}
	return &InProcess{seg}, nil
}

// Attach is network.Driver's.
func (p *InProcess) Attach(e network.Endpoint) (network.Attachment, error) { return p.seg.attach(e) }

// Close ends the network and every connection over it.
func (p *InProcess) Close() { p.seg.close() }
