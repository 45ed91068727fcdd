// Package provision turns what an operator wrote, in whatever language (flags, Ignition, Butane, cloud-config, scripts), into the one
// thing that the guest's agent understands. It owns the languages; the sub-packages are one each and know the Plan only. When it is
// applied, where a request is kept and what a failure means to a machine is internal/machine's.
// Imported by machine, server and daemon. A Plan belongs to one goroutine.
package provision

import (
	"bytes"
	"io"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

// Plan is what the guest gets, and what of it concerns the host.
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

// NewPlan returns a plan that asks for nothing.
func NewPlan() *Plan {
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
