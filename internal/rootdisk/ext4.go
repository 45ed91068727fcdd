package rootdisk

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// What a scratch disk may be in size. Above 16 TiB the format needs its 64bit feature.
const (
	MinScratch = 16 << 20
	MaxScratch = 16<<40 - blocksPerGroup*blockSize
)

// The on-disk format is Linux' Documentation/filesystems/ext4. Every group keeps its own bitmaps and inode table, so that a group
// flagged as uninitialised need not be written at all: the kernel derives its bitmaps from its geometry.
const (
	blocksPerGroup  = 8 * blockSize
	ext4InodeSize   = 256
	inodesPerBlock  = blockSize / ext4InodeSize
	descSize        = 32
	descsPerBlock   = blockSize / descSize
	ext4RootInode   = 2
	journalInode    = 8
	lostFoundInode  = 11 // the first that is not reserved
	ext4ExtraIsize  = 32
	inodeUninit     = 1 // flags of a group
	blockUninit     = 2
	inodeZeroed     = 4
	compatJournal   = 0x4
	compatExtAttr   = 0x8
	compatDirIndex  = 0x20
	incompatFiles   = 0x2 // file types in directories
	incompatExtents = 0x40
	incompatFlexBg  = 0x200
	roSparseSuper   = 0x1
	roLargeFile     = 0x2
	roHugeFile      = 0x8
	roGdtCsum       = 0x10
	roDirNlink      = 0x20
	roExtraIsize    = 0x40
)

// CreateScratch makes a sparse file of the given size with an empty ext4 in it. It has a journal: a machine may be killed at any time,
// and nobody else repairs its disk. Only a few blocks are written, whatever the size. The file must not exist.
func CreateScratch(path string, size int64) (err error) {
	if size < MinScratch || size > MaxScratch {
		return fmt.Errorf("creating scratch disk %s: size %d is not between %d and %d bytes: %w",
			path, size, int64(MinScratch), int64(MaxScratch), errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("creating scratch disk %s: %w", path, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return fmt.Errorf("creating scratch disk: %w", err)
	}
	e := newExt4(size, time.Now())
	err = e.write(f)
	if err == nil {
		err = f.Truncate(size)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("creating scratch disk %s: %w", path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

// ext4 is the geometry of a file system.
type ext4 struct {
	blocks         int64
	groups         int64
	inodesPerGroup int64
	uuid, hashSeed [16]byte
	now            uint32
}

func newExt4(size int64, now time.Time) *ext4 {
	e := &ext4{blocks: size / blockSize, now: uint32(now.Unix())}
	rand.Read(e.uuid[:])
	rand.Read(e.hashSeed[:])
	e.uuid[6], e.uuid[8] = e.uuid[6]&0x0f|0x40, e.uuid[8]&0x3f|0x80
	e.groups = (e.blocks + blocksPerGroup - 1) / blocksPerGroup
	bytesPerInode := int64(16 << 10) // as mke2fs chooses
	if size < 512<<20 {
		bytesPerInode = 4 << 10
	}
	perGroup := (e.blocks*blockSize/bytesPerInode + e.groups - 1) / e.groups
	e.inodesPerGroup = (perGroup + inodesPerBlock - 1) / inodesPerBlock * inodesPerBlock
	// A last group that could hold little but its own tables is left out.
	if last := e.groups - 1; last > 0 && e.groupBlocks(last) < e.overhead(last)+64 {
		e.blocks = last * blocksPerGroup
		e.groups = last
	}
	return e
}

func (e *ext4) groupBlocks(g int64) int64 { return min(blocksPerGroup, e.blocks-g*blocksPerGroup) }
func (e *ext4) descBlocks() int64         { return (e.groups + descsPerBlock - 1) / descsPerBlock }
func (e *ext4) tableBlocks() int64        { return e.inodesPerGroup / inodesPerBlock }

// head is how many blocks of a group the superblock and the descriptors take, or the room for their copies.
func (e *ext4) head(g int64) int64 {
	if hasSuper(g) {
		return 1 + e.descBlocks()
	}
	return 0
}

// journalBlocks is what mke2fs gives small disks, and 16 MiB for others: a journal is no faster for being larger than what is written
// within the five seconds between two commits.
func (e *ext4) journalBlocks() int64 {
	if e.blocks < 256<<10 {
		return 1024 // the least that the kernel takes
	}
	return 4096
}

func (e *ext4) overhead(g int64) int64 { return e.head(g) + 2 + e.tableBlocks() }

// hasSuper is sparse_super's rule: groups 0, 1 and the powers of 3, 5 and 7.
func hasSuper(g int64) bool {
	if g <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

// write puts down the blocks that are not zero. The copies of the superblock stay unwritten: the kernel's online resizing wants
// their room (sparse_super2 would forbid it), nobody wants to repair a scratch disk from them.
func (e *ext4) write(f *os.File) error {
	rootBlock := e.overhead(0)
	lostFound, journal := rootBlock+1, rootBlock+2
	w := blockPut{f: f}
	descs := make([]byte, e.descBlocks()*blockSize)
	var freeBlocks, freeInodes int64
	for g := range e.groups {
		used, inodes, dirs := e.overhead(g), int64(0), int64(0)
		flags := uint16(inodeZeroed)
		if g == 0 {
			used, inodes, dirs = used+2+e.journalBlocks(), lostFoundInode, 2
			w.put(e.head(g)+1, bitmap(inodes, e.inodesPerGroup))
		} else {
			flags |= inodeUninit
		}
		// The last group's bitmap is always written, as mke2fs does: its end is not the end of a block.
		if g == 0 || g == e.groups-1 {
			w.put(g*blocksPerGroup+e.head(g), bitmap(used, e.groupBlocks(g)))
		} else {
			flags |= blockUninit
		}
		e.encodeDesc(descs[g*descSize:][:descSize], g, e.groupBlocks(g)-used, inodes, dirs, flags)
		freeBlocks += e.groupBlocks(g) - used
		freeInodes += e.inodesPerGroup - inodes
	}
	w.put(1, descs)
	table := make([]byte, blockSize)
	inode := func(number int) []byte { return table[(number-1)*ext4InodeSize:][:ext4InodeSize] }
	e.encodeInode(inode(ext4RootInode), unix.S_IFDIR|0o755, 3, rootBlock, 1)
	e.encodeInode(inode(lostFoundInode), unix.S_IFDIR|0o700, 2, lostFound, 1)
	e.encodeInode(inode(journalInode), unix.S_IFREG|0o600, 1, journal, e.journalBlocks())
	w.put(0, e.super(freeBlocks, freeInodes, inode(journalInode)))
	w.put(journal, e.journalSuper())
	w.put(e.head(0)+2, table)
	w.put(rootBlock, dirBlock(ext4RootInode, "lost+found"))
	w.put(lostFound, dirBlock(lostFoundInode, ""))
	return w.err
}

// blockPut writes blocks until the first error.
type blockPut struct {
	f   *os.File
	err error
}

func (w *blockPut) put(block int64, b []byte) {
	if w.err == nil {
		_, w.err = w.f.WriteAt(b, block*blockSize)
	}
}

// bitmap has its first used bits set, and those from size on, which stand for nothing.
func bitmap(used, size int64) []byte {
	b := make([]byte, blockSize)
	for i := range int64(len(b) * 8) {
		if i < used || i >= size {
			b[i/8] |= 1 << (i % 8)
		}
	}
	return b
}

func (e *ext4) encodeDesc(b []byte, g, freeBlocks, inodes, dirs int64, flags uint16) {
	le := binary.LittleEndian
	first := g*blocksPerGroup + e.head(g)
	le.PutUint32(b[0:], uint32(first))
	le.PutUint32(b[4:], uint32(first+1))
	le.PutUint32(b[8:], uint32(first+2))
	le.PutUint16(b[12:], uint16(freeBlocks))
	le.PutUint16(b[14:], uint16(e.inodesPerGroup-inodes))
	le.PutUint16(b[16:], uint16(dirs))
	le.PutUint16(b[18:], flags)
	le.PutUint16(b[28:], uint16(e.inodesPerGroup-inodes)) // never used inodes at the table's end
	crc := crc16(0xffff, e.uuid[:])
	crc = crc16(crc, le.AppendUint32(nil, uint32(g)))
	le.PutUint16(b[30:], crc16(crc, b[:30]))
}

// journalSuper is the first block of an empty journal (jbd2), in big endian.
func (e *ext4) journalSuper() []byte {
	b := make([]byte, blockSize)
	be := binary.BigEndian
	be.PutUint32(b[0:], 0xc03b3998)
	be.PutUint32(b[4:], 4) // a superblock, version 2
	be.PutUint32(b[12:], blockSize)
	be.PutUint32(b[16:], uint32(e.journalBlocks()))
	be.PutUint32(b[20:], 1) // the first block of the log
	be.PutUint32(b[24:], 1) // the first commit expected
	be.PutUint32(b[64:], 1) // file systems that use it
	return b
}

// super is the superblock; journal is that file's inode, of which it has a copy.
func (e *ext4) super(freeBlocks, freeInodes int64, journal []byte) []byte {
	block := make([]byte, blockSize)
	b := block[1024:]
	le := binary.LittleEndian
	le.PutUint32(b[0:], uint32(e.inodesPerGroup*e.groups))
	le.PutUint32(b[4:], uint32(e.blocks))
	le.PutUint32(b[12:], uint32(freeBlocks))
	le.PutUint32(b[16:], uint32(freeInodes))
	le.PutUint32(b[24:], 2) // log2 of the block size, from 1 KiB
	le.PutUint32(b[28:], 2)
	le.PutUint32(b[32:], blocksPerGroup)
	le.PutUint32(b[36:], blocksPerGroup)
	le.PutUint32(b[40:], uint32(e.inodesPerGroup))
	le.PutUint32(b[48:], e.now)
	le.PutUint16(b[54:], 0xffff) // no check after so many mounts
	le.PutUint16(b[56:], 0xef53)
	le.PutUint16(b[58:], 1) // cleanly unmounted
	le.PutUint16(b[60:], 1) // go on after errors
	le.PutUint32(b[64:], e.now)
	le.PutUint32(b[76:], 1) // dynamic revision
	le.PutUint32(b[84:], lostFoundInode)
	le.PutUint16(b[88:], ext4InodeSize)
	le.PutUint32(b[92:], compatJournal|compatExtAttr|compatDirIndex)
	le.PutUint32(b[96:], incompatFiles|incompatExtents|incompatFlexBg)
	le.PutUint32(b[100:], roSparseSuper|roLargeFile|roHugeFile|roGdtCsum|roDirNlink|roExtraIsize)
	copy(b[104:], e.uuid[:])
	le.PutUint32(b[224:], journalInode)
	copy(b[236:], e.hashSeed[:])
	b[252] = 1 // half MD4 for directory hashes
	b[253] = 1 // what follows at 268 is there: the journal's extents, and its size
	copy(b[268:328], journal[40:100])
	copy(b[332:336], journal[4:8])
	le.PutUint32(b[256:], 0x4|0x8) // mount options user_xattr, acl
	le.PutUint32(b[264:], e.now)   // made at
	le.PutUint16(b[348:], ext4ExtraIsize)
	le.PutUint16(b[350:], ext4ExtraIsize)
	le.PutUint32(b[352:], 1) // hashes of signed characters
	b[372] = 4               // log2 of groups that the allocator treats as one
	return block
}

// encodeInode writes a directory or file of so many blocks, one after the other.
func (e *ext4) encodeInode(b []byte, mode, links uint16, block, blocks int64) {
	const extentsFlag, extentMagic = 0x80000, 0xf30a
	le := binary.LittleEndian
	le.PutUint16(b[0:], mode)
	le.PutUint32(b[4:], uint32(blocks*blockSize))
	for _, off := range []int{8, 12, 16, 144} { // access, change, modification, creation
		le.PutUint32(b[off:], e.now)
	}
	le.PutUint16(b[26:], links)
	le.PutUint32(b[28:], uint32(blocks*blockSize/512))
	le.PutUint32(b[32:], extentsFlag)
	le.PutUint16(b[40:], extentMagic)
	le.PutUint16(b[42:], 1)              // extents
	le.PutUint16(b[44:], 4)              // room for
	le.PutUint16(b[56:], uint16(blocks)) // in the extent, from block 0 of the file
	le.PutUint32(b[60:], uint32(block))
	le.PutUint16(b[128:], ext4ExtraIsize)
}

// dirBlock is a directory below the root with at most one subdirectory, lost+found.
func dirBlock(self uint32, sub string) []byte {
	const isDir = 2
	b := make([]byte, blockSize)
	le := binary.LittleEndian
	off, last := 0, 0
	add := func(ino uint32, name string) {
		last = off
		le.PutUint32(b[off:], ino)
		size := (8 + len(name) + 3) &^ 3
		le.PutUint16(b[off+4:], uint16(size))
		b[off+6], b[off+7] = byte(len(name)), isDir
		copy(b[off+8:], name)
		off += size
	}
	add(self, ".")
	add(ext4RootInode, "..")
	if sub != "" {
		add(lostFoundInode, sub)
	}
	le.PutUint16(b[last+4:], uint16(blockSize-last)) // the last entry owns the rest
	return b
}

// crc16 is the one of the kernel's lib/crc16.c.
func crc16(crc uint16, b []byte) uint16 {
	for _, c := range b {
		crc ^= uint16(c)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xa001
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}
