package event

import (
	"testing"
	"time"
)

func TestSlowListenerDoesNotBlock(t *testing.T) {
	b := New()
	slow, _ := b.Listen(time.Time{})
	defer slow.Close()
	quick, _ := b.Listen(time.Time{})
	defer quick.Close()
	for i := range perReader + 10 {
		b.Publish(Event{Type: Machine, Action: "create"})
		if e := <-quick.C(); e.Seq != uint64(i+1) {
			t.Fatalf("event %d, want %d", e.Seq, i+1)
		}
	}
	if slow.Lost() != 10 || quick.Lost() != 0 {
		t.Fatalf("lost: slow %d, quick %d", slow.Lost(), quick.Lost())
	}
}

func TestLateListenerGetsWhatIsKept(t *testing.T) {
	b := New()
	clock := time.Unix(1000, 0)
	b.now = func() time.Time { clock = clock.Add(time.Second); return clock }
	for range kept + 5 {
		b.Publish(Event{})
	}
	r, past := b.Listen(time.Unix(0, 1))
	defer r.Close()
	if len(past) != kept || past[0].Seq != 6 {
		t.Fatalf("%d events from %d on", len(past), past[0].Seq)
	}
	r2, past := b.Listen(clock)
	defer r2.Close()
	if len(past) != 1 {
		t.Fatalf("%d events since the last one's time", len(past))
	}
	r2.Close()
	b.Publish(Event{})
	if len(r2.C()) != 0 || len(r.C()) != 1 {
		t.Fatal("a closed listener is still served, or an open one is not")
	}
}
