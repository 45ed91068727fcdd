// Package plan is what the guest is to get, whatever language it was asked for in: the message to the agent, the contents that travel
// beside it, and what concerns the host. The languages (provision/ignition, provision/cloudconfig) add to a Plan; internal/provision
// puts them together. Imported by internal/provision and below. A Plan belongs to one goroutine.
package plan

import (
	"bytes"
	"io"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// Plan is what the guest gets, and what of it concerns the host. Proto messages in it may be changed until Contents is called.
type Plan struct {
	*agentv1.Provision
	Hostname   string // that a document asks for; the machine's flags beat it
	Hosts      []*agentv1.HostEntry
	NTPServers []string
	KernelArgs []string // added to the kernel's command line
	DropArgs   []string // and taken from it
	Warnings   []string

	streamed map[*agentv1.Piece]Content
}

// New returns a plan that asks for nothing.
func New() *Plan {
	return &Plan{Provision: &agentv1.Provision{}, streamed: map[*agentv1.Piece]Content{}}
}

// Content is bytes that travel beside the configuration, as they may be many.
type Content struct {
	Size int64
	Open func() (io.ReadCloser, error)
}

// mostInline is how large a piece may be to travel within the configuration, which has to fit into one frame.
const mostInline = 4 << 10

// Stream makes a piece of a file out of a content.
func (p *Plan) Stream(c Content) *agentv1.Piece {
	piece := &agentv1.Piece{Kind: &agentv1.Piece_Streamed{Streamed: uint64(c.Size)}}
	p.streamed[piece] = c
	return piece
}

// Bytes makes a piece of a file out of bytes.
func (p *Plan) Bytes(data []byte) *agentv1.Piece {
	if len(data) <= mostInline {
		return &agentv1.Piece{Kind: &agentv1.Piece_Inline{Inline: data}}
	}
	return p.Stream(Content{Size: int64(len(data)), Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }})
}

// Contents returns the streamed pieces in the order in which the agent takes them.
func (p *Plan) Contents() []Content {
	var out []Content
	for _, f := range p.GetFiles() {
		for _, piece := range append(f.GetContents()[:len(f.GetContents()):len(f.GetContents())], f.GetAppend()...) {
			if c, ok := p.streamed[piece]; ok {
				out = append(out, c)
			}
		}
	}
	return out
}
