package hbone

import (
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// pinger finds dead peers: a ping some time after each pong, whatever else is
// going on, and the end of the connection if it stays without an answer. A
// writer that is stuck at a peer that does not read ends with it.
type pinger struct {
	mu      sync.Mutex
	timer   *time.Timer
	waiting bool // for a pong
	sent    uint64
	stopped bool
}

func (p *pinger) start(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer = time.AfterFunc(c.cfg.PingInterval, c.pingDue)
}

func (p *pinger) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	p.timer.Stop()
}

// pingDue is the timer: time for a ping, or the time for a pong is over.
func (c *conn) pingDue() {
	p := &c.pings
	p.mu.Lock()
	if p.stopped {
		p.mu.Unlock()
		return
	}
	if p.waiting {
		p.mu.Unlock()
		c.fail(ErrPingTimeout)
		return
	}
	p.waiting = true
	p.sent++
	data := pingData(p.sent)
	p.timer.Reset(c.cfg.PingTimeout)
	p.mu.Unlock()
	c.control(func(fr *http2.Framer) { fr.WritePing(false, data) })
}

func pingData(n uint64) [8]byte {
	return [8]byte{'p', 'i', 'n', 'g', byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
}

// ping is the peer's ping, or its answer to ours.
func (c *conn) ping(f *http2.PingFrame) error {
	if !f.IsAck() {
		if err := c.calm.control(); err != nil {
			return err
		}
		data := f.Data
		c.control(func(fr *http2.Framer) { fr.WritePing(true, data) })
		return nil
	}
	if f.Data == drainPing {
		c.drainAnswered()
		return nil
	}
	p := &c.pings
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting && !p.stopped && f.Data == pingData(p.sent) {
		p.waiting = false
		p.timer.Reset(c.cfg.PingInterval)
	}
	return nil
}
