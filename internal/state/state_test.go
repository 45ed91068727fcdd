package state

import (
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

type doc struct{ Name string }

func TestCollectionSurvivesReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	docs, err := Of[doc](db, "docs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := docs.Get("a"); !errdefs.IsNotFound(err) {
		t.Fatalf("absent: %v", err)
	}
	for _, k := range []string{"a", "b"} {
		if err := docs.Put(k, doc{k + k}); err != nil {
			t.Fatal(err)
		}
	}
	if err := docs.Delete("b"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errdefs.IsUnavailable(err) {
		t.Fatalf("a second owner: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db, err = Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	docs, err = Of[doc](db, "docs")
	if err != nil {
		t.Fatal(err)
	}
	all, err := docs.All()
	if err != nil || len(all) != 1 || all["a"].Name != "aa" {
		t.Fatalf("got %v, %v", all, err)
	}
}
