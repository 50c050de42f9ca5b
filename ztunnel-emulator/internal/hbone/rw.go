package hbone

import (
	"io"
)

// Read takes received bytes. It is for a stream that is not relayed: a tunnel
// within the tunnel, or a test.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		s.mu.Lock()
		if s.readable == nil {
			s.readable = make(chan struct{}, 1)
		}
		ready := s.readable
		if n := s.readLocked(p); n > 0 {
			s.mu.Unlock()
			s.received.Add(int64(n))
			s.c.taken(s, n)
			return n, nil
		}
		eof, err := s.eof, s.err
		if s.ended && s.quiet {
			err = nil
		}
		s.mu.Unlock()
		switch {
		case err != nil:
			return 0, err
		case eof:
			return 0, io.EOF
		}
		<-ready
	}
}

func (s *Stream) readLocked(p []byte) (n int) {
	for len(p) > n && !s.q.empty() {
		m := copy(p[n:], s.q.head())
		s.q.drop(m)
		n += m
	}
	return n
}

// Write sends p, as the windows allow.
func (s *Stream) Write(p []byte) (written int, err error) {
	buf := smallChunks.get()
	defer smallChunks.put(buf)
	for len(p) > 0 {
		if s.stopped.Load() {
			return written, s.writeError()
		}
		n := s.c.reserve(s, min(len(p), smallRead))
		if n == 0 {
			<-s.wake
			continue
		}
		copy((*buf)[frameHeader:], p[:n])
		if err := s.c.writeData(s, *buf, n, false); err != nil {
			s.c.unreserve(s, n)
			return written, s.writeError()
		}
		s.sent.Add(int64(n))
		written += n
		p = p[n:]
	}
	return written, nil
}

func (s *Stream) writeError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return io.ErrClosedPipe
}

// CloseWrite sends END_STREAM; the other direction goes on.
func (s *Stream) CloseWrite() error {
	var header [frameHeader]byte
	return s.c.writeData(s, header[:], 0, true)
}

// Close abandons what hasn't ended. The peer sees the end of the bytes.
func (s *Stream) Close() error {
	s.abandon()
	return nil
}
