package machine

import (
	"fmt"
	"time"
)

// records are where machines are kept; state has them.
type records interface {
	All() (map[string]Machine, error)
	Put(id string, m Machine) error
	Delete(id string) error
}

// commit changes the record, in memory and on disk, and emits action when it is not empty. A record that cannot be written is
// still changed in memory, where the truth about a running VMM must not be lost; the error says so, and the write is tried again.
func (ms *Machines) commit(e *entry, action string, change func(m *Machine)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return ms.commitLocked(e, action, change)
}

func (ms *Machines) commitLocked(e *entry, action string, change func(m *Machine)) error {
	m := e.m
	change(&m)
	err := ms.writeLocked(e, &m)
	ms.showLocked(e, action, m)
	return err
}

// commitWholeLocked is commitLocked for what must not be without being on disk: where that fails, nothing is changed.
func (ms *Machines) commitWholeLocked(e *entry, action string, change func(m *Machine)) error {
	m := e.m
	change(&m)
	if err := ms.writeLocked(e, &m); err != nil {
		return err
	}
	ms.showLocked(e, action, m)
	return nil
}

func (ms *Machines) writeLocked(e *entry, m *Machine) error {
	if e.gone {
		return nil
	}
	err := ms.records.Put(string(m.ID), *m)
	e.failed, e.unsaved = err != nil, err != nil
	return err
}

func (ms *Machines) showLocked(e *entry, action string, m Machine) {
	e.m = m
	if action != "" {
		ms.publish(&e.m, action, nil)
	}
	close(e.changed)
	e.changed = make(chan struct{})
}

// save writes what is in memory only, for the next daemon.
func (ms *Machines) save(e *entry) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.unsaved {
		return nil
	}
	if err := ms.writeLocked(e, &e.m); err != nil {
		return fmt.Errorf("recording machine %q: %w", e.m.Spec.Name, err)
	}
	return nil
}

const recordRetry = 5 * time.Second

// keepRecords writes records that could not be written, as on a full disk, until they can.
func (ms *Machines) keepRecords() {
	tick := time.NewTicker(recordRetry)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			ms.saveFailed()
		case <-ms.life.Done():
			return
		}
	}
}

func (ms *Machines) saveFailed() {
	ms.mu.Lock()
	var failed []*entry
	for _, e := range ms.byID {
		e.mu.Lock()
		if e.failed {
			failed = append(failed, e)
		}
		e.mu.Unlock()
	}
	ms.mu.Unlock()
	for _, e := range failed {
		if err := ms.save(e); err != nil {
			ms.Log.Debug("writing a record again", "machine", e.get().ID, "err", err)
		}
	}
}
