package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/containerd/errdefs"
)

// maxPath is the longest path that a guest may answer with, as its own kernel has it.
const maxPath = 4096

// StatFile tells what is at a path of the guest. Names in the answer are the guest's: they are not for a terminal as they are.
func (c *Client) StatFile(ctx context.Context, name string) (*agentv1.StatFileReply, error) {
	reply := &agentv1.StatFileReply{}
	if err := c.ask(ctx, &agentv1.Request{Kind: &agentv1.Request_StatFile{StatFile: &agentv1.StatFile{Path: name}}}, reply); err != nil {
		return nil, err
	}
	if reply.GetError() != "" {
		return nil, &Failure{Class: reply.GetFailure(), Message: printable(reply.GetError())}
	}
	if t := reply.GetLinkTarget(); len(t) > maxPath || len(reply.GetName()) > maxPath || t != "" && !path.IsAbs(t) || strings.Contains(t, "\x00") {
		return nil, c.violation()
	}
	return reply, nil
}

// GetFiles writes the tar stream of a file or tree of the guest. The stream is the guest's word: whoever unpacks it must not trust it.
func (c *Client) GetFiles(ctx context.Context, req *agentv1.GetFiles, w io.Writer) error {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_GetFiles{GetFiles: req}})
	if err != nil {
		return err
	}
	defer s.Close()
	for {
		reply := &agentv1.FilesReply{}
		if err := s.recv(reply); err != nil {
			return err
		}
		switch {
		case reply.GetError() != "" || reply.GetDone():
			return outcome(reply)
		case len(reply.GetData()) > maxChunk || len(reply.GetData()) == 0:
			return c.violation()
		}
		if _, err := w.Write(reply.GetData()); err != nil {
			return err
		}
	}
}

// PutFiles has the guest unpack a tar stream.
func (c *Client) PutFiles(ctx context.Context, req *agentv1.PutFiles, r io.Reader) error {
	s, err := c.open(ctx, &agentv1.Request{Kind: &agentv1.Request_PutFiles{PutFiles: req}})
	if err != nil {
		return err
	}
	defer s.Close()
	// The guest may have had enough before all was sent.
	answered := make(chan error, 1)
	go func() {
		reply := &agentv1.FilesReply{}
		err := s.recv(reply)
		if err == nil {
			err = outcome(reply)
		}
		answered <- err
		if err != nil {
			s.hangUp() // wakes send
		}
	}()
	sent := s.sendArchive(r)
	var broken *readError
	if errors.As(sent, &broken) {
		s.Close() // so that the guest does not take what it has for the whole
		<-answered
		return broken.error
	}
	return <-answered
}

// readError is a fault of what is to be sent, not of the channel.
type readError struct{ error }

func (s *stream) sendArchive(r io.Reader) error {
	buf := make([]byte, 2*maxChunk)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if err := s.send(&agentv1.Content{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return s.send(&agentv1.Content{End: true})
		}
		if err != nil {
			return &readError{err}
		}
	}
}

func outcome(r *agentv1.FilesReply) error {
	switch {
	case r.GetError() != "":
		return &Failure{Class: r.GetFailure(), Message: printable(r.GetError())}
	case !r.GetDone():
		return fmt.Errorf("unpacking files: the guest's agent says neither that it is done nor what went wrong: %w", errdefs.ErrDataLoss)
	}
	return nil
}
