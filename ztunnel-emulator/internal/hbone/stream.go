package hbone

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// errStopped is the end of sending on a stream that has ended; why is in the stream.
var errStopped = errors.New("the stream has ended")

// Counts is how many bytes went each way.
type Counts struct {
	Sent, Received int64 // from the application to the tunnel, and back
}

// Stream is one CONNECT: the bytes of one connection.
type Stream struct {
	c  *conn
	id uint32

	// Guarded by the connection's mu.
	sendWindow, recvWindow int64
	owed                   int64 // taken, and not yet given back to recvWindow
	inBlocked              bool
	localEnd, remoteEnd    bool // END_STREAM sent, received

	answered atomic.Bool // the response headers came, or left
	stopped  atomic.Bool // nothing may be sent any more
	withConn atomic.Bool // it ended with its connection
	appGone  atomic.Bool // the application can't be written to any more
	sent     atomic.Int64
	received atomic.Int64
	wake     chan struct{} // for who sends: window, or the end

	mu       sync.Mutex
	q        queue
	eof      bool  // nothing more will come
	ended    bool  // reset, cancelled, or the connection failed
	quiet    bool  // that is no failure: both directions just end
	err      error // why, if not quietly
	sink     *sink // the application the read loop writes to, if one is attached
	readable chan struct{}
	ctx      context.Context
	cancel   context.CancelCauseFunc
	onRemove func()
	response chan *http2.MetaHeadersFrame // client: the answer, once; closed when there is none
}

// newStream makes a stream with its windows. mu is held.
func (c *conn) newStream(id uint32) *Stream {
	s := &Stream{
		c: c, id: id,
		sendWindow: c.peerWindow,
		recvWindow: int64(c.cfg.StreamWindow),
		wake:       make(chan struct{}, 1),
	}
	c.streams[id] = s
	return s
}

// Counts may be read while the stream is being relayed.
func (s *Stream) Counts() Counts {
	return Counts{Sent: s.sent.Load(), Received: s.received.Load()}
}

// wakeSender wakes who waits for window.
func (s *Stream) wakeSender() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// finish ends a stream from outside its two directions: a reset, a cancel, or
// the end of the connection. Quietly means that both directions just end, what
// came before being still delivered; otherwise it fails at once.
func (s *Stream) finish(err error, quietly bool) {
	s.mu.Lock()
	first := !s.ended
	if !first && (quietly || !s.quiet) {
		s.mu.Unlock()
		return
	}
	s.ended, s.quiet, s.err = true, quietly, err
	s.stopped.Store(true)
	dropped := 0
	if !quietly {
		dropped = s.q.clear(s.sink != nil && s.sink.draining)
	}
	s.endRecvLocked()
	app := (*os.File)(nil)
	if s.sink != nil {
		app = s.sink.app
	}
	if s.cancel != nil {
		s.cancel(err)
	}
	if first && s.response != nil {
		close(s.response)
	}
	s.mu.Unlock()
	s.c.taken(nil, dropped)
	s.wakeSender()
	if app != nil {
		// Who waits for the application's bytes must not wait for ever.
		app.SetReadDeadline(past)
		if !quietly {
			app.SetWriteDeadline(past)
		}
	}
}

// past is a deadline that is over.
var past = time.Unix(1, 0)

// endRecvLocked notes that nothing more will come. s.mu is held.
func (s *Stream) endRecvLocked() {
	s.eof = true
	if s.readable != nil {
		wakeOne(s.readable)
	}
	if s.sink != nil && !s.sink.draining {
		s.sink.close(s)
	}
}

func wakeOne(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// removed is called once, when the stream has left the connection's table.
func (s *Stream) removed() {
	s.c.unblock(s)
	s.mu.Lock()
	f := s.onRemove
	s.onRemove = nil
	s.mu.Unlock()
	if f != nil {
		f()
	}
}

// endLocal notes that END_STREAM was sent.
func (c *conn) endLocal(s *Stream) {
	s.stopped.Store(true)
	c.mu.Lock()
	s.localEnd = true
	c.removeIfEnded(s)
}

// endRemote notes that END_STREAM came.
func (c *conn) endRemote(s *Stream) {
	c.mu.Lock()
	s.remoteEnd = true
	c.removeIfEnded(s)
	// Who sees the end sees a stream that no longer counts.
	s.mu.Lock()
	s.endRecvLocked()
	s.mu.Unlock()
}

// removeIfEnded forgets a stream with two ends, and gives up mu.
func (c *conn) removeIfEnded(s *Stream) {
	gone := s.localEnd && s.remoteEnd && c.streams[s.id] == s
	if gone {
		delete(c.streams, s.id)
	}
	c.mu.Unlock()
	if gone {
		s.removed()
		c.closeIfDrained()
	}
}

// reset ends s with RST_STREAM; err is what its user gets. It does nothing if
// the stream has left already.
func (c *conn) reset(s *Stream, code http2.ErrCode, err error) {
	c.mu.Lock()
	open := c.streams[s.id] == s
	if open {
		delete(c.streams, s.id)
	}
	c.mu.Unlock()
	s.finish(err, false)
	if !open {
		return
	}
	c.control(func(fr *http2.Framer) { fr.WriteRSTStream(s.id, code) })
	s.removed()
	c.closeIfDrained()
}

// Cancel abandons the stream from outside: a change of policy, a pod that goes.
// The peer sees the end of the bytes; Relay returns err.
func (s *Stream) Cancel(err error) {
	if err == nil {
		err = errCancelled
	}
	s.c.reset(s, s.abandonCode(), err)
}

// abandonCode is the code that a peer takes for the end of the bytes.
func (s *Stream) abandonCode() http2.ErrCode {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.server && s.localEnd {
		return http2.ErrCodeNo
	}
	return http2.ErrCodeCancel
}
