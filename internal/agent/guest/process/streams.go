package process

import (
	"errors"
	"os"
	"time"

	"github.com/atollvm/atoll/internal/agent/guest/nonblock"
	"golang.org/x/sys/unix"
)

// openStreams makes the process's three files, which the caller closes, and the agent's ends of them.
func (p *Process) openStreams(spec Spec, u *user) (theirs []int, err error) {
	if spec.TTY {
		return p.openTerminal(spec, u)
	}
	stdin := func() (int, error) { return unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0) }
	if spec.Stdin {
		stdin = func() (int, error) { return pipe(&p.Stdin, 0, u) }
	}
	for _, open := range []func() (int, error){
		stdin,
		func() (int, error) { return pipe(&p.Stdout, 1, u) },
		func() (int, error) { return pipe(&p.Stderr, 1, u) },
	} {
		fd, err := open()
		if err != nil {
			return theirs, err
		}
		theirs = append(theirs, fd)
	}
	return theirs, nil
}

// pipeSize is what a pipe holds at most. The more, the fewer turns a process and the agent take, and each costs an emulated CPU what
// it knows of the memory.
const pipeSize = 256 << 10

// pipe makes a pipe whose end number end is the process's. The agent's end does not block, so that closing it wakes a reader.
func pipe(ours **os.File, end int, u *user) (theirs int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, err
	}
	unix.SetNonblock(fds[1-end], true)
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // where the kernel refuses, its own size does
	*ours = os.NewFile(uintptr(fds[1-end]), "pipe")
	// /dev/stdout and the like open the pipe anew, which its owner may.
	unix.Fchown(fds[end], int(u.uid), int(u.gid))
	return fds[end], nil
}

func (p *Process) openTerminal(spec Spec, u *user) ([]int, error) {
	master, slave, err := OpenTerminal(spec.Rows, spec.Cols)
	if err != nil {
		return nil, err
	}
	p.Stdout = os.NewFile(uintptr(master), "ptmx")
	if spec.Stdin {
		p.Stdin = p.Stdout
	}
	const ttyGroup = 5 // as devpts is mounted
	unix.Fchown(slave, int(u.uid), ttyGroup)
	return []int{slave, slave, slave}, nil
}

// OpenTerminal makes a terminal of that size, or of none. Its master does not block.
func OpenTerminal(rows, cols uint16) (master, slave int, err error) {
	master, err = unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, -1, err
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		unix.Close(master)
		return -1, -1, err
	}
	if slave, err = openSlave(uintptr(master)); err != nil {
		unix.Close(master)
		return -1, -1, err
	}
	if rows > 0 && cols > 0 {
		unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}
	return master, slave, nil
}

// OpenSlave opens the other end of a terminal once more.
func OpenSlave(master *os.File) (slave int, err error) {
	conn, err := master.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := conn.Control(func(fd uintptr) { slave, err = openSlave(fd) })
	return slave, errors.Join(cerr, err)
}

// openSlave goes by the ioctl, not the path: the image may have mounted what it likes on /dev/pts.
func openSlave(master uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, master, unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// Resize sets the size of the terminal.
func (p *Process) Resize(rows, cols uint16) error {
	if !p.tty {
		return nil
	}
	var err error
	conn, cerr := p.Stdout.SyscallConn()
	if cerr != nil {
		return cerr
	}
	cerr = conn.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
	if cerr != nil {
		return cerr
	}
	return err
}

// CloseStdin ends the process's stdin. On a terminal it is the end-of-file character.
func (p *Process) CloseStdin() {
	switch {
	case p.Stdin == nil:
	case p.tty:
		p.Stdin.Write([]byte{4})
	default:
		p.Stdin.Close()
	}
}

// quiet is how long an ended process's output may be silent before it counts as complete, when another process has it open still.
const quiet = 50 * time.Millisecond

// pipeMost is the most that can be left in a pipe by a process that has ended; what comes after so much is another's.
const pipeMost = 1 << 20

// Copy hands one of the process's outputs to emit, to its end or to the process's. Output that a process left behind writes later
// is thrown away, so that it does not die of it. buf is what it reads into.
func (p *Process) Copy(f *os.File, buf []byte, emit func([]byte)) {
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-p.done:
			f.SetReadDeadline(time.Now().Add(quiet)) // wakes the Read below
		case <-ended:
		}
	}()
	from, err := nonblock.New(f)
	if err != nil {
		return
	}
	for left := pipeMost; left > 0; {
		over := false
		select {
		case <-p.done:
			over = true
			f.SetReadDeadline(time.Now().Add(quiet))
		default:
		}
		n, err := from.Read(buf)
		if over {
			left -= n
		}
		if n > 0 {
			emit(buf[:n])
		}
		if os.IsTimeout(err) {
			go discard(f, buf)
			return
		}
		if err != nil { // EIO is how a terminal says that nobody has it open
			f.Close()
			return
		}
	}
	go discard(f, buf)
}

func discard(f *os.File, buf []byte) {
	f.SetReadDeadline(time.Time{})
	for {
		if _, err := f.Read(buf); err != nil {
			f.Close()
			return
		}
	}
}
