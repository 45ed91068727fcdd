package transport

import (
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// MaxMessage is the longest message that either end takes, in bytes.
const MaxMessage = 1 << 20

// Message is a message of the agent protocol, with the code that is generated for it: proto's own first builds tables by reflection,
// which took 50 ms of every emulated boot.
type Message interface {
	proto.Message
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
	UnmarshalVT([]byte) error
}

// ReadMsg reads one message into an empty one. io.EOF: the stream ended between messages. The sender is trusted: see ReadStranger.
func ReadMsg(r io.Reader, m Message) error {
	body, err := ReadBody(r, nil)
	if err != nil {
		return err
	}
	return m.UnmarshalVT(body)
}

// ReadStranger is ReadMsg for what a guest sends: it also holds to what protobuf says of a message, such as that words are UTF-8.
func ReadStranger(r io.Reader, m Message) error {
	body, err := ReadBody(r, nil)
	if err != nil {
		return err
	}
	return proto.Unmarshal(body, m)
}

// ReadBody reads one message as it is on the wire, into buf if that is large enough.
func ReadBody(r io.Reader, buf []byte) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > MaxMessage {
		return nil, fmt.Errorf("message of %d bytes is longer than %d", size, MaxMessage)
	}
	if uint32(cap(buf)) < size {
		buf = make([]byte, size)
	}
	body := buf[:size]
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return body, nil
}

// OnlyBytes returns what a message holds that is nothing but that field, of kind bytes. It is a part of body.
func OnlyBytes(body []byte, field protowire.Number) ([]byte, bool) {
	n, kind, head := protowire.ConsumeTag(body)
	if head < 0 || n != field || kind != protowire.BytesType {
		return nil, false
	}
	data, size := protowire.ConsumeBytes(body[head:])
	return data, size == len(body)-head
}

// Piece is memory for messages that are nothing but one field of kind bytes: what is read into it is sent from there.
type Piece struct {
	field protowire.Number
	buf   []byte
}

// pieceHead is the most that goes before the data: the message's length, the field's tag and length.
const pieceHead = 4 + 5 + 5

// NewPiece makes one for size bytes.
func NewPiece(field protowire.Number, size int) *Piece {
	return &Piece{field, make([]byte, pieceHead+size)}
}

// Data is where the data belongs.
func (p *Piece) Data() []byte { return p.buf[pieceHead:] }

// Write sends the first n bytes of Data.
func (p *Piece) Write(w io.Writer, n int) error {
	var head [pieceHead]byte
	h := protowire.AppendTag(head[:4], p.field, protowire.BytesType)
	h = protowire.AppendVarint(h, uint64(n))
	binary.BigEndian.PutUint32(h, uint32(len(h)-4+n))
	start := pieceHead - len(h)
	copy(p.buf[start:], h)
	_, err := w.Write(p.buf[start : pieceHead+n])
	return err
}

// WriteMsg writes one message in one piece.
func WriteMsg(w io.Writer, m Message) error {
	size := m.SizeVT()
	if size > MaxMessage {
		return fmt.Errorf("message of %d bytes is longer than %d", size, MaxMessage)
	}
	frame := make([]byte, 4+size)
	binary.BigEndian.PutUint32(frame, uint32(size))
	if _, err := m.MarshalToSizedBufferVT(frame[4:]); err != nil {
		return err
	}
	_, err := w.Write(frame)
	return err
}
