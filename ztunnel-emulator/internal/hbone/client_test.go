package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// opened is what Open returned.
type opened struct {
	s   *Stream
	r   *Response
	err error
}

func open(cc *ClientConn) <-chan opened {
	ch := make(chan opened, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		defer cancel()
		s, r, err := cc.Open(ctx, "192.0.2.1:80", RequestHeaders("", "", "", ""))
		ch <- opened{s, r, err}
	}()
	return ch
}

// Each hostile or merely unlucky server does one thing with a request.
func TestServersAnswers(t *testing.T) {
	isReset := func(code http2.ErrCode) func(error) bool {
		return func(err error) bool {
			var re *ResetError
			return errors.As(err, &re) && re.Code == code
		}
	}
	notSent := func(err error) bool { return errors.Is(err, ErrNotSent) }
	isConnError := func(code http2.ErrCode) func(error) bool {
		return func(err error) bool {
			var ce *ConnError
			return errors.As(err, &ce) && ce.Code == code
		}
	}
	for _, tc := range []struct {
		name string
		do   func(p *peer, id uint32)
		want func(error) bool
	}{
		{"401", func(p *peer, id uint32) { p.headers(id, true, ":status", "401") }, func(err error) bool {
			return err.Error() == "http status: 401 Unauthorized"
		}},
		{"503 without an end", func(p *peer, id uint32) { p.headers(id, false, ":status", "503") }, func(err error) bool {
			return err.Error() == "http status: 503 Service Unavailable"
		}},
		{"status that is no number", func(p *peer, id uint32) { p.headers(id, false, ":status", "2x0") }, isReset(http2.ErrCodeProtocol)},
		{"status too long", func(p *peer, id uint32) { p.headers(id, false, ":status", "0200") }, isReset(http2.ErrCodeProtocol)},
		{"no status", func(p *peer, id uint32) { p.headers(id, false, "x", "y") }, isReset(http2.ErrCodeProtocol)},
		{"a request", func(p *peer, id uint32) { p.headers(id, false, ":method", "CONNECT") }, isReset(http2.ErrCodeProtocol)},
		{"data first", func(p *peer, id uint32) { p.fr.WriteData(id, false, []byte("x")) }, isReset(http2.ErrCodeProtocol)},
		{"refused", func(p *peer, id uint32) { p.fr.WriteRSTStream(id, http2.ErrCodeRefusedStream) }, notSent},
		{"reset", func(p *peer, id uint32) { p.fr.WriteRSTStream(id, http2.ErrCodeInternal) }, isReset(http2.ErrCodeInternal)},
		{"goaway before it", func(p *peer, id uint32) { p.fr.WriteGoAway(0, http2.ErrCodeNo, nil) }, notSent},
		{"goaway with an error", func(p *peer, id uint32) { p.fr.WriteGoAway(id, http2.ErrCodeEnhanceYourCalm, nil) }, isConnError(http2.ErrCodeEnhanceYourCalm)},
		{"close", func(p *peer, id uint32) { p.nc.Close() }, endsQuietly},
		{"headers on an idle stream", func(p *peer, id uint32) { p.headers(id+2, true, ":status", "200") }, isConnError(http2.ErrCodeProtocol)},
		{"headers on an even stream", func(p *peer, id uint32) { p.headers(2, true, ":status", "200") }, isConnError(http2.ErrCodeProtocol)},
		{"push promise", func(p *peer, id uint32) {
			p.fr.WritePushPromise(http2.PushPromiseParam{StreamID: id, PromiseID: 2, BlockFragment: p.block(":method", "GET"), EndHeaders: true})
		}, isConnError(http2.ErrCodeProtocol)},
		{"push enabled", func(p *peer, id uint32) {
			p.fr.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 1})
		}, isConnError(http2.ErrCodeProtocol)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cc, p := rawServerOf(t, quickConfig())
			got := open(cc)
			tc.do(p, p.request())
			o := within(t, "the answer", got)
			if o.err == nil || !tc.want(o.err) {
				t.Errorf("got %v", o.err)
			}
			eventually(t, "no stream", func() bool { return cc.Streams() == 0 })
		})
	}
}

func TestInformationalThenAnswer(t *testing.T) {
	cc, p := rawServerOf(t, quickConfig())
	got := open(cc)
	id := p.request()
	p.headers(id, false, ":status", "103", "x", "y")
	p.headers(id, false, ":status", "200", "baggage", "a", "baggage", "b")
	o := within(t, "the answer", got)
	if o.err != nil {
		t.Fatal(o.err)
	}
	if h := o.r.Header("baggage"); o.r.Status != 200 || fmt.Sprint(h) != "[a b]" {
		t.Errorf("status %d, baggage %q", o.r.Status, h)
	}
	p.fr.WriteData(id, true, []byte("bye"))
	if b, err := io.ReadAll(o.s); string(b) != "bye" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	o.s.Close()
	p.expectReset(id, http2.ErrCodeCancel)
}

// GOAWAY in the middle: what is open goes on, what is new does not begin.
func TestGoAwayInTheMiddle(t *testing.T) {
	cc, p := rawServerOf(t, quickConfig())
	got := open(cc)
	id := p.request()
	p.headers(id, false, ":status", "200")
	o := within(t, "the answer", got)
	if o.err != nil {
		t.Fatal(o.err)
	}
	p.fr.WriteGoAway(id, http2.ErrCodeNo, nil)
	p.expectAlive()
	if o := within(t, "a second", open(cc)); !errors.Is(o.err, ErrNotSent) {
		t.Errorf("got %v", o.err)
	}
	p.fr.WriteData(id, true, []byte("the rest"))
	if b, err := io.ReadAll(o.s); string(b) != "the rest" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	o.s.CloseWrite()
	io.Copy(io.Discard, p.nc) // its end comes first
	p.nc.Close()
	within(t, "the connection to end", cc.Done())
}

func TestPeerStreamLimit(t *testing.T) {
	cc, p := rawServerOf(t, quickConfig(), http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
	p.expectAlive()
	first := open(cc)
	id := p.request()
	if o := within(t, "a second", open(cc)); !errors.Is(o.err, ErrNotSent) {
		t.Errorf("got %v", o.err)
	}
	p.headers(id, true, ":status", "503")
	within(t, "the first", first)
}

func TestOpenGivesUp(t *testing.T) {
	cc, p := rawServerOf(t, quickConfig())
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error, 1)
	go func() {
		_, _, err := cc.Open(ctx, "x", nil)
		got <- err
	}()
	id := p.request()
	cancel()
	if err := within(t, "the error", got); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	p.expectReset(id, http2.ErrCodeCancel)
	p.headers(id, false, ":status", "200") // too late, and no harm
	p.expectAlive()
}

func TestPingTimeout(t *testing.T) {
	cfg := quickConfig()
	cfg.PingInterval, cfg.PingTimeout = 20*time.Millisecond, 60*time.Millisecond
	cc, p := rawServerOf(t, cfg)
	// Three are answered.
	for range 3 {
		f := p.expect("a ping", func(f http2.Frame) bool {
			pf, ok := f.(*http2.PingFrame)
			return ok && !pf.IsAck()
		}).(*http2.PingFrame)
		p.fr.WritePing(true, f.Data)
	}
	within(t, "the end", cc.Done())
	if cc.Err() != ErrPingTimeout {
		t.Errorf("got %v", cc.Err())
	}
}

// A client that offers no ALPN speaks h2.
func TestNoALPN(t *testing.T) {
	clientTLS, serverTLS := tlsConfigs()
	clientTLS = clientTLS.Clone()
	clientTLS.NextProtos = nil
	a, b := tcpPair(t)
	accepted := make(chan *ServerConn, 1)
	go func() {
		sc, err := Accept(context.Background(), b, serverTLS, DefaultConfig())
		if err != nil {
			t.Error(err)
		}
		accepted <- sc
	}()
	cc, err := Dial(context.Background(), a, clientTLS, DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	sc := <-accepted
	serveUntilCleanup(t, sc, func(r *Request) { r.Respond(401) })
	if o := within(t, "the answer", open(cc)); o.err == nil || o.r == nil || o.r.Status != 401 {
		t.Errorf("got %v", o.err)
	}
	if len(cc.ConnectionState().PeerCertificates) != 1 || len(sc.ConnectionState().PeerCertificates) != 1 {
		t.Error("no certificates")
	}
	cc.Close()
	within(t, "the end", cc.Done())
}

func TestHandshakeErrors(t *testing.T) {
	clientTLS, serverTLS := tlsConfigs()
	t.Run("the peer says nothing", func(t *testing.T) {
		_, b := tcpPair(t)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
		defer cancel()
		_, err := Accept(ctx, b, serverTLS, DefaultConfig())
		var he *HandshakeError
		if !errors.As(err, &he) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no certificate", func(t *testing.T) {
		a, b := tcpPair(t)
		bare := clientTLS.Clone()
		bare.Certificates = nil
		got := make(chan error, 1)
		go func() {
			_, err := Accept(context.Background(), b, serverTLS, DefaultConfig())
			got <- err
		}()
		cc, err := Dial(context.Background(), a, bare, DefaultConfig())
		if err == nil { // TLS 1.3: a client learns it later
			within(t, "the client to learn it", cc.Done())
		}
		var he *HandshakeError
		if err := within(t, "the server", got); !errors.As(err, &he) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another protocol", func(t *testing.T) {
		a, b := tcpPair(t)
		other := clientTLS.Clone()
		other.NextProtos = []string{"http/1.1"}
		client := make(chan error, 1)
		go func() { client <- tls.Client(a, other).Handshake() }()
		var he *HandshakeError
		if _, err := Accept(context.Background(), b, serverTLS, DefaultConfig()); !errors.As(err, &he) || he.Step != "tls" {
			t.Errorf("got %v", err)
		}
		if err := within(t, "the client", client); err == nil || !strings.Contains(err.Error(), "no application protocol") {
			t.Errorf("the client got %v", err)
		}
	})
}
