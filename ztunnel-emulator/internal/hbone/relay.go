package hbone

import (
	"errors"
	"io"
	"os"
	"syscall"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// Relay copies between the stream and app, a connected non-blocking TCP socket
// in the runtime's poller, until both directions have ended; the end of one does
// not end the other. Reading an end of file from app sends END_STREAM; a
// received END_STREAM becomes a FIN. A stream that the peer resets with
// NO_ERROR, CANCEL or STREAM_CLOSED, and an app that went away, have just ended.
//
// The calling goroutine is the direction from app to the tunnel. app stays the
// caller's, who closes it afterwards: its deadlines may have been used. The counts
// are exact: bytes that were written to the tunnel, and to app.
func (s *Stream) Relay(app *os.File) (Counts, error) {
	raw, err := app.SyscallConn()
	if err != nil {
		s.Cancel(err)
		return s.Counts(), err
	}
	k := newSink(app, raw)
	s.attach(k)
	// An end that came before attach can't wake who waits for app.
	if !s.stopped.Load() {
		if err := s.sendFrom(raw); err != nil {
			s.c.reset(s, s.abandonCode(), err)
		}
	}
	<-k.done
	k.work.Wait()
	s.detach()
	return s.Counts(), s.relayError()
}

// attach makes the read loop write to k from now on, and what came already go there.
func (s *Stream) attach(k *sink) {
	s.c.mu.Lock()
	s.c.relaying[s] = struct{}{}
	s.c.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sink = k
	switch {
	case !s.q.empty():
		s.drainOrWake()
	case s.eof:
		k.close(s)
	}
}

// detach ends the stream where it hasn't: both directions of the application are over.
func (s *Stream) detach() {
	s.mu.Lock()
	s.sink = nil
	s.mu.Unlock()
	s.c.mu.Lock()
	delete(s.c.relaying, s)
	open := s.c.streams[s.id] == s
	s.c.mu.Unlock()
	if open {
		s.abandon()
		return
	}
	// What came since there was no sink any more, before the end that has removed it.
	s.dropQueue()
}

// abandon resets a stream whose user is done with it, without an error.
func (s *Stream) abandon() {
	code := s.abandonCode()
	s.c.mu.Lock()
	open := s.c.streams[s.id] == s
	if open {
		delete(s.c.streams, s.id)
	}
	s.c.mu.Unlock()
	if !open {
		s.dropQueue()
		return
	}
	s.finish(&ResetError{Code: code}, true)
	s.dropQueue()
	s.c.control(func(fr *http2.Framer) { fr.WriteRSTStream(s.id, code) })
	s.removed()
	s.c.closeIfDrained()
}

// dropQueue throws away what nobody will take.
func (s *Stream) dropQueue() {
	s.mu.Lock()
	dropped := s.q.clear(s.sink != nil && s.sink.draining)
	s.mu.Unlock()
	s.c.taken(nil, dropped)
}

// relayError is what the relay's user gets.
func (s *Stream) relayError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended && s.quiet {
		return nil
	}
	var re *ResetError
	if s.ended && (s.withConn.Load() || errors.As(s.err, &re)) {
		return &CopyError{Op: "receive", Err: s.err}
	}
	return s.err
}

// sendFrom sends the application's bytes until they end.
func (s *Stream) sendFrom(raw syscall.RawConn) error {
	f := &feed{s: s, max: smallRead}
	f.once = f.readOnce
	for {
		n, err := f.next(raw)
		switch {
		case err == io.EOF:
			s.CloseWrite() // an error has ended the stream, and is told by that
			return nil
		case err == errStopped:
			return nil // why is for the other direction to say
		case err != nil:
			return &CopyError{Op: "receive", Err: err}
		}
		err = s.c.writeData(s, *f.buf, n, false)
		f.release()
		if err != nil {
			s.c.unreserve(s, n)
			return nil // the stream has ended with the connection, or before
		}
		if s.sent.Add(int64(n)) > bigAfter {
			f.max = bigRead
		}
	}
}

// feed reads the application's bytes. It takes a buffer when there is something
// to read and window to send it, and not before.
type feed struct {
	s    *Stream
	max  int
	once func(fd uintptr) bool
	buf  *[]byte
	from *bufferPool
	n    int
	err  error
	full bool // there is something to read and no window
}

func (f *feed) release() {
	if f.buf != nil {
		f.from.put(f.buf)
		f.buf = nil
	}
}

// next waits for bytes, and window for them, and reads them.
func (f *feed) next(raw syscall.RawConn) (int, error) {
	for {
		f.full = false
		err := raw.Read(f.once)
		switch {
		case f.s.stopped.Load():
			f.s.c.unreserve(f.s, f.n)
			f.n = 0
			f.release()
			return 0, errStopped
		case err != nil:
			return 0, err
		case f.full:
			<-f.s.wake
			if f.s.appGone.Load() {
				// Reset while its bytes had no window: the peer may never give any,
				// being busy with what we can't deliver.
				return 0, io.EOF
			}
			continue
		case f.err != nil && endsQuietly(f.err):
			return 0, io.EOF
		case f.err != nil:
			return 0, os.NewSyscallError("read", f.err)
		}
		n := f.n
		f.n = 0
		return n, nil
	}
}

// readOnce is read(2) of at most the window; with false, the runtime waits until
// there is something to read.
func (f *feed) readOnce(fd uintptr) bool {
	f.n, f.err = 0, nil
	room := f.s.c.reserve(f.s, f.max)
	if room == 0 {
		return f.peekOnce(int(fd))
	}
	f.from = chunkPool(f.max)
	f.buf = f.from.get()
	n, err := read(int(fd), (*f.buf)[frameHeader:frameHeader+room])
	f.s.c.unreserve(f.s, room-n)
	if n > 0 {
		f.n = n
		return true
	}
	f.release()
	f.err = err
	if err == nil {
		f.err = io.EOF
	}
	return err != unix.EAGAIN
}

// peekOnce looks, without window, whether there is anything to wait for it for:
// an end needs none.
func (f *feed) peekOnce(fd int) bool {
	var one [1]byte
	n, _, err := unix.Recvfrom(fd, one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case n > 0:
		f.full = true
	case err == unix.EINTR:
		f.full = true
		f.s.wakeSender() // look again
	case err == unix.EAGAIN:
		return false
	case err != nil:
		f.err = err
	default:
		f.err = io.EOF
	}
	return true
}
