package hbone

import (
	"time"

	"golang.org/x/net/http2"
)

// calm counts what costs us more than it costs a peer. It belongs to the read loop.
type calm struct {
	frames bucket // control frames and empty DATA
	resets bucket // requests taken back before they were answered
}

// controlBurst and controlRate are far above any honest peer's.
const (
	controlBurst = 1000
	controlRate  = 200 // a second
)

func (c *calm) init(cfg Config) {
	c.frames = bucket{room: controlBurst, rate: controlRate}
	// A client whose applications all give up at once is honest; twice in a second it isn't.
	c.resets = bucket{room: float64(2 * cfg.ServerMaxStreams), rate: float64(cfg.ServerMaxStreams)}
}

func (c *calm) control() error {
	if c.frames.over() {
		return protocolError(http2.ErrCodeEnhanceYourCalm, "a flood of control frames")
	}
	return nil
}

func (c *calm) earlyReset() error {
	if c.resets.over() {
		return protocolError(http2.ErrCodeEnhanceYourCalm, "a flood of resets")
	}
	return nil
}

// bucket leaks at rate drops a second and runs over above room.
type bucket struct {
	room, rate, level float64
	last              time.Time
}

// over adds a drop.
func (b *bucket) over() bool {
	if b.level > b.room/2 || b.last.IsZero() {
		// The clock is asked only when it may matter.
		now := time.Now()
		if !b.last.IsZero() {
			b.level = max(0, b.level-b.rate*now.Sub(b.last).Seconds())
		}
		b.last = now
	}
	b.level++
	return b.level > b.room
}
