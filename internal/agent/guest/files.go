package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path"
	"strings"
	"syscall"
	"unicode/utf8"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
	"github.com/atollvm/atoll/internal/filetar"
)

// fileChunk is how much of a tar stream goes into one message to the host, which takes no more than 64 KiB.
const fileChunk = 64 << 10

// rooted makes a path absolute and keeps its end: "/" and "/." say that a link there is followed.
func rooted(p string) string {
	if strings.HasPrefix(p, "/") {
		return p
	}
	return "/" + p
}

// statFile answers with what a path leads to.
func (a *Agent) statFile(s net.Conn, req *agentv1.StatFile) {
	reply, err := a.stat(rooted(req.GetPath()))
	if err != nil {
		reply = &agentv1.StatFileReply{Error: err.Error(), Failure: fileFailure(err)}
	}
	transport.WriteMsg(s, reply)
}

func (a *Agent) stat(p string) (*agentv1.StatFileReply, error) {
	if !a.ready() {
		return nil, errNotReady
	}
	fi, err := os.Lstat(p)
	if err != nil {
		return nil, fileError(p, err)
	}
	reply := &agentv1.StatFileReply{Name: fi.Name(), Mode: fi.Sys().(*syscall.Stat_t).Mode, Size: fi.Size(), ModUnixNanos: fi.ModTime().UnixNano()}
	if fi.Mode()&fs.ModeSymlink != 0 {
		if reply.LinkTarget, err = follow(p); err != nil {
			return nil, fileError(p, err)
		}
	}
	if !utf8.ValidString(reply.GetName()) || !utf8.ValidString(reply.GetLinkTarget()) {
		return nil, fmt.Errorf("%q: its name is not UTF-8: %w", p, syscall.EINVAL)
	}
	return reply, nil
}

// follow goes along links to the last one's target, which need not be there.
func follow(p string) (string, error) {
	const most = 40 // as the kernel
	for range most {
		target, err := os.Readlink(p)
		if errors.Is(err, syscall.EINVAL) || errors.Is(err, fs.ErrNotExist) {
			return p, nil
		}
		if err != nil {
			return "", err
		}
		if !path.IsAbs(target) {
			target = path.Dir(p) + "/" + target
		}
		p = target
	}
	return "", syscall.ELOOP
}

// getFiles sends a file or a tree as a tar stream.
func (a *Agent) getFiles(s net.Conn, req *agentv1.GetFiles) {
	p := rooted(req.GetPath())
	w := bufio.NewWriterSize(writerFunc(func(b []byte) (int, error) {
		return len(b), transport.WriteMsg(s, &agentv1.FilesReply{Data: b})
	}), fileChunk)
	err := errNotReady
	if a.ready() {
		err = filetar.Pack(chunks{w}, p, filetar.PackOptions{Follow: req.GetFollow()})
	}
	if err == nil {
		err = w.Flush()
	}
	finishFiles(s, err)
}

// chunks hides that a bufio.Writer passes long writes on whole.
type chunks struct{ w *bufio.Writer }

func (c chunks) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		var m int
		m, err = c.w.Write(b[:min(len(b), c.w.Available())])
		if n += m; err == nil && c.w.Available() == 0 {
			err = c.w.Flush()
		}
		b = b[m:]
	}
	return n, err
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// putFiles unpacks the tar stream that follows.
func (a *Agent) putFiles(s net.Conn, req *agentv1.PutFiles) {
	err := errNotReady
	if a.ready() {
		content := &contentReader{stream: s}
		err = filetar.Unpack(context.Background(), content, rooted(req.GetPath()), filetar.UnpackOptions{
			Owners: req.GetKeepOwners(), Trusted: true, NoReplaceKind: req.GetNoReplaceKind(), FollowLinks: true,
		})
		if err == nil {
			_, err = io.Copy(io.Discard, content) // what follows the archive
		}
		if errors.Is(err, io.ErrUnexpectedEOF) { // "unexpected EOF" would tell the host's user that a connection broke
			err = errors.New("the archive ends in the middle, or is none")
		}
	}
	finishFiles(s, err)
}

// contentReader reads the bytes that the host sends as Content.
type contentReader struct {
	stream net.Conn
	rest   []byte
	end    bool
}

func (c *contentReader) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.end {
			return 0, io.EOF
		}
		m := &agentv1.Content{}
		if err := transport.ReadMsg(c.stream, m); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF // the host gave up: what it sent is not whole
			}
			return 0, err
		}
		c.rest, c.end = m.GetData(), m.GetEnd()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func finishFiles(s net.Conn, err error) {
	if err != nil {
		transport.WriteMsg(s, &agentv1.FilesReply{Error: err.Error(), Failure: fileFailure(err)})
		return
	}
	transport.WriteMsg(s, &agentv1.FilesReply{Done: true})
}

func fileError(p string, err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		err = errno
	}
	return fmt.Errorf("%q: %w", p, err)
}

func fileFailure(err error) agentv1.FailureClass {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return agentv1.FailureClass_FAILURE_CLASS_NOT_FOUND
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG):
		return agentv1.FailureClass_FAILURE_CLASS_INVALID
	}
	return agentv1.FailureClass_FAILURE_CLASS_UNSPECIFIED
}
