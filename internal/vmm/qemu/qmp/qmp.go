// Package qmp speaks QEMU's machine protocol: one JSON object a line, commands one way, replies and events the other.
// It knows nothing of machines. A Client may be used from several goroutines.
// https://www.qemu.org/docs/master/interop/qmp-spec.html
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	maxLine   = 1 << 20 // the longest replies (query-qmp-schema) take about 200 KiB
	keptEvent = 64      // events a reader may lag behind before they are dropped
)

// Event is something that QEMU says unasked.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// Error is QEMU's refusal of a command.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return e.Desc }

// Client is one QMP session.
type Client struct {
	conn   net.Conn
	events chan Event
	ended  chan struct{} // closed when the reader has ended
	write  sync.Mutex    // one command line at a time

	mu      sync.Mutex // guards the rest
	next    uint64
	waiting map[string]chan reply
	err     error // why the session ended
}

type reply struct {
	result json.RawMessage
	err    error
}

// message is any line that QEMU sends.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *Error          `json:"error"`
	ID       json.RawMessage `json:"id"`
	Event
}

// New waits for QEMU's greeting on conn and leaves negotiation mode. The client owns conn, also when New fails.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	err := greeting(lines)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("reading the QMP greeting: %w", err)
	}
	c := &Client{conn: conn, events: make(chan Event, keptEvent), ended: make(chan struct{}), waiting: map[string]chan reply{}}
	go c.read(lines)
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func greeting(lines *bufio.Scanner) error {
	if !lines.Scan() {
		return endOf(lines)
	}
	var m message
	if err := json.Unmarshal(lines.Bytes(), &m); err != nil || m.Greeting == nil {
		return fmt.Errorf("no QMP greeting but %.80q", lines.Text())
	}
	return nil
}

func endOf(lines *bufio.Scanner) error {
	if err := lines.Err(); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF
}

// read hands out what QEMU sends until the connection ends; a line that makes no sense is skipped.
func (c *Client) read(lines *bufio.Scanner) {
	defer close(c.ended)
	defer close(c.events)
	for lines.Scan() {
		var m message
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			continue
		}
		switch {
		case m.Name != "":
			select {
			case c.events <- m.Event:
			default: // nobody listens; a reply must not wait for that
			}
		case m.Error != nil:
			c.answer(m.ID, reply{err: m.Error})
		case m.Return != nil:
			c.answer(m.ID, reply{result: m.Return})
		}
	}
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = fmt.Errorf("QMP connection ended: %w: %w", endOf(lines), errdefs.ErrUnavailable)
	for id, w := range c.waiting {
		delete(c.waiting, id)
		w <- reply{err: c.err}
	}
}

func (c *Client) answer(id json.RawMessage, r reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w, ok := c.waiting[string(id)]; ok {
		delete(c.waiting, string(id))
		w <- r
	}
}

// Execute runs one command and stores what it returns in out. args and out may be nil. A refusal by QEMU is an *Error.
func (c *Client) Execute(ctx context.Context, command string, args, out any) error {
	if err := c.execute(ctx, command, args, out); err != nil {
		return fmt.Errorf("executing QMP %s: %w", command, err)
	}
	return nil
}

func (c *Client) execute(ctx context.Context, command string, args, out any) error {
	id, wait, err := c.expect()
	if err != nil {
		return err
	}
	defer c.forget(id)
	line, err := json.Marshal(struct {
		Execute   string          `json:"execute"`
		Arguments any             `json:"arguments,omitempty"`
		ID        json.RawMessage `json:"id"`
	}{command, args, json.RawMessage(id)})
	if err != nil {
		return err
	}
	if err := c.send(ctx, append(line, '\n')); err != nil {
		return err
	}
	select {
	case r := <-wait:
		if r.err != nil || out == nil {
			return r.err
		}
		return json.Unmarshal(r.result, out)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *Client) expect() (string, chan reply, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return "", nil, c.err
	}
	c.next++
	id, wait := strconv.FormatUint(c.next, 10), make(chan reply, 1)
	c.waiting[id] = wait
	return id, wait, nil
}

func (c *Client) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

func (c *Client) send(ctx context.Context, line []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	// A command that is cut short would spoil every later one, so the end of ctx during a write ends the session.
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	_, err := c.conn.Write(line)
	if !stop() && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// Events delivers what QEMU says unasked; it is closed when the session ends. Events that nobody takes are dropped.
func (c *Client) Events() <-chan Event { return c.events }

// Close ends the session and waits for its reader.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.ended
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
