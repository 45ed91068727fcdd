package guest

import (
	"testing"
	"testing/synctest"

	agentv1 "github.com/atollvm/atoll/api/agent/v1"
)

const stdout = agentv1.Stream_STREAM_STDOUT

func TestRingDropsTheOldestWithoutAReader(t *testing.T) {
	r := newRing(10 * (100 + recordCost))
	for range 25 {
		r.add(stdout, make([]byte, 100))
	}
	d := r.attach(3)
	defer d.detach()
	for want := uint64(16); want <= 25; want++ {
		if o := d.next(); o.GetSeq() != want {
			t.Fatalf("got record %d, want %d", o.GetSeq(), want)
		}
	}
	// One record bigger than the ring is kept alone.
	d.detach()
	r.add(stdout, make([]byte, 1<<20))
	if d := r.attach(0); d.next().GetSeq() != 26 {
		t.Fatal("the big record is not there")
	}
}

func TestRingHoldsUpTheWriterWhileAHostReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRing(3 * (10 + recordCost))
		d := r.attach(0)
		written := 0
		go func() {
			for range 10 {
				r.add(stdout, make([]byte, 10))
				written++
			}
		}()
		synctest.Wait()
		if written != 3 {
			t.Fatalf("%d written with room for 3", written)
		}
		for range 3 {
			d.next()
		}
		r.forget(2)
		synctest.Wait()
		if written != 5 {
			t.Fatalf("%d written after 2 were acknowledged, want 5", written)
		}
		d.detach()
		synctest.Wait()
		if written != 10 {
			t.Fatalf("%d written after the host went, want 10", written)
		}
		// What was not acknowledged and not dropped is there for the next host.
		if o := r.attach(2).next(); o.GetSeq() != 8 {
			t.Fatalf("got record %d, want 8", o.GetSeq())
		}
	})
}

func TestEventsWaitForAWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e events
		seq := e.add(&agentv1.Event{})
		done := false
		go func() {
			e.waitAck(seq, ackPatience)
			done = true
		}()
		synctest.Wait()
		if done {
			t.Fatal("did not wait for a host")
		}
		e.watching(+1)
		e.ack(99) // a host that is ahead of itself acknowledges no more than there is
		synctest.Wait()
		if !done || e.acked != seq {
			t.Fatalf("done %v, acked %d", done, e.acked)
		}
	})
}

func TestParseSignal(t *testing.T) {
	for name, want := range map[string]int{"": 15, "TERM": 15, "sigkill": 9, "9": 9, "SIGRTMIN+3": 37, "RTMIN": 34} {
		if got, err := parseSignal(name, 15); err != nil || int(got) != want {
			t.Errorf("%q: got %d, %v; want %d", name, got, err, want)
		}
	}
	for _, name := range []string{"0", "65", "-1", "NOPE", "SIGRTMIN+99", "SIG"} {
		if got, err := parseSignal(name, 15); err == nil {
			t.Errorf("%q: got %d", name, got)
		}
	}
}
