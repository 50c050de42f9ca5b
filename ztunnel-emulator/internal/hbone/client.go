package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// ClientConn is the end of a tunnel that opens streams.
type ClientConn struct{ *conn }

// Response is what the peer answered.
type Response struct {
	Status int
	fields []hpack.HeaderField
}

// Header returns all values of a header, in the order they came.
func (r *Response) Header(name string) []string { return values(r.fields, name) }

func values(fields []hpack.HeaderField, name string) []string {
	var vs []string
	for _, f := range fields {
		if f.Name == name {
			vs = append(vs, f.Value)
		}
	}
	return vs
}

// Dial makes raw a tunnel: TLS, then our half of the HTTP/2 preface. It owns raw
// from now on. It does not wait for the peer's SETTINGS. Errors are of type
// *HandshakeError.
func Dial(ctx context.Context, raw net.Conn, tc *tls.Config, cfg Config) (*ClientConn, error) {
	w, t, err := handshake(ctx, raw, tc, cfg, tls.Client)
	if err != nil {
		return nil, err
	}
	return startClient(w, t, cfg)
}

// handshake is TLS, within ctx and the handshake's own limit.
func handshake(ctx context.Context, raw net.Conn, tc *tls.Config, cfg Config, side func(net.Conn, *tls.Config) *tls.Conn) (*wire, *tls.Conn, error) {
	w := newWire(raw)
	tc = tc.Clone()
	tc.DynamicRecordSizingDisabled = true
	t := side(w, tc)
	ctx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		w.Close()
		w.release()
		return nil, nil, &HandshakeError{Step: "tls", Err: err}
	}
	if p := t.ConnectionState().NegotiatedProtocol; p != "h2" && p != "" {
		w.Close()
		w.release()
		return nil, nil, &HandshakeError{Step: "tls", Err: errors.New("the peer wants to speak " + strconv.Quote(p))}
	}
	return w, t, nil
}

// startClient is Dial after TLS.
func startClient(w *wire, t *tls.Conn, cfg Config) (*ClientConn, error) {
	w.collect()
	c := newConn(w, t, cfg, false)
	c.onStream = (*conn).onResponse
	w.Conn.SetWriteDeadline(time.Now().Add(cfg.HandshakeTimeout))
	if err := c.sayHello(); err != nil {
		w.release()
		return nil, &HandshakeError{Step: "http2", Err: err}
	}
	w.Conn.SetWriteDeadline(time.Time{})
	go c.run()
	return &ClientConn{c}, nil
}

// Open asks for a tunnel to authority (CONNECT) and waits for the answer. An
// answer other than 200 is a *StatusError, with the Response beside it; errors
// that are ErrNotSent may be tried again on another connection.
func (cc *ClientConn) Open(ctx context.Context, authority string, fields []hpack.HeaderField) (*Stream, *Response, error) {
	return cc.open(ctx, authority, fields, nil)
}

// open is Open; onRemove is called when the stream has left the connection, if
// it ever was on it.
func (cc *ClientConn) open(ctx context.Context, authority string, fields []hpack.HeaderField, onRemove func()) (*Stream, *Response, error) {
	s, err := cc.request(authority, fields, onRemove)
	if err != nil {
		return nil, nil, err
	}
	select {
	case f := <-s.response:
		return s.answer(f)
	case <-ctx.Done():
		err := context.Cause(ctx)
		s.Cancel(err)
		return nil, nil, err
	}
}

// request sends the HEADERS.
func (c *conn) request(authority string, fields []hpack.HeaderField, onRemove func()) (*Stream, error) {
	all := make([]hpack.HeaderField, 0, 8)
	all = append(all, hpack.HeaderField{Name: ":method", Value: "CONNECT"}, hpack.HeaderField{Name: ":authority", Value: authority})
	all = append(all, fields...)

	c.lockWrite()
	s, err := c.admit(onRemove)
	if err == nil {
		err = c.writeHeaders(s.id, all, false)
	}
	uerr := c.unlockWrite()
	if err == nil {
		err = uerr
	} else if s != nil {
		c.fail(err)
	}
	return s, err
}

// admit makes the next stream, if one more may be opened. wmu is held, so that
// numbers rise in the order of the bytes.
func (c *conn) admit(onRemove func()) (*Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil && !c.goingAway:
		return nil, fmt.Errorf("%w: %w", errEnded, c.err)
	case c.goingAway || c.draining != notDraining || c.nextID > maxWindow-2:
		return nil, errGoingAway
	case len(c.streams) >= int(c.peerMax):
		return nil, errTooMany
	}
	s := c.newStream(c.nextID)
	s.response = make(chan *http2.MetaHeadersFrame, 1)
	s.onRemove = onRemove
	c.nextID += 2
	return s, nil
}

// answer is what the response says; f is nil if none came.
func (s *Stream) answer(f *http2.MetaHeadersFrame) (*Stream, *Response, error) {
	if f == nil {
		s.mu.Lock()
		err := unanswered(s.err)
		s.mu.Unlock()
		var re *ResetError
		if errors.As(err, &re) && re.Remote && re.Code == http2.ErrCodeRefusedStream {
			err = fmt.Errorf("%w: %w", ErrNotSent, err)
		}
		return nil, nil, err
	}
	status, ok := parseStatus(f.PseudoValue("status"))
	if !ok {
		s.c.reset(s, http2.ErrCodeProtocol, &ResetError{Code: http2.ErrCodeProtocol})
		return nil, nil, &ResetError{Code: http2.ErrCodeProtocol}
	}
	r := &Response{Status: status, fields: f.RegularFields()}
	if status != 200 {
		s.abandon()
		return nil, r, &StatusError{Status: status}
	}
	return s, r, nil
}

// parseStatus wants three digits.
func parseStatus(text string) (int, bool) {
	if len(text) != 3 {
		return 0, false
	}
	n, err := strconv.Atoi(text)
	return n, err == nil && n >= 100
}

// onResponse takes the headers that answer a request.
func (c *conn) onResponse(f *http2.MetaHeadersFrame) error {
	c.mu.Lock()
	s, idle := c.streams[f.StreamID], c.idle(f.StreamID)
	c.mu.Unlock()
	switch {
	case idle:
		return protocolError(http2.ErrCodeProtocol, "HEADERS on an idle stream")
	case s == nil:
		return nil // we have given it up
	case f.Truncated:
		c.reset(s, http2.ErrCodeProtocol, &ResetError{Code: http2.ErrCodeProtocol})
		return nil
	}
	status := f.PseudoValue("status")
	if len(status) == 3 && status[0] == '1' && !f.StreamEnded() {
		return c.calm.control() // informational: the answer is still to come
	}
	s.answered.Store(true)
	s.mu.Lock()
	if !s.ended {
		s.response <- f
	}
	s.mu.Unlock()
	if f.StreamEnded() {
		c.endRemote(s)
	}
	return nil
}

// usable tells whether a stream could be opened.
func (c *conn) usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && !c.goingAway && c.draining == notDraining
}

// limit is how many streams at once one connection may have.
func (c *conn) limit() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return min(c.cfg.MaxStreamsPerConn, int(c.peerMax))
}

// whenDone has f called once nothing is left of the connection.
func (c *conn) whenDone(f func()) {
	c.mu.Lock()
	over := c.over
	if !over {
		c.onDone = f
	}
	c.mu.Unlock()
	if over {
		f()
	}
}
