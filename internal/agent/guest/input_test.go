package guest

import (
	"net"
	"testing"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
	"github.com/atollvm/atoll/internal/agent/transport"
)

// A host that sends 64 KiB at once must always hear of enough to send the next.
func TestTakenIsToldInTime(t *testing.T) {
	host, ours := net.Pipe()
	defer host.Close()
	in := &input{stream: ours}
	const piece, pieces = 1000, 197
	go func() {
		for range pieces {
			in.took(piece)
		}
		ours.Close()
	}()
	told, times := uint64(0), 0
	for {
		o := &agentv1.ExecOutput{}
		if transport.ReadMsg(host, o) != nil {
			break
		}
		if o.GetStdinTaken() <= told {
			t.Errorf("%d was told after %d", o.GetStdinTaken(), told)
		}
		told = o.GetStdinTaken()
		times++
	}
	const hostPiece = 64 << 10
	if left := uint64(piece*pieces) - told; left+hostPiece > stdinAhead {
		t.Errorf("%d of %d bytes were never told of", left, piece*pieces)
	}
	if times > pieces/50 {
		t.Errorf("told %d times", times)
	}
}

func TestMemoryOfInput(t *testing.T) {
	in := &input{}
	in.recycle(make([]byte, keptFrom-1))
	if in.memory() != nil {
		t.Error("small memory was kept")
	}
	in.recycle(make([]byte, keptFrom))
	if in.memory() == nil || in.memory() != nil {
		t.Error("memory was lost, or came twice")
	}
}
