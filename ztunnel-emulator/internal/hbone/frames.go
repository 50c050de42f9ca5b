package hbone

import (
	"errors"

	"golang.org/x/net/http2"
)

// readFrame takes one frame that is no DATA.
func (c *conn) readFrame() error {
	c.in.headers = 0
	f, err := c.fr.ReadFrame()
	var se http2.StreamError
	var ce http2.ConnectionError
	switch {
	case err == nil:
		return c.frame(f)
	case errors.As(err, &se):
		// Headers or a window update that were wrong for this stream alone.
		return c.streamError(se)
	case errors.As(err, &ce):
		detail := ""
		if d := c.fr.ErrorDetail(); d != nil {
			detail = d.Error()
		}
		return protocolError(http2.ErrCode(ce), detail)
	case errors.Is(err, http2.ErrFrameTooLarge):
		return protocolError(http2.ErrCodeFrameSize, "a frame above the limit")
	}
	return err
}

func (c *conn) frame(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.MetaHeadersFrame:
		return c.headers(f)
	case *http2.WindowUpdateFrame:
		return c.windowUpdate(f)
	case *http2.RSTStreamFrame:
		return c.rstStream(f)
	case *http2.SettingsFrame:
		return c.peerSettings(f)
	case *http2.PingFrame:
		return c.ping(f)
	case *http2.GoAwayFrame:
		return c.goAway(f)
	}
	// PUSH_PROMISE: a client has said it wants none, and no client may push.
	return protocolError(http2.ErrCodeProtocol, f.Header().Type.String())
}

// streamError resets the one stream that a frame was wrong for.
func (c *conn) streamError(se http2.StreamError) error {
	c.mu.Lock()
	s, idle := c.streams[se.StreamID], c.idle(se.StreamID)
	if idle && c.server && se.StreamID%2 == 1 {
		c.lastID = se.StreamID // a request we could not read
	} else if idle {
		c.mu.Unlock()
		return protocolError(se.Code, "on an idle stream")
	}
	c.mu.Unlock()
	if s != nil {
		c.reset(s, se.Code, &ResetError{Code: se.Code})
		return nil
	}
	if err := c.calm.control(); err != nil {
		return err
	}
	c.control(func(fr *http2.Framer) { fr.WriteRSTStream(se.StreamID, se.Code) })
	return nil
}

// headers are a request, a response, or trailers.
func (c *conn) headers(f *http2.MetaHeadersFrame) error {
	c.mu.Lock()
	s := c.streams[f.StreamID]
	c.mu.Unlock()
	if s == nil || (!c.server && !s.answered.Load()) {
		return c.onStream(c, f)
	}
	// Trailers say nothing to a tunnel but that the stream ends.
	if !f.StreamEnded() || len(f.PseudoFields()) > 0 {
		c.reset(s, http2.ErrCodeProtocol, &ResetError{Code: http2.ErrCodeProtocol})
		return nil
	}
	if s.remoteEnd {
		c.reset(s, http2.ErrCodeStreamClosed, &ResetError{Code: http2.ErrCodeStreamClosed})
		return nil
	}
	c.endRemote(s)
	return nil
}

func (c *conn) rstStream(f *http2.RSTStreamFrame) error {
	c.mu.Lock()
	if c.idle(f.StreamID) {
		c.mu.Unlock()
		return protocolError(http2.ErrCodeProtocol, "RST_STREAM on an idle stream")
	}
	s := c.streams[f.StreamID]
	if s != nil {
		delete(c.streams, f.StreamID)
	}
	opened := c.lastID/2 + c.nextID/2 + 1
	c.mu.Unlock()
	if s == nil {
		// It crossed our end of the stream, as one for each refused request may.
		if c.crossed++; c.crossed > opened {
			return c.calm.control()
		}
		return nil
	}
	err := &ResetError{Code: f.ErrCode, Remote: true}
	s.finish(err, cleanReset(f.ErrCode))
	s.removed()
	c.closeIfDrained()
	if c.server && !s.answered.Load() {
		return c.calm.earlyReset()
	}
	return nil
}

// maxSettings is more than any honest SETTINGS has, and x/net's limit too. Each may
// have us go through all streams.
const maxSettings = 100

func (c *conn) peerSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if err := c.calm.control(); err != nil {
		return err
	}
	if f.NumSettings() > maxSettings {
		return protocolError(http2.ErrCodeEnhanceYourCalm, "SETTINGS without end")
	}
	// Whoever may send more from now on sends our acknowledgement first: a strict peer
	// counts by its own settings until that comes.
	c.ctlMu.Lock()
	err := f.ForeachSetting(c.setting)
	if err == nil {
		c.ctlFr.WriteSettingsAck()
	}
	c.ctlMu.Unlock()
	if err != nil {
		var ce http2.ConnectionError
		if errors.As(err, &ce) {
			return protocolError(http2.ErrCode(ce), "SETTINGS")
		}
		return err
	}
	c.control(func(*http2.Framer) {})
	return nil
}

func (c *conn) setting(s http2.Setting) error {
	if err := s.Valid(); err != nil {
		return err
	}
	switch s.ID {
	case http2.SettingEnablePush:
		if !c.server && s.Val != 0 {
			return protocolError(http2.ErrCodeProtocol, "a server that asks for pushes")
		}
	case http2.SettingMaxFrameSize:
		c.peerFrame.Store(s.Val)
	case http2.SettingMaxConcurrentStreams:
		c.mu.Lock()
		c.peerMax = s.Val
		c.mu.Unlock()
	case http2.SettingInitialWindowSize:
		return c.newPeerWindow(int64(s.Val))
	case http2.SettingHeaderTableSize:
		c.newPeerTable(int64(s.Val))
	}
	return nil
}

// newPeerTable is SETTINGS_HEADER_TABLE_SIZE, left for the encoder, which belongs
// to the writers. Of sizes that come before the next headers the least counts: the
// peer has dropped what did not fit it (RFC 7541, 4.2).
func (c *conn) newPeerTable(size int64) {
	for {
		waiting := c.table.Load()
		if waiting >= 0 && waiting <= size || c.table.CompareAndSwap(waiting, size) {
			return
		}
	}
}

func (c *conn) goAway(f *http2.GoAwayFrame) error {
	var dead []*Stream
	c.mu.Lock()
	c.goingAway = true
	for id, s := range c.streams {
		if !c.server && id > f.LastStreamID {
			dead = append(dead, s)
			delete(c.streams, id)
		}
	}
	c.mu.Unlock()
	for _, s := range dead {
		s.finish(errGoingAway, false)
		s.removed()
	}
	if f.ErrCode != http2.ErrCodeNo {
		return &ConnError{Code: f.ErrCode, Remote: true}
	}
	if !c.server {
		// No stream can be opened any more: what is open ends, and then we.
		c.mu.Lock()
		if c.draining == notDraining {
			c.draining = drainFinal
		}
		c.mu.Unlock()
		c.closeIfDrained()
	}
	return nil
}
