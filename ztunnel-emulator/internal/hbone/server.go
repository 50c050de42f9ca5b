package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// ServerConn is the end of a tunnel that answers.
type ServerConn struct {
	*conn
	handlers sync.WaitGroup
	running  int // handlers; guarded by mu
	handler  func(*Request)
}

// Accept makes raw a tunnel: TLS, then the HTTP/2 preface of both. It owns raw
// from now on. A client that offers no ALPN is taken to speak h2. Errors are of
// type *HandshakeError.
func Accept(ctx context.Context, raw net.Conn, tc *tls.Config, cfg Config) (*ServerConn, error) {
	w, t, err := handshake(ctx, raw, refusingOthers(tc), cfg, tls.Server)
	if err != nil {
		return nil, err
	}
	return startServer(ctx, w, t, cfg)
}

// refusingOthers is tc, which refuses clients that offer protocols and no h2.
// crypto/tls alone would let one that offers http/1.1 through, as if it offered
// nothing.
func refusingOthers(tc *tls.Config) *tls.Config {
	before := tc.GetConfigForClient
	out := tc.Clone()
	out.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		use := tc
		if before != nil {
			switch c, err := before(hello); {
			case err != nil:
				return nil, err
			case c != nil:
				use = c
			}
		}
		use = use.Clone()
		use.GetConfigForClient = nil
		use.DynamicRecordSizingDisabled = true
		if len(hello.SupportedProtos) > 0 && !slices.Contains(hello.SupportedProtos, "h2") {
			use.NextProtos = []string{"h2 and nothing else"} // matches none, so TLS sends the right alert
		}
		return use, nil
	}
	return out
}

// startServer is Accept after TLS.
func startServer(ctx context.Context, w *wire, t *tls.Conn, cfg Config) (*ServerConn, error) {
	w.collect()
	sc := &ServerConn{conn: newConn(w, t, cfg, true)}
	sc.onStream = func(_ *conn, f *http2.MetaHeadersFrame) error { return sc.onRequest(f) }
	w.Conn.SetDeadline(time.Now().Add(cfg.HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { w.Conn.SetDeadline(past) })
	err := sc.sayHello()
	if err == nil {
		err = sc.readPreface()
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		sc.fail(err)
		sc.in.release()
		w.release()
		return nil, &HandshakeError{Step: "http2", Err: err}
	}
	w.Conn.SetDeadline(time.Time{})
	return sc, nil
}

func (c *conn) readPreface() error {
	for at := 0; at < len(http2.ClientPreface); {
		p, err := c.in.take(len(http2.ClientPreface) - at)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if string(p) != http2.ClientPreface[at:at+len(p)] {
			return protocolError(http2.ErrCodeProtocol, "no HTTP/2 preface")
		}
		at += len(p)
	}
	h, err := c.in.peek(frameHeader)
	if err == nil && (http2.FrameType(h[3]) != http2.FrameSettings || h[4]&byte(http2.FlagSettingsAck) != 0) {
		return protocolError(http2.ErrCodeProtocol, "a preface without SETTINGS")
	}
	return err
}

// Serve takes requests until the connection ends, and calls handler for each on
// a goroutine of its own. It returns when the connection and all handlers have
// ended: nil after an orderly end, otherwise why. It is called once.
func (sc *ServerConn) Serve(handler func(*Request)) error {
	sc.handler = handler
	sc.run()
	sc.handlers.Wait()
	if err := sc.Err(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// Request is a stream that asks for a connection.
type Request struct {
	Method       string
	Authority    string
	HasAuthority bool

	s      *Stream
	fields []hpack.HeaderField
	status int // what was responded; 0 for nothing yet
}

// Header returns all values of a header, in the order they came.
func (r *Request) Header(name string) []string { return values(r.fields, name) }

// Context ends when the stream does (the peer reset it, the connection closed),
// or the handler returns.
func (r *Request) Context() context.Context { return r.s.ctx }

// Cancel gives the request up, before it was answered or after.
func (r *Request) Cancel(err error) { r.s.Cancel(err) }

// Reset ends the stream with code.
func (r *Request) Reset(code http2.ErrCode) {
	r.s.c.reset(r.s, code, &ResetError{Code: code})
}

// Respond answers. With 200 it returns the stream, which ends when the handler
// returns if it hasn't before; any other status ends it at once.
func (r *Request) Respond(status int, fields ...hpack.HeaderField) (*Stream, error) {
	c, s := r.s.c, r.s
	all := make([]hpack.HeaderField, 0, 4)
	all = append(all, hpack.HeaderField{Name: ":status", Value: strconv.Itoa(status)})
	all = append(all, fields...)
	ok := status == 200

	c.lockWrite()
	if s.stopped.Load() {
		c.unlockWrite()
		return nil, s.writeError()
	}
	s.answered.Store(true)
	r.status = status
	err := c.writeHeaders(s.id, all, !ok)
	if uerr := c.unlockWrite(); err == nil {
		err = uerr
	}
	if err != nil {
		c.fail(err)
		return nil, err
	}
	if !ok {
		c.endLocal(s)
		return nil, nil
	}
	return s, nil
}

// onRequest takes the headers that begin a stream.
func (sc *ServerConn) onRequest(f *http2.MetaHeadersFrame) error {
	c := sc.conn
	c.mu.Lock()
	if f.StreamID%2 == 0 {
		c.mu.Unlock()
		return protocolError(http2.ErrCodeProtocol, "an even stream number")
	}
	if f.StreamID <= c.lastID {
		c.mu.Unlock()
		if f.StreamEnded() && len(f.PseudoFields()) == 0 {
			return c.calm.control() // trailers that crossed our reset
		}
		return protocolError(http2.ErrCodeProtocol, "a stream number that was used")
	}
	late := c.draining >= drainFinal
	c.lastID = f.StreamID
	// A handler may be busy with a stream that has ended, but not with many.
	full := len(c.streams) >= c.cfg.ServerMaxStreams || sc.running >= 2*c.cfg.ServerMaxStreams
	if late || full || c.err != nil {
		c.mu.Unlock()
		return c.refuse(f.StreamID, http2.ErrCodeRefusedStream)
	}
	if hasPseudo(f, ":scheme") || hasPseudo(f, ":path") || hasPseudo(f, ":protocol") {
		if f.PseudoValue("method") == "CONNECT" {
			c.mu.Unlock()
			return c.refuse(f.StreamID, http2.ErrCodeProtocol)
		}
	}
	s := c.newStream(f.StreamID)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	r := &Request{
		s: s, fields: f.RegularFields(), Method: f.PseudoValue("method"),
		Authority: f.PseudoValue("authority"), HasAuthority: hasPseudo(f, ":authority"),
	}
	sc.running++
	sc.handlers.Add(1)
	c.mu.Unlock()
	if f.StreamEnded() {
		c.endRemote(s)
	}
	go sc.handle(r, f.Truncated)
	return nil
}

// refuse answers a request that no handler sees.
func (c *conn) refuse(id uint32, code http2.ErrCode) error {
	c.control(func(fr *http2.Framer) { fr.WriteRSTStream(id, code) })
	return c.calm.earlyReset()
}

// handle runs the handler of one request, and ends what it left open.
func (sc *ServerConn) handle(r *Request, tooLarge bool) {
	defer sc.handlers.Done()
	if tooLarge {
		r.Respond(431)
	} else {
		sc.handler(r)
	}
	if r.status == 0 {
		r.Reset(http2.ErrCodeInternal)
	}
	r.s.abandon()
	r.s.cancel(context.Canceled)
	sc.mu.Lock()
	sc.running--
	sc.mu.Unlock()
}

func hasPseudo(f *http2.MetaHeadersFrame, name string) bool {
	for _, p := range f.PseudoFields() {
		if p.Name == name {
			return true
		}
	}
	return false
}
