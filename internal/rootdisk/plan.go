package rootdisk

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
)

// run is neighbouring layers, from ≤ i < to counted from the bottom, that share a disk.
type run struct{ from, to int }

const (
	maxDisks = 4 // of one image: a machine without ACPI has eight devices, and needs four for other ends
	// diskCost is what one disk more must save, in compressed bytes: it takes a device and a mount at each boot.
	diskCost = 512 << 10
	// lastCost is what the last disk must save. It is left for what is put on top of this image later.
	lastCost = 32 << 20
)

// plan divides layers into runs. Little is to be made now (have tells what is on disk already) and little once more when a layer
// changes: then its run and all above it are made anew, and each layer may be the one. Without disks that are there, the result
// depends on the layers' sizes only, so that images find each other's runs.
func plan(layers []Layer, have func(run) bool) []run {
	n := len(layers)
	if n == 0 {
		return []run{{0, 0}}
	}
	above := make([]float64, n+1) // bytes of layers from i on
	for i := n - 1; i >= 0; i-- {
		above[i] = above[i+1] + float64(layers[i].Size)
	}
	type choice struct {
		cost float64
		end  int // of the first run
	}
	// best[d][i]: layers from i on in d disks.
	best := make([][]choice, maxDisks+1)
	for d := range best {
		best[d] = make([]choice, n+1)
		for i := range best[d] {
			best[d][i].cost = math.Inf(1)
		}
	}
	best[0][n].cost = 0
	cost := make([][]float64, n)
	for i := range n {
		cost[i] = make([]float64, n+1)
		for end := i + 1; end <= n; end++ {
			cost[i][end] = float64(end-i) / float64(n) * above[i]
			if !have(run{i, end}) {
				cost[i][end] += above[i] - above[end]
			}
		}
	}
	for d := 1; d <= maxDisks; d++ {
		for i := range n {
			for end := i + 1; end <= n; end++ {
				if c := cost[i][end] + best[d-1][end].cost; c < best[d][i].cost {
					best[d][i] = choice{c, end}
				}
			}
		}
	}
	chosen, least := 1, math.Inf(1)
	for d := 1; d <= maxDisks; d++ {
		c := best[d][0].cost + float64(d)*diskCost
		if d == maxDisks {
			c += lastCost
		}
		if c < least {
			chosen, least = d, c
		}
	}
	var runs []run
	for i, d := 0, chosen; d > 0; d-- {
		end := best[d][i].end
		runs = append(runs, run{i, end})
		i = end
	}
	return runs
}

// key names what a run's disk holds. One that took something from below (leans) is another disk above other layers.
func key(layers []Layer, r run, leans bool) string {
	h := sha256.New()
	// Changes of what the writer makes of the same layers change this word.
	fmt.Fprintf(h, "atoll root disk 2\nbottom %t\n", r.from == 0)
	for _, l := range layers[r.from:r.to] {
		fmt.Fprintln(h, l.Digest)
	}
	if leans {
		fmt.Fprintln(h, "on")
		for _, l := range layers[:r.from] {
			fmt.Fprintln(h, l.Digest)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}
