package hbone

import (
	"errors"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// sink is the application that a tunnel's bytes go to. The read loop writes to
// it itself, without waiting; what it does not take waits in the stream's queue
// for a goroutine that can wait. Guarded by the stream's mu, but for what that
// goroutine uses.
type sink struct {
	app      *os.File
	raw      syscall.RawConn
	now      func(fd uintptr) bool // s.writeNow, bound once
	p        []byte
	n        int
	err      error
	draining bool // drain runs, and it alone writes
	closed   bool // nothing more will be written
	work     sync.WaitGroup
	done     chan struct{} // closed with closed
}

func newSink(app *os.File, raw syscall.RawConn) *sink {
	k := &sink{app: app, raw: raw, done: make(chan struct{})}
	k.now = k.writeNow
	return k
}

// writeNow is write(2) once, whatever comes of it.
func (k *sink) writeNow(fd uintptr) bool {
	k.n, k.err = write(int(fd), k.p)
	if k.err == unix.EAGAIN {
		k.err = nil
	}
	return true
}

// try writes what the socket takes at once.
func (k *sink) try(p []byte) (int, error) {
	k.p, k.n, k.err = p, 0, nil
	err := k.raw.Write(k.now)
	k.p = nil
	if err == nil {
		err = k.err
	}
	return k.n, err
}

// write waits until the socket takes something.
func (k *sink) write(p []byte) (n int, err error) {
	var werr error
	err = k.raw.Write(func(fd uintptr) bool {
		n, werr = write(int(fd), p)
		return werr != unix.EAGAIN
	})
	if err == nil {
		err = werr
	}
	return n, err
}

// close ends the direction to the application, with a FIN if all the bytes
// there were have been written. s.mu is held, and nobody drains.
func (k *sink) close(s *Stream) {
	if k.closed {
		return
	}
	k.closed = true
	if !s.ended || s.quiet {
		k.raw.Control(func(fd uintptr) { k.err = unix.Shutdown(int(fd), unix.SHUT_WR) })
		if k.err != nil && !endsQuietly(k.err) && s.err == nil {
			s.err = &CopyError{Op: "send", Err: os.NewSyscallError("shutdown", k.err)}
		}
	}
	close(k.done)
}

// deliver takes a piece of a DATA frame from the read loop, and never waits.
func (s *Stream) deliver(p []byte) {
	s.mu.Lock()
	k := s.sink
	if s.ended || (k != nil && k.closed) {
		s.mu.Unlock()
		s.c.giveBack(nil, len(p)) // for nobody
		return
	}
	n, err := 0, error(nil)
	if k != nil && !k.draining {
		n, err = k.try(p)
		s.received.Add(int64(n))
	}
	rest := p[n:]
	var forConn int64
	switch {
	case err != nil:
		// Gone: who sends finds out too, by reading. What comes is thrown away.
		s.eof = true
		k.close(s)
	case len(rest) > 0:
		s.q.add(rest)
		forConn = s.c.queuedMore(len(rest))
		s.drainOrWake()
		rest = nil
	}
	s.mu.Unlock()
	s.c.giveBack(s, n)
	s.c.giveBack(nil, len(rest))
	s.c.sendCredit(nil, 0, forConn)
	s.sinkFailed(err)
}

// drainOrWake gets someone to take what is in the queue. s.mu is held.
func (s *Stream) drainOrWake() {
	switch k := s.sink; {
	case k == nil:
		if s.readable != nil {
			wakeOne(s.readable)
		}
	case !k.draining:
		k.draining = true
		k.work.Add(1)
		go s.drain(k)
	}
}

// sinkFailed resets the stream if the application did not just go away.
func (s *Stream) sinkFailed(err error) {
	switch {
	case err == nil:
		return
	case endsQuietly(err) || errors.Is(err, os.ErrDeadlineExceeded):
		s.appGone.Store(true)
		s.wakeSender()
		return
	}
	s.c.reset(s, s.abandonCode(), &CopyError{Op: "send", Err: os.NewSyscallError("write", err)})
}

// drain writes the queue, as slowly as the application takes it.
func (s *Stream) drain(k *sink) {
	defer k.work.Done()
	for {
		s.mu.Lock()
		if s.ended && !s.quiet || s.q.empty() {
			s.drained(k)
			return
		}
		p := s.q.head()
		s.mu.Unlock()

		n, err := k.write(p)
		s.received.Add(int64(n))
		s.mu.Lock()
		s.q.drop(n)
		if err != nil && (!s.ended || s.quiet) {
			s.eof = true
			s.drained(k)
			s.c.taken(nil, n)
			s.sinkFailed(err)
			return
		}
		s.mu.Unlock()
		s.c.taken(s, n)
	}
}

// drained is the end of drain: nothing is left, or nothing can be written. It
// gives up s.mu.
func (s *Stream) drained(k *sink) {
	k.draining = false
	dropped := s.q.clear(false)
	if s.eof {
		k.close(s)
	}
	s.mu.Unlock()
	s.c.taken(nil, dropped)
}
