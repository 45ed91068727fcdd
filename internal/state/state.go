// Package state is the daemon's one embedded store: typed collections of JSON documents in a bbolt file. Every change is one
// committed transaction. One process owns the file; a second one is refused at once. A leaf; safe for concurrent use.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// DB is an open state file.
type DB struct{ bolt *bolt.DB }

// Open opens or creates the state file. errdefs.ErrUnavailable: another process has it.
func Open(path string) (*DB, error) {
	b, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 200 * time.Millisecond, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("opening state %s: another process owns it: %w", path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("opening state %s: %w", path, err)
	}
	return &DB{b}, nil
}

// Close closes the file.
func (db *DB) Close() error { return db.bolt.Close() }

// Collection is a set of documents of one type by key.
type Collection[T any] struct {
	db   *DB
	name []byte
}

// Of returns the collection with that name, making it when it is not there.
func Of[T any](db *DB, name string) (*Collection[T], error) {
	c := &Collection[T]{db, []byte(name)}
	err := db.bolt.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(c.name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("opening collection %s: %w", name, err)
	}
	return c, nil
}

// Get returns the document under key, or errdefs.ErrNotFound.
func (c *Collection[T]) Get(key string) (T, error) {
	var v T
	err := c.db.bolt.View(func(tx *bolt.Tx) error {
		data := tx.Bucket(c.name).Get([]byte(key))
		if data == nil {
			return fmt.Errorf("%s %q: %w", c.name, key, errdefs.ErrNotFound)
		}
		return json.Unmarshal(data, &v)
	})
	return v, err
}

// Put stores the document; on nil error it is on disk.
func (c *Collection[T]) Put(key string, v T) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("storing %s %q: %w", c.name, key, err)
	}
	err = c.db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(c.name).Put([]byte(key), data) })
	if err != nil {
		return fmt.Errorf("storing %s %q: %w", c.name, key, err)
	}
	return nil
}

// Delete removes the document; absent is no error.
func (c *Collection[T]) Delete(key string) error {
	err := c.db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(c.name).Delete([]byte(key)) })
	if err != nil {
		return fmt.Errorf("deleting %s %q: %w", c.name, key, err)
	}
	return nil
}

// All returns every document by key.
func (c *Collection[T]) All() (map[string]T, error) {
	all := map[string]T{}
	err := c.db.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(c.name).ForEach(func(k, data []byte) error {
			var v T
			if err := json.Unmarshal(data, &v); err != nil {
				return fmt.Errorf("%s %q: %w", c.name, k, err)
			}
			all[string(k)] = v
			return nil
		})
	})
	return all, err
}
