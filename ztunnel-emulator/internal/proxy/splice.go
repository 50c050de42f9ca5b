package proxy

import (
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// past is a deadline that has been.
var past = time.Unix(1, 0)

// pipeSize is what one splice moves at the most, and the size of the pipe: a
// megabyte is what an ordinary user may ask for (fs.pipe-max-size).
const pipeSize = 1 << 20

// pipe carries bytes between two sockets without a copy (splice(2)). It is empty
// whenever nobody holds it.
type pipe struct{ r, w int }

// pipes are those that nobody needs at the moment. A pipe costs two descriptors,
// so only a busy direction holds one.
var pipes = struct {
	sync.Mutex
	free []pipe
}{}

// maxFree is how many idle pipes are kept.
const maxFree = 64

func takePipe() (pipe, error) {
	pipes.Lock()
	if n := len(pipes.free); n > 0 {
		p := pipes.free[n-1]
		pipes.free = pipes.free[:n-1]
		pipes.Unlock()
		return p, nil
	}
	pipes.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, err
	}
	// A smaller one does, too, only with more system calls.
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return pipe{fds[0], fds[1]}, nil
}

// putPipe gives an empty pipe back.
func putPipe(p pipe) {
	pipes.Lock()
	defer pipes.Unlock()
	if len(pipes.free) < maxFree {
		pipes.free = append(pipes.free, p)
		return
	}
	p.close()
}

func (p pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

const spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK

// A piece below smallPiece is worth no pipe, and so many of them in a row are
// not a large transfer that has had to wait.
const (
	smallPiece  = bufferSize / 2
	smallInARow = 8
)

// spliceBytes moves bytes until EOF, or until they come in small pieces. It holds
// a pipe from the moment there is something to read until all of that is written.
func spliceBytes(from, to Conn, n *int64) (ended bool, err error) {
	src, err := from.SyscallConn()
	if err != nil {
		return false, err
	}
	dst, err := to.SyscallConn()
	if err != nil {
		return false, err
	}
	for small := 0; small < smallInARow; {
		var p pipe
		var held bool
		var m int
		var serr error
		err := src.Read(func(fd uintptr) bool {
			if !held {
				if p, serr = takePipe(); serr != nil {
					return true
				}
				held = true
			}
			m, serr = ignoringEINTR(func() (int, error) {
				n, err := unix.Splice(int(fd), nil, p.w, nil, pipeSize, spliceFlags)
				return int(n), err
			})
			if serr == unix.EAGAIN {
				putPipe(p) // nothing there: wait without a pipe
				held = false
				return false
			}
			return true
		})
		switch {
		case err != nil:
			if held {
				putPipe(p)
			}
			return false, err
		case serr != nil && !held:
			// No descriptor for a pipe: user space does as well.
			return plainBytes(from, to, n, math.MaxInt64)
		case serr != nil:
			putPipe(p)
			return false, &CopyError{Op: "receive", Err: serr}
		case m == 0:
			putPipe(p)
			return true, nil
		}

		for left := m; left > 0; {
			var w int
			err := dst.Write(func(fd uintptr) bool {
				w, serr = ignoringEINTR(func() (int, error) {
					n, err := unix.Splice(p.r, nil, int(fd), nil, left, spliceFlags)
					return int(n), err
				})
				return serr != unix.EAGAIN
			})
			if err == nil && serr != nil {
				err = &CopyError{Op: "send", Err: serr}
			}
			if err != nil {
				p.close() // it is not empty, so it is of no more use
				return false, err
			}
			left -= w
			*n += int64(w)
		}
		putPipe(p)
		small++
		if m >= smallPiece {
			small = 0
		}
	}
	return false, nil
}
