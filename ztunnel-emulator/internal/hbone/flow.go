package hbone

import (
	"slices"

	"golang.org/x/net/http2"
)

// reserve takes up to most bytes from both send windows. With 0 there is no
// window, and the stream is woken when there is.
func (c *conn) reserve(s *Stream, most int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(int64(most), s.sendWindow, c.sendWindow)
	if n > 0 {
		s.sendWindow -= n
		c.sendWindow -= n
		return int(n)
	}
	if s.sendWindow > 0 && !s.inBlocked && c.streams[s.id] == s {
		s.inBlocked = true
		c.blocked = append(c.blocked, s)
	}
	return 0
}

// unreserve gives back what was not used.
func (c *conn) unreserve(s *Stream, n int) {
	if n == 0 {
		return
	}
	c.mu.Lock()
	s.sendWindow += int64(n)
	c.sendWindow += int64(n)
	c.wakeBlocked()
	c.mu.Unlock()
}

// wakeBlocked wakes who waits for the connection's window. mu is held.
func (c *conn) wakeBlocked() {
	if c.sendWindow <= 0 || len(c.blocked) == 0 {
		return
	}
	for i, s := range c.blocked {
		s.inBlocked = false
		s.wakeSender()
		c.blocked[i] = nil
	}
	c.blocked = c.blocked[:0]
}

// unblock forgets a stream that has ended, or a peer that gives no window and opens
// one stream after the other would have us remember them all.
func (c *conn) unblock(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.inBlocked {
		s.inBlocked = false
		c.blocked = slices.DeleteFunc(c.blocked, func(other *Stream) bool { return other == s })
	}
}

// windowUpdate is the peer's: it took bytes of ours.
func (c *conn) windowUpdate(f *http2.WindowUpdateFrame) error {
	c.mu.Lock()
	if f.StreamID == 0 {
		defer c.mu.Unlock()
		if c.sendWindow+int64(f.Increment) > maxWindow {
			return protocolError(http2.ErrCodeFlowControl, "the connection's window overflows")
		}
		c.sendWindow += int64(f.Increment)
		c.wakeBlocked()
		return nil
	}
	if c.idle(f.StreamID) {
		c.mu.Unlock()
		return protocolError(http2.ErrCodeProtocol, "WINDOW_UPDATE on an idle stream")
	}
	s := c.streams[f.StreamID]
	overflow := s != nil && s.sendWindow+int64(f.Increment) > maxWindow
	if s != nil && !overflow {
		s.sendWindow += int64(f.Increment)
		s.wakeSender()
	}
	c.mu.Unlock()
	if overflow {
		c.reset(s, http2.ErrCodeFlowControl, &ResetError{Code: http2.ErrCodeFlowControl})
	}
	return nil
}

// newPeerWindow is SETTINGS_INITIAL_WINDOW_SIZE: it changes the windows of the
// open streams too, and may make them negative (RFC 9113, 6.9.2).
func (c *conn) newPeerWindow(size int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delta := size - c.peerWindow
	c.peerWindow = size
	for _, s := range c.streams {
		if s.sendWindow+delta > maxWindow {
			return protocolError(http2.ErrCodeFlowControl, "a stream's window overflows")
		}
		s.sendWindow += delta
		if s.sendWindow > 0 {
			s.wakeSender()
		}
	}
	return nil
}

// giveBack returns window for n bytes that were taken as they came: to s, unless
// that is nil, and to the connection. Small amounts are collected up to half of
// the window; the peer never waits for them, because the other half is its own.
func (c *conn) giveBack(s *Stream, n int) {
	if n == 0 {
		return
	}
	c.mu.Lock()
	forConn, forStream := c.oweConn(int64(n)), c.oweStream(s, int64(n))
	c.mu.Unlock()
	c.sendCredit(s, forStream, forConn)
}

// queuedMore counts n bytes that wait for an application. The connection's
// window is given back for them at once, so that applications that don't read
// do not keep the other streams from sending; beyond MaxQueued only when they
// were taken, so that memory has a bound. The caller passes what it returns to
// sendCredit.
func (c *conn) queuedMore(n int) (forConn int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queued += int64(n)
	if c.queued > int64(c.cfg.MaxQueued) {
		c.held += int64(n)
		return 0
	}
	return c.oweConn(int64(n))
}

// taken counts n queued bytes as taken, and gives s window for them, unless s is nil.
func (c *conn) taken(s *Stream, n int) {
	if n == 0 {
		return
	}
	c.mu.Lock()
	c.queued -= int64(n)
	back := min(c.held, int64(n))
	c.held -= back
	forConn, forStream := c.oweConn(back), c.oweStream(s, int64(n))
	c.mu.Unlock()
	c.sendCredit(s, forStream, forConn)
}

// oweConn adds n bytes to what the connection's window gets back, and returns
// what is to be given now. mu is held.
func (c *conn) oweConn(n int64) (give int64) {
	c.owed += n
	if c.owed < max(1, int64(c.cfg.ConnWindow)/2) {
		return 0
	}
	give, c.owed = c.owed, 0
	c.recvWindow += give
	return give
}

// oweStream is the same for a stream that can still receive.
func (c *conn) oweStream(s *Stream, n int64) (give int64) {
	if s == nil || s.remoteEnd || c.streams[s.id] != s {
		return 0
	}
	s.owed += n
	if s.owed < max(1, int64(c.cfg.StreamWindow)/2) {
		return 0
	}
	give, s.owed = s.owed, 0
	s.recvWindow += give
	return give
}

// sendCredit tells the peer.
func (c *conn) sendCredit(s *Stream, forStream, forConn int64) {
	if forStream == 0 && forConn == 0 {
		return
	}
	c.control(func(fr *http2.Framer) {
		if forStream > 0 {
			fr.WriteWindowUpdate(s.id, uint32(forStream))
		}
		if forConn > 0 {
			fr.WriteWindowUpdate(0, uint32(forConn))
		}
	})
}
