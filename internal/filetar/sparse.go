package filetar

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
)

const block = 512

// extent is a part of a file that is no hole.
type extent struct{ offset, size int64 }

// sparse writes a file with holes in GNU's format 1.0 for PAX archives, which archive/tar reads but does not write
// (https://www.gnu.org/software/tar/manual/html_node/Sparse-Formats.html).
func (p *packer) sparse(f *os.File, h *tar.Header, data []extent) error {
	if err := p.tar.Flush(); err != nil {
		return nameError("packing", h.Name, err)
	}
	data = append(data, extent{offset: h.Size}) // GNU tar takes the size of the file from there
	var table bytes.Buffer
	stored := int64(0)
	fmt.Fprintln(&table, len(data))
	for _, e := range data {
		fmt.Fprintf(&table, "%d\n%d\n", e.offset, e.size)
		stored += e.size
	}
	pad(&table)
	stored += int64(table.Len())

	records := map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": h.Name, "GNU.sparse.realsize": strconv.FormatInt(h.Size, 10),
		"mtime": fmt.Sprintf("%d.%09d", h.ModTime.Unix(), h.ModTime.Nanosecond()), "uid": strconv.Itoa(h.Uid), "gid": strconv.Itoa(h.Gid),
		"size": strconv.FormatInt(stored, 10),
	}
	maps.Copy(records, h.PAXRecords)
	var extended bytes.Buffer
	for _, k := range slices.Sorted(maps.Keys(records)) {
		extended.WriteString(paxRecord(k, records[k]))
	}
	size := int64(extended.Len())
	pad(&extended)
	base := path.Base(h.Name)
	var out bytes.Buffer
	out.Write(ustar("PaxHeaders.0/"+base, tar.TypeXHeader, 0o644, size))
	out.Write(extended.Bytes())
	out.Write(ustar("GNUSparseFile.0/"+base, tar.TypeReg, h.Mode, stored))
	out.Write(table.Bytes())
	if _, err := p.out.Write(out.Bytes()); err != nil {
		return nameError("packing", h.Name, err)
	}
	written := int64(0)
	for _, e := range data {
		if err := p.copy(p.out, io.NewSectionReader(f, e.offset, e.size), h.Name, e.size); err != nil {
			return err
		}
		written += e.size
	}
	if _, err := p.out.Write(make([]byte, -written&(block-1))); err != nil {
		return nameError("packing", h.Name, err)
	}
	return nil
}

func pad(b *bytes.Buffer) { b.Write(make([]byte, -b.Len()&(block-1))) }

// paxRecord is "LENGTH key=value\n", where the length counts itself.
func paxRecord(k, v string) string {
	rest := " " + k + "=" + v + "\n"
	n := len(rest) + 1
	for len(strconv.Itoa(n))+len(rest) != n {
		n = len(strconv.Itoa(n)) + len(rest)
	}
	return strconv.Itoa(n) + rest
}

// ustar is a header whose true owner, time and size are in the PAX records before it.
func ustar(name string, kind byte, mode, size int64) []byte {
	h := make([]byte, block)
	copy(h[:100], name)
	octal := func(at, width int, v int64) { copy(h[at:], fmt.Sprintf("%0*o\x00", width-1, v)) }
	octal(100, 8, mode&0o7777)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, min(size, 1<<33-1))
	octal(136, 12, 0)
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	copy(h[148:], "        ")
	sum := int64(0)
	for _, b := range h {
		sum += int64(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}
