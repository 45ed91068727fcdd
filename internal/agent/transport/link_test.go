package transport

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// writes keeps each write as it came.
type writes struct {
	net.Conn
	all [][]byte
}

func (w *writes) Write(p []byte) (int, error) {
	w.all = append(w.all, bytes.Clone(p))
	return len(p), nil
}

func yamuxHead(kind byte, length uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{0, kind, 0, 0, 0, 0, 0, 1}, length)
}

// The head of a frame goes out with its body, and never waits when no body comes.
func TestFrameGoesOutWhole(t *testing.T) {
	const data, window = 0, 1
	for name, link := range map[string]func(*writes) func([]byte) (int, error){
		"host": func(w *writes) func([]byte) (int, error) { return (&hostLink{Conn: w}).Write },
		"guest": func(w *writes) func([]byte) (int, error) {
			return (&guestLink{server: &server{port: w}, in: newInbox(1)}).Write
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := &writes{}
			write := link(w)
			for _, step := range []struct {
				p      []byte
				writes int // in all, after it
			}{
				{yamuxHead(window, 5), 1},
				{yamuxHead(data, 0), 2}, // a stream's first or last frame
				{yamuxHead(data, 12), 2},
				{yamuxHead(data, 7), 3}, // a body that looks like a head
				{yamuxHead(data, 3), 3},
				{[]byte("abc"), 4},
			} {
				if n, err := write(step.p); n != len(step.p) || err != nil {
					t.Fatalf("writing %d bytes: %d, %v", len(step.p), n, err)
				}
				if len(w.all) != step.writes {
					t.Fatalf("%d writes after %x, want %d", len(w.all), step.p, step.writes)
				}
			}
			if !bytes.Contains(w.all[3], append(yamuxHead(data, 3), "abc"...)) {
				t.Errorf("the last frame is %x", w.all[3])
			}
		})
	}
}

func TestLongFrames(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789abcdef"), 10<<10)
	want := append(yamuxHead(0, uint32(len(body))), body...)
	host := &writes{}
	h := &hostLink{Conn: host}
	h.Write(want[:frameHead])
	h.Write(body)
	guest := &writes{}
	g := &guestLink{server: &server{port: guest}, in: newInbox(len(want))}
	g.Write(want[:frameHead])
	g.Write(body)
	if got := bytes.Join(guest.all, nil); !bytes.Equal(got, want) {
		t.Errorf("the guest wrote %d bytes, or others than the %d", len(got), len(want))
	}
	for _, p := range host.all {
		g.deliver(p)
	}
	got := make([]byte, len(want)+1)
	if n, _ := g.in.Read(got); !bytes.Equal(got[:n], want) {
		t.Errorf("the guest read %d bytes, or others than the %d", n, len(want))
	}
}

func TestInboxHoldsUpItsWriter(t *testing.T) {
	b := newInbox(4)
	done := make(chan struct{})
	go func() { b.put([]byte("abcdef")); close(done) }()
	select {
	case <-done:
		t.Fatal("it took more than it holds")
	case <-time.After(20 * time.Millisecond):
	}
	buf := make([]byte, 8)
	n, _ := b.Read(buf)
	m, _ := b.Read(buf[n:])
	<-done
	if got := string(buf[:n+m]); got != "abcdef" {
		t.Errorf("read %q", got)
	}
	go b.close()
	if _, err := b.Read(buf); err == nil {
		t.Error("reading what is closed ended well")
	}
	b.put([]byte("more than it holds")) // does not wait
}

func TestPiece(t *testing.T) {
	for _, n := range []int{0, 1, 127, 128, 70_000} {
		p := NewPiece(2, 70_000)
		for i := range p.Data() {
			p.Data()[i] = byte(i)
		}
		var wire bytes.Buffer
		if err := p.Write(&wire, n); err != nil {
			t.Fatal(err)
		}
		o := &agentv1.ExecOutput{}
		if err := ReadMsg(&wire, o); err != nil {
			t.Fatal(err)
		}
		if k, ok := o.GetKind().(*agentv1.ExecOutput_Stdout); !ok || !bytes.Equal(k.Stdout, p.Data()[:n]) || wire.Len() != 0 {
			t.Errorf("%d bytes came as %d", n, len(o.GetStdout()))
		}
	}
}

// FuzzOnlyBytes: what it takes apart is what protobuf does.
func FuzzOnlyBytes(f *testing.F) {
	for _, m := range []*agentv1.ExecInput{
		{Kind: &agentv1.ExecInput_Stdin{Stdin: []byte("abc")}}, {Kind: &agentv1.ExecInput_Stdin{}}, {Kind: &agentv1.ExecInput_Signal{Signal: 9}}, {},
	} {
		body, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		const stdin protowire.Number = 1
		data, ok := OnlyBytes(body, stdin)
		m := &agentv1.ExecInput{}
		err := proto.Unmarshal(body, m)
		if k, is := m.GetKind().(*agentv1.ExecInput_Stdin); ok && (err != nil || !is || !bytes.Equal(k.Stdin, data)) {
			t.Errorf("%x: %x by itself; by protobuf %v, %v", body, data, m, err)
		}
	})
}
