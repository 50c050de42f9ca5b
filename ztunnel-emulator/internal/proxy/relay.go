// Package proxy is what an accepted connection does: where it was going before
// it was redirected, a connection onward from inside the same pod, and the bytes
// between the two.
package proxy

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// spliceAfter is how many bytes a direction copies through user space before it
// may be worth a pipe. Small pieces are faster with plain reads, however many
// there are; large ones with splice(2), where the bytes stay in the kernel.
const spliceAfter = 128 << 10

// bufferSize is what one plain read takes at the most. One that takes so much
// has met a large piece.
const bufferSize = 32 << 10

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

// relay is two directions between two connections.
type relay struct {
	counts       Counts
	there, back  error
	aShut, bShut atomic.Bool  // we have sent a FIN there
	left         atomic.Int32 // directions that have not ended
	late         atomic.Pointer[time.Timer]
	done         func(Counts, error)
}

// lastWords is how long a connection has to take what the other one, which is gone,
// has said before. One that would write first, as an echo does, and whom nobody reads
// any more, never takes it.
var lastWords = 5 * time.Second

// Relay copies between a and b until both directions have ended, and calls done
// then, on a goroutine of its own. An end of one direction (FIN) does not end the
// other. a and b stay the caller's.
//
// An idle relay holds the two sockets and no buffer and no pipe: both are taken
// when there is something to read. It holds two goroutines with fresh, small
// stacks; the caller's, which has grown while it connected, is not kept.
func Relay(a, b Conn, done func(Counts, error)) {
	r := &relay{done: done}
	r.left.Store(2)
	go r.forth(a, b)
	go r.andBack(a, b)
}

func (r *relay) forth(a, b Conn) {
	r.there = relayOne(a, b, &r.counts.Sent, &r.aShut, &r.bShut)
	r.end(a, r.there)
}

func (r *relay) andBack(a, b Conn) {
	r.back = relayOne(b, a, &r.counts.Received, &r.bShut, &r.aShut)
	r.end(b, r.back)
}

// end is the end of one direction, from whose source nothing is read any more; the
// last one reports.
func (r *relay) end(from Conn, err error) {
	if isSend(err) {
		r.late.Store(time.AfterFunc(lastWords, func() { abort(from) }))
	}
	if r.left.Add(-1) == 0 {
		if t := r.late.Load(); t != nil {
			t.Stop()
		}
		r.done(r.counts, firstOf(r.there, r.back))
	}
}

// errEnded marks the direction that ended because the other one broke.
var errEnded = errors.New("the other direction has ended it")

func firstOf(a, b error) error {
	if errors.Is(a, errEnded) || a == nil {
		return b
	}
	return a
}

// relayOne is one direction, from its first byte to its FIN. fromShut and toShut
// tell whether a FIN has been sent to either.
func relayOne(from, to Conn, n *int64, fromShut, toShut *atomic.Bool) error {
	err := copyBytes(from, to, n)
	if err == nil && !fromShut.Load() && from.isClosed() && !fromShut.Load() {
		// No FIN came but a reset, of which the kernel tells only once: it has told
		// the other direction, which was sending. (Asked last, whether it was not the
		// other direction's FIN that has just closed it.)
		err = &CopyError{Op: "receive", Err: unix.ECONNRESET}
	}
	if err == nil {
		toShut.Store(true)
		// FIN came: pass it on. A peer that is gone already needs none.
		if err = to.closeWrite(); errors.Is(err, unix.ENOTCONN) {
			err = nil
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errEnded
	case isSend(err):
		// to is gone. What it has said before may still wait for the other
		// direction, which finds its end by itself, or is late (lastWords).
		return err
	}
	// from is gone. The other direction waits for bytes that nobody would get.
	abort(from)
	abort(to)
	return err
}

// isClosed tells whether nothing is left of the connection in the kernel. As long as
// we have not ended our half, only a reset can have done that.
func (c Conn) isClosed() bool {
	const tcpClose = 7 // TCP_CLOSE of tcp_states.h
	closed := false
	c.control(func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		closed = err == nil && info.State == tcpClose
		return err
	})
	return closed
}

// abort wakes whoever waits at c.
func abort(c Conn) { c.SetDeadline(past) }

// copyBytes moves bytes until EOF, now in one way and now in the other.
func copyBytes(from, to Conn, n *int64) error {
	for {
		ended, err := plainBytes(from, to, n, spliceAfter)
		if !ended && err == nil {
			ended, err = spliceBytes(from, to, n)
		}
		if ended || err != nil {
			return err
		}
	}
}

// plainBytes copies through user space until EOF, or until a large piece comes
// and so many bytes in all have been moved.
func plainBytes(from, to Conn, n *int64, after int64) (ended bool, err error) {
	for {
		m, err := copyOnce(from, to)
		*n += int64(m)
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if m == bufferSize && *n >= after {
			return false, nil
		}
	}
}

// buffers are lent for one read and the writes after it.
var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

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
	n, err = to.Write((*buf)[:n]) // what it wrote before an error counts
	if err != nil {
		return n, copyError("send", err)
	}
	return n, nil
}

// CopyError is a failure while bytes were moved, in ztunnel's words.
type CopyError struct {
	Op  string // send or receive
	Err error
}

func (e *CopyError) Error() string { return e.Op + ": " + osError(e.Err) }
func (e *CopyError) Unwrap() error { return e.Err }

// isSend tells the error of who could not be sent to.
func isSend(err error) bool {
	var ce *CopyError
	return errors.As(err, &ce) && ce.Op == "send"
}

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
