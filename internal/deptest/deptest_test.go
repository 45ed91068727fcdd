package deptest

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/atollvm/atoll"

// rules: a package, and those below it, must not import another, nor those below that one. The reason answers the next person.
var rules = []struct {
	pkg, not string
	except   []string
	because  string
}{
	{"internal", "github.com/moby/buildkit", []string{"internal/build"}, "BuildKit is large and moves fast: one room speaks its language"},
	{"internal/cli", "github.com/moby/buildkit", nil, "the CLI shows progress through internal/build/progress"},
	{"internal/cli", module + "/internal/daemon", nil, "the CLI talks to the daemon's API only, and also runs on macOS"},
	{"internal/cli", module + "/internal/machine", nil, "the CLI talks to the daemon's API only"},
	{"internal/cli", module + "/internal/image", nil, "the CLI talks to the daemon's API only"},
	{"internal/cli", module + "/internal/vmm", nil, "the CLI talks to the daemon's API only"},
	{"client", module + "/internal/cli", nil, "others import the client"},
	{"client", module + "/internal/daemon", nil, "others import the client"},
	{"internal/vmm", module + "/internal/image", nil, "a driver knows files and sockets, never images"},
	{"internal/vmm", module + "/internal/machine", nil, "a driver serves machines and does not know them"},
	{"internal/vmm", module + "/internal/network", nil, "a NIC is a pair of sockets to a VMM"},
	{"internal/network", module + "/internal/machine", nil, "an endpoint has an ID and a name, no more"},
	{"internal/network", module + "/internal/vmm", nil, "the network does not care what sends the frames"},
	{"internal/metadata", module + "/internal", nil, "the network's helper serves it: it knows a document, not machines"},
	{"internal/image", module + "/internal/rootdisk", nil, "images are content; root disks are made from them"},
	{"internal/image", module + "/internal/machine", nil, "images do not know who runs them"},
	{"internal/rootdisk", module + "/internal/machine", nil, "disks do not know who runs them"},
	{"internal/build/vmexec", module + "/internal/vmm/qemu", nil, "a build's VM runs on any driver"},
	{"internal/build", module + "/internal/machine", nil, "a build's VM is no machine: nobody lists, keeps or recovers it"},
	{"internal/build", module + "/internal/kernel", nil, "the daemon says what boots"},
	{"internal/machine", module + "/internal/image", nil, "machine declares the few methods that it needs"},
	{"internal/machine", module + "/internal/rootdisk", nil, "machine declares the few methods that it needs"},
	{"internal/machine", module + "/internal/kernel", nil, "machine declares the few methods that it needs"},
	{"internal/machine", module + "/internal/vmm/qemu", nil, "a machine runs on any driver"},
	{"internal/machine", module + "/api/atoll", nil, "the nouns do not know their doors"},
	{"internal/agent", module + "/internal/machine", nil, "the guest's side stays small"},
	{"cmd/atoll-agent", "net/http", nil, "the agent starts in every machine: a large one costs every boot"},
	{"cmd/atoll-agent", "connectrpc.com/connect", nil, "the agent starts in every machine: a large one costs every boot"},
	{"cmd/atoll-agent", "github.com/spf13/cobra", nil, "the agent starts in every machine: a large one costs every boot"},
	{"internal/server", module + "/internal/vmm", nil, "the door knows the nouns only"},
	{"internal/server", module + "/internal/daemon", nil, "the daemon builds the server"},
}

type goPackage struct {
	ImportPath string
	Doc        string
	Name       string
	GoFiles    []string
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Name,GoFiles,Imports,Deps", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func below(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func TestImports(t *testing.T) {
	all := packages(t)
	for _, r := range rules {
		found := false
		for _, p := range all {
			if !below(p.ImportPath, module+"/"+r.pkg) {
				continue
			}
			found = true
			if slices.ContainsFunc(r.except, func(e string) bool { return below(p.ImportPath, module+"/"+e) }) {
				continue
			}
			// A command's own weight is all that it links; a room answers for its own imports.
			imports := p.Imports
			if strings.HasPrefix(r.pkg, "cmd/") {
				imports = p.Deps
			}
			for _, i := range imports {
				if below(i, r.not) && !below(i, module+"/"+r.pkg) {
					t.Errorf("%s imports %s: %s", p.ImportPath, i, r.because)
				}
			}
		}
		if !found {
			t.Errorf("rule for %s: there is no such package", r.pkg)
		}
	}
}

func TestPackageDocs(t *testing.T) {
	for _, p := range packages(t) {
		generated := strings.Contains(p.ImportPath, "/api/")
		if p.Doc == "" && len(p.GoFiles) > 0 && !generated {
			t.Errorf("%s has no package comment: say what it owns, what it leaves to others, who may import it", p.ImportPath)
		}
	}
}
