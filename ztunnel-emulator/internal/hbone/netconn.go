package hbone

import (
	"net"
	"sync"
	"time"
)

// Conn is the stream as a connection, for a tunnel within the tunnel (double
// HBONE). A deadline that passes ends the stream, whichever direction it is for.
func (s *Stream) Conn() net.Conn { return &netConn{Stream: s} }

type netConn struct {
	*Stream
	mu    sync.Mutex
	timer *time.Timer
}

func (n *netConn) LocalAddr() net.Addr                { return n.c.LocalAddr() }
func (n *netConn) RemoteAddr() net.Addr               { return n.c.RemoteAddr() }
func (n *netConn) SetReadDeadline(t time.Time) error  { return n.SetDeadline(t) }
func (n *netConn) SetWriteDeadline(t time.Time) error { return n.SetDeadline(t) }

func (n *netConn) SetDeadline(t time.Time) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.timer != nil {
		n.timer.Stop()
		n.timer = nil
	}
	if !t.IsZero() {
		n.timer = time.AfterFunc(time.Until(t), n.expire)
	}
	return nil
}

func (n *netConn) expire() { n.Stream.Close() }

// Close ends the stream and its deadline.
func (n *netConn) Close() error {
	n.SetDeadline(time.Time{})
	return n.Stream.Close()
}
