package hbone

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// wire is the connection below TLS. Reading: one read(2) takes several TLS
// records, and the buffer is held only while there is something in it. Writing:
// what one Write above makes, a record for each 16 KiB, leaves in one write(2).
type wire struct {
	net.Conn
	raw syscall.RawConn // nil for a connection without a descriptor

	// The reading side belongs to the read loop (before it, to the handshake).
	waits   bool    // Read waits; else it returns errAgain when the buffer is empty
	in      *[]byte // lent while in[r:w] is not empty
	r, w    int
	readErr error
	once    func(fd uintptr) bool // w.readOnce, bound once

	wmu    sync.Mutex
	direct bool    // Write writes at once: during the handshake
	out    *[]byte // lent while something waits to be flushed
	n      int
}

// errAgain is what TLS gets to read when nothing has come. It is temporary, and
// so TLS goes on where it was when there is more.
var errAgain net.Error = again{}

type again struct{}

func (again) Error() string   { return "nothing to read yet" }
func (again) Timeout() bool   { return true }
func (again) Temporary() bool { return true }

func newWire(nc net.Conn) *wire {
	w := &wire{Conn: nc, waits: true, direct: true}
	w.once = w.readOnce
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			w.raw = raw
		}
	}
	return w
}

// Read takes from the buffer.
func (w *wire) Read(b []byte) (int, error) {
	if w.in == nil {
		if !w.waits && w.readErr == nil {
			return 0, errAgain
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(b, (*w.in)[w.r:w.w])
	w.r += n
	if w.r == w.w {
		wireBuffers.put(w.in)
		w.in = nil
	}
	return n, nil
}

// fill waits until there is something to read and reads it. The buffer is empty
// before. While it waits it holds no buffer.
func (w *wire) fill() error {
	if w.readErr != nil {
		return w.readErr
	}
	var err error
	if w.raw != nil {
		err = w.raw.Read(w.once)
		if w.readErr != nil {
			err = w.readErr
		}
	} else {
		err = w.readPlain()
	}
	if err != nil && !isTimeout(err) {
		w.readErr = err
	}
	return err
}

// readOnce is read(2): with false, the runtime waits until there is something.
func (w *wire) readOnce(fd uintptr) bool {
	buf := wireBuffers.get()
	n, err := read(int(fd), *buf)
	if n > 0 {
		w.in, w.r, w.w = buf, 0, n
		return true
	}
	wireBuffers.put(buf)
	switch err {
	case unix.EAGAIN:
		return false
	case nil:
		w.readErr = io.EOF
	default:
		w.readErr = os.NewSyscallError("read", err)
	}
	return true
}

func (w *wire) readPlain() error {
	buf := wireBuffers.get()
	n, err := w.Conn.Read(*buf)
	if n > 0 {
		w.in, w.r, w.w = buf, 0, n
		return nil
	}
	wireBuffers.put(buf)
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// Write collects b for the next flush.
func (w *wire) Write(b []byte) (int, error) {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	if w.direct {
		return w.Conn.Write(b)
	}
	for rest := b; len(rest) > 0; {
		if w.out == nil {
			w.out = wireBuffers.get()
		}
		m := copy((*w.out)[w.n:], rest)
		w.n += m
		rest = rest[m:]
		if w.n == len(*w.out) {
			if err := w.flushLocked(); err != nil {
				return 0, err
			}
		}
	}
	return len(b), nil
}

// flush writes what was collected.
func (w *wire) flush() error {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	return w.flushLocked()
}

func (w *wire) flushLocked() error {
	if w.out == nil {
		return nil
	}
	_, err := w.Conn.Write((*w.out)[:w.n])
	wireBuffers.put(w.out)
	w.out, w.n = nil, 0
	return err
}

// SetWriteDeadline does nothing: TLS would set one around its close_notify, which
// is only collected here.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// collect ends the time of the handshake: from now on Read does not wait and
// Write collects.
func (w *wire) collect() {
	w.waits = false
	w.wmu.Lock()
	w.direct = false
	w.wmu.Unlock()
}

// release returns what is lent, when nobody uses the connection any more.
func (w *wire) release() {
	if w.in != nil {
		wireBuffers.put(w.in)
		w.in = nil
	}
	w.wmu.Lock()
	defer w.wmu.Unlock()
	if w.out != nil {
		wireBuffers.put(w.out)
		w.out, w.n = nil, 0
	}
}

// read is read(2), again if a signal came.
func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// write is write(2), again if a signal came.
func write(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Write(fd, b)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}
