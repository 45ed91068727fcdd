package transport

import (
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// MaxMessage is the longest message that either end takes, in bytes.
const MaxMessage = 1 << 20

// ReadMsg reads one message. io.EOF: the stream ended between messages.
func ReadMsg(r io.Reader, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > MaxMessage {
		return fmt.Errorf("message of %d bytes is longer than %d", size, MaxMessage)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return proto.Unmarshal(body, m)
}

// WriteMsg writes one message in one piece.
func WriteMsg(w io.Writer, m proto.Message) error {
	frame, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 4, 512), m)
	if err != nil {
		return err
	}
	if len(frame)-4 > MaxMessage {
		return fmt.Errorf("message of %d bytes is longer than %d", len(frame)-4, MaxMessage)
	}
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-4))
	_, err = w.Write(frame)
	return err
}
