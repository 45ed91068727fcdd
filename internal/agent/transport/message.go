package transport

import (
	"encoding/binary"
	"fmt"
	"io"

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
	body, err := readFrame(r)
	if err != nil {
		return err
	}
	return m.UnmarshalVT(body)
}

// ReadStranger is ReadMsg for what a guest sends: it also holds to what protobuf says of a message, such as that words are UTF-8.
func ReadStranger(r io.Reader, m Message) error {
	body, err := readFrame(r)
	if err != nil {
		return err
	}
	return proto.Unmarshal(body, m)
}

func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > MaxMessage {
		return nil, fmt.Errorf("message of %d bytes is longer than %d", size, MaxMessage)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return body, nil
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
