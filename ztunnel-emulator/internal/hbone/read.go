package hbone

import (
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/net/http2"
)

// reader is the plaintext the read loop looks at. Its buffer is held only while
// there is something in it.
type reader struct {
	wire *wire
	from io.Reader // TLS above wire, or wire itself
	buf  *[]byte
	r, w int

	headers int // that the Framer has read since a frame began: one, and those of CONTINUATIONs
}

// maxHeaders is more CONTINUATIONs than honest headers need, of 16 KiB each.
const maxHeaders = 20

// more reads at least one byte behind what is there, and all that can be had
// without asking the kernel again.
func (b *reader) more() error {
	if b.buf == nil {
		b.buf, b.r, b.w = plains.get(), 0, 0
	}
	if b.r > 0 {
		b.w = copy(*b.buf, (*b.buf)[b.r:b.w])
		b.r = 0
	}
	before := b.w
	for b.w < len(*b.buf) {
		n, err := b.from.Read((*b.buf)[b.w:])
		b.w += n
		switch {
		case err == nil:
		case b.w > before:
			return nil // an error that lasts comes again
		case errors.Is(err, errAgain):
			if b.w == 0 {
				b.release()
			}
			if err := b.wire.fill(); err != nil {
				return err
			}
			if b.buf == nil {
				b.buf, b.r, b.w = plains.get(), 0, 0
			}
		default:
			return err
		}
	}
	return nil
}

func (b *reader) release() {
	if b.buf != nil {
		plains.put(b.buf)
		b.buf, b.r, b.w = nil, 0, 0
	}
}

func (b *reader) have() []byte {
	if b.buf == nil {
		return nil
	}
	return (*b.buf)[b.r:b.w]
}

// take is the next bytes, at least one and at most n. They are valid until the
// next call.
func (b *reader) take(n int) ([]byte, error) {
	if b.r == b.w {
		if err := b.more(); err != nil {
			return nil, err
		}
	}
	p := b.have()
	p = p[:min(n, len(p))]
	b.r += len(p)
	return p, nil
}

// peek is the next n bytes, which stay.
func (b *reader) peek(n int) ([]byte, error) {
	for b.w-b.r < n {
		if err := b.more(); err != nil {
			return nil, err
		}
	}
	return b.have()[:n], nil
}

// Read is for the Framer.
func (b *reader) Read(p []byte) (int, error) {
	if len(p) == frameHeader {
		if b.headers++; b.headers > maxHeaders {
			return 0, protocolError(http2.ErrCodeEnhanceYourCalm, "a flood of CONTINUATIONs")
		}
	}
	q, err := b.take(len(p))
	return copy(p, q), err
}

// readLoop takes frames until the connection ends.
func (c *conn) readLoop() error {
	for {
		h, err := c.in.peek(frameHeader)
		if err != nil {
			return err
		}
		length := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		kind, flags := http2.FrameType(h[3]), http2.Flags(h[4])
		id := binary.BigEndian.Uint32(h[5:]) & maxWindow
		if length > max(c.cfg.MaxFrame, minMaxFrame) {
			return protocolError(http2.ErrCodeFrameSize, "a frame above the limit")
		}
		switch {
		case kind == http2.FrameData:
			c.in.r += frameHeader
			err = c.readData(id, length, flags)
		case kind > http2.FrameContinuation || kind == http2.FramePriority:
			c.in.r += frameHeader
			err = c.skip(length)
		case length > maxControlFrame:
			err = protocolError(http2.ErrCodeEnhanceYourCalm, "a large "+kind.String())
		default:
			err = c.readFrame()
		}
		if err != nil {
			return err
		}
	}
}

// maxControlFrame is more than any honest frame but DATA has: headers have a
// limit of their own, and the Framer keeps a buffer of the largest it saw.
const maxControlFrame = 64 << 10

// skip takes a frame that means nothing to us: PRIORITY, which nobody uses any
// more, and what is unknown (RFC 9113, 5.5).
func (c *conn) skip(length int) error {
	if err := c.calm.control(); err != nil {
		return err
	}
	for length > 0 {
		p, err := c.in.take(length)
		if err != nil {
			return err
		}
		length -= len(p)
	}
	return nil
}

// readData takes a DATA frame piece by piece, as its bytes come.
func (c *conn) readData(id uint32, length int, flags http2.Flags) error {
	s, err := c.dataArrives(id, length)
	if err != nil {
		return err
	}
	last := flags.Has(http2.FlagDataEndStream)
	rest, pad := length, 0
	if flags.Has(http2.FlagDataPadded) {
		if length == 0 {
			return protocolError(http2.ErrCodeFrameSize, "padded DATA without its pad length")
		}
		p, err := c.in.take(1)
		if err != nil {
			return err
		}
		rest, pad = length-1, int(p[0])
		if pad > rest {
			return protocolError(http2.ErrCodeProtocol, "more padding than DATA")
		}
		rest -= pad
	}
	if length == 0 && !last {
		if err := c.calm.control(); err != nil {
			return err
		}
	}
	for rest > 0 {
		p, err := c.in.take(rest)
		if err != nil {
			return err
		}
		rest -= len(p)
		if s == nil {
			c.giveBack(nil, len(p))
			continue
		}
		s.deliver(p)
	}
	if flags.Has(http2.FlagDataPadded) {
		c.giveBack(s, 1+pad)
		for pad > 0 {
			p, err := c.in.take(pad)
			if err != nil {
				return err
			}
			pad -= len(p)
		}
	}
	if s != nil && last {
		c.endRemote(s)
	}
	return nil
}

// dataArrives counts a DATA frame against both windows, and finds its stream;
// nil if that has ended and the bytes are for nobody.
func (c *conn) dataArrives(id uint32, length int) (*Stream, error) {
	c.mu.Lock()
	if c.idle(id) {
		c.mu.Unlock()
		return nil, protocolError(http2.ErrCodeProtocol, "DATA on an idle stream")
	}
	if int64(length) > c.recvWindow {
		c.mu.Unlock()
		return nil, protocolError(http2.ErrCodeFlowControl, "DATA beyond the connection's window")
	}
	c.recvWindow -= int64(length)
	s := c.streams[id]
	if s == nil {
		c.mu.Unlock()
		return nil, nil
	}
	code := http2.ErrCodeNo
	switch {
	case s.remoteEnd:
		code = http2.ErrCodeStreamClosed
	case !c.server && !s.answered.Load():
		code = http2.ErrCodeProtocol // DATA before the response
	case int64(length) > s.recvWindow:
		code = http2.ErrCodeFlowControl
	default:
		s.recvWindow -= int64(length)
	}
	c.mu.Unlock()
	if code != http2.ErrCodeNo {
		c.reset(s, code, &ResetError{Code: code})
		return nil, nil
	}
	return s, nil
}

// idle tells whether no stream of that number was ever opened. mu is held.
func (c *conn) idle(id uint32) bool {
	if id%2 == 0 {
		return true
	}
	if c.server {
		return id > c.lastID
	}
	return id >= c.nextID
}
