package hbone

import (
	"io"
	"time"

	"golang.org/x/net/http2"
)

// drainPing is the payload of the ping that follows a first GOAWAY: when it is
// answered, the peer knows, and the last stream it opened has arrived.
var drainPing = [8]byte{'d', 'r', 'a', 'i', 'n', 'i', 'n', 'g'}

// lingerTime is how long a peer may take to close after our end.
const lingerTime = time.Second

// Drain ends the connection gracefully: the peer is told (GOAWAY NO_ERROR), no
// new stream begins, and with the last one the connection ends. Who can't wait
// for that calls Close after a while.
func (c *conn) Drain() {
	c.mu.Lock()
	if c.err != nil || c.draining != notDraining {
		c.mu.Unlock()
		return
	}
	if c.server {
		// In two steps (RFC 9113, 6.8), so that a request already under way is served.
		c.draining = drainAnnounced
		c.mu.Unlock()
		c.control(func(fr *http2.Framer) {
			fr.WriteGoAway(maxWindow, http2.ErrCodeNo, nil)
			fr.WritePing(false, drainPing)
		})
		return
	}
	c.draining = drainFinal
	c.mu.Unlock()
	c.control(func(fr *http2.Framer) { fr.WriteGoAway(0, http2.ErrCodeNo, nil) })
	c.closeIfDrained()
}

// drainAnswered is the second step of a server's drain.
func (c *conn) drainAnswered() {
	c.mu.Lock()
	if c.draining != drainAnnounced {
		c.mu.Unlock()
		return
	}
	c.draining = drainFinal
	last := c.lastID
	c.servedID = last
	c.mu.Unlock()
	c.control(func(fr *http2.Framer) { fr.WriteGoAway(last, http2.ErrCodeNo, nil) })
	c.closeIfDrained()
}

// closeIfDrained ends a draining connection that has no stream any more. Our end
// of the bytes goes first and the socket after the peer's: a close with bytes
// unread would be a reset, and take our last bytes with it.
func (c *conn) closeIfDrained() {
	c.mu.Lock()
	if c.draining != drainFinal || len(c.streams) > 0 || c.err != nil {
		c.mu.Unlock()
		return
	}
	c.draining = drainClosed
	c.work.Add(1)
	c.mu.Unlock()
	go c.closeGently()
}

// closeGently sends what is left and our end, and gives the peer a moment for its own.
func (c *conn) closeGently() {
	defer c.work.Done()
	c.wire.Conn.SetDeadline(time.Now().Add(lingerTime))
	c.wmu.Lock()
	err := c.takeControl()
	if err == nil {
		err = c.sayEnd()
	}
	c.wmu.Unlock()
	if w, ok := c.wire.Conn.(interface{ CloseWrite() error }); err == nil && ok {
		err = w.CloseWrite()
	}
	if err != nil {
		c.fail(io.EOF)
	}
}
