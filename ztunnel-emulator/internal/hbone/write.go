package hbone

import (
	"encoding/binary"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// lockWrite makes the caller the connection's writer until unlockWrite.
func (c *conn) lockWrite() {
	c.writers.Add(1)
	c.wmu.Lock()
}

// unlockWrite sends what was written, unless somebody waits who will: then the
// frames of several streams leave in one write(2).
func (c *conn) unlockWrite() error {
	err := c.takeControl()
	if others := c.writers.Add(-1) > 0; err == nil && !others {
		err = c.wire.flush()
	}
	c.wmu.Unlock()
	if err != nil {
		c.fail(err)
	}
	return err
}

// takeControl writes the control frames that wait. wmu is held.
func (c *conn) takeControl() error {
	c.ctlMu.Lock()
	if c.ctl.Len() == 0 {
		c.ctlMu.Unlock()
		return nil
	}
	buf := smallChunks.get()
	defer smallChunks.put(buf)
	frames := append((*buf)[:0], c.ctl.Bytes()...)
	c.ctl.Reset()
	c.ctlMu.Unlock()
	_, err := c.plain.Write(frames)
	return err
}

// control sends a small frame, some time soon and without waiting: the read loop
// must not wait for a peer that may itself be waiting for us to read.
func (c *conn) control(add func(*http2.Framer)) {
	c.ctlMu.Lock()
	add(c.ctlFr)
	full := c.ctl.Len() > c.cfg.MaxControl && !c.ctlOver
	start := !c.flushing && !c.ctlOver && !full
	if start {
		c.flushing = true
		c.work.Add(1)
	}
	c.ctlMu.Unlock()
	if start {
		go c.flushControl()
	}
	if full {
		// It asks for answers and does not read them.
		c.fail(protocolError(http2.ErrCodeEnhanceYourCalm, "a peer that does not read"))
	}
}

// flushControl writes control frames until there are none.
func (c *conn) flushControl() {
	defer c.work.Done()
	for {
		c.lockWrite()
		err := c.unlockWrite()
		c.ctlMu.Lock()
		if err != nil || c.ctl.Len() == 0 {
			c.flushing = false
			c.ctlMu.Unlock()
			return
		}
		c.ctlMu.Unlock()
	}
}

// writeData sends (*buf)[frameHeader:][:n] on s, whose windows were reserved, as
// DATA frames made in place.
func (c *conn) writeData(s *Stream, buf []byte, n int, end bool) error {
	c.lockWrite()
	if s.stopped.Load() {
		c.unlockWrite()
		return errStopped
	}
	err := c.writeFrames(s.id, buf, n, end)
	if uerr := c.unlockWrite(); err == nil {
		err = uerr
	}
	if err != nil {
		c.fail(err)
		return err
	}
	if end {
		c.endLocal(s)
	}
	return nil
}

// writeFrames is one DATA frame, or several if the peer wants them smaller. A
// frame's header is written over the last bytes of the one before, which have
// left already.
func (c *conn) writeFrames(id uint32, buf []byte, n int, end bool) error {
	if err := c.takeControl(); err != nil {
		return err
	}
	most := int(c.peerFrame.Load())
	for at := 0; ; {
		m := min(n-at, most)
		last := at+m == n
		frame := buf[at : at+frameHeader+m]
		putFrameHeader(frame, m, http2.FrameData, flagIf(end && last, http2.FlagDataEndStream), id)
		if _, err := c.plain.Write(frame); err != nil {
			return err
		}
		at += m
		if last {
			return nil
		}
	}
}

func flagIf(yes bool, f http2.Flags) http2.Flags {
	if yes {
		return f
	}
	return 0
}

func putFrameHeader(b []byte, length int, kind http2.FrameType, flags http2.Flags, id uint32) {
	b[0], b[1], b[2] = byte(length>>16), byte(length>>8), byte(length)
	b[3], b[4] = byte(kind), byte(flags)
	binary.BigEndian.PutUint32(b[5:], id)
}

// writeHeaders sends a header block on s. wmu is held, and stays so until the
// block is written: the peer's table must see blocks in the order they were made.
func (c *conn) writeHeaders(id uint32, fields []hpack.HeaderField, end bool) error {
	if size := c.table.Swap(-1); size >= 0 {
		c.henc.SetMaxDynamicTableSizeLimit(uint32(size))
	}
	c.hbuf.Reset()
	for _, f := range fields {
		c.henc.WriteField(f)
	}
	block := c.hbuf.Bytes()
	most := int(c.peerFrame.Load())
	var header [frameHeader]byte
	kind, flags := http2.FrameHeaders, flagIf(end, http2.FlagHeadersEndStream)
	for {
		m := min(len(block), most)
		if m == len(block) {
			flags |= http2.FlagHeadersEndHeaders
		}
		putFrameHeader(header[:], m, kind, flags, id)
		if _, err := c.plain.Write(append(header[:], block[:m]...)); err != nil {
			return err
		}
		block = block[m:]
		if len(block) == 0 {
			return nil
		}
		kind, flags = http2.FrameContinuation, 0
	}
}
