// Package proxy is what an accepted connection does: where it was going before
// it was redirected, a connection onward from inside the same pod, and the bytes
// between the two.
package proxy

import (
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// spliceAfter is how many bytes a direction copies through user space before it
// is worth a pipe. A short exchange is faster with plain reads; a long one with
// splice(2), where the bytes stay in the kernel.
const spliceAfter = 128 << 10

// Conn is a connection that the runtime's poller watches: an os.File made of a
// non-blocking socket. It owns its descriptor.
type Conn struct{ *os.File }

// NewConn takes over the connected, non-blocking socket fd.
func NewConn(fd int) Conn { return Conn{os.NewFile(uintptr(fd), "connection")} }

// closeWrite ends our half of the connection; the other half goes on.
func (c Conn) closeWrite() error {
	return c.control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) })
}

func (c Conn) control(f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// Counts is how many bytes went each way.
type Counts struct {
	Sent, Received int64 // from a to b, and from b to a
}

// Relay copies between a and b until both directions have ended, and keeps an
// end of one direction (FIN) from ending the other. The first error ends both. a
// and b stay the caller's.
//
// An idle relay holds the two sockets and no buffer and no pipe: both are taken
// when there is something to read.
func Relay(a, b Conn) (Counts, error) {
	var c Counts
	var back error
	var wg sync.WaitGroup
	wg.Add(1)
	go relayBack(b, a, &c.Received, &back, &wg)
	there := relayOne(a, b, &c.Sent)
	wg.Wait()
	// Whichever broke first has ended the other by closing both for it.
	return c, firstOf(there, back)
}

// relayBack is the direction that has a goroutine of its own.
func relayBack(from, to Conn, n *int64, err *error, wg *sync.WaitGroup) {
	defer wg.Done()
	*err = relayOne(from, to, n)
}

// errEnded marks the direction that ended because the other one broke.
var errEnded = errors.New("the other direction has ended it")

func firstOf(a, b error) error {
	if errors.Is(a, errEnded) || a == nil {
		return b
	}
	return a
}

// relayOne is one direction, from its first byte to its FIN.
func relayOne(from, to Conn, n *int64) error {
	err := copyBytes(from, to, n)
	if err == nil {
		// FIN came: pass it on. A peer that is gone already needs none.
		if err = to.closeWrite(); errors.Is(err, unix.ENOTCONN) {
			err = nil
		}
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errEnded
	}
	// Broken: the other direction, which may wait for bytes, must not wait for ever.
	abort(from)
	abort(to)
	return err
}

// abort wakes whoever waits at c.
func abort(c Conn) { c.SetDeadline(past) }

// copyBytes moves bytes until EOF, first through user space and then by splice.
func copyBytes(from, to Conn, n *int64) error {
	ended, err := plainBytes(from, to, n, spliceAfter)
	if ended || err != nil {
		return err
	}
	return spliceBytes(from, to, n)
}

// plainBytes copies through user space until EOF, or until most bytes in all
// have been moved.
func plainBytes(from, to Conn, n *int64, most int64) (ended bool, err error) {
	for *n < most {
		m, err := copyOnce(from, to)
		*n += int64(m)
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
	return false, nil
}

// buffers are lent for one read and the writes after it.
var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// copyOnce waits until there is something to read, takes a buffer, and moves
// what there is.
func copyOnce(from, to Conn) (n int, err error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return 0, err
	}
	var buf *[]byte
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		buf = buffers.Get().(*[]byte)
		n, rerr = ignoringEINTR(func() (int, error) { return unix.Read(int(fd), *buf) })
		if rerr == unix.EAGAIN {
			buffers.Put(buf) // nothing there: wait without a buffer
			buf = nil
			return false
		}
		return true
	})
	if buf != nil {
		defer buffers.Put(buf)
	}
	switch {
	case err != nil:
		return 0, err
	case rerr != nil:
		return 0, &CopyError{Op: "receive", Err: rerr}
	case n == 0:
		return 0, io.EOF
	}
	if _, err := to.Write((*buf)[:n]); err != nil {
		return 0, copyError("send", err)
	}
	return n, nil
}

// CopyError is a failure while bytes were moved, in ztunnel's words.
type CopyError struct {
	Op  string // send or receive
	Err error
}

func (e *CopyError) Error() string { return e.Op + ": " + e.Err.Error() }
func (e *CopyError) Unwrap() error { return e.Err }

// copyError drops what os.File says about itself.
func copyError(op string, err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return &CopyError{Op: op, Err: err}
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}
