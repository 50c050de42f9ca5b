package hbone

import (
	"bytes"
	"context"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// peer is the other end of a connection without TLS, and does what it likes.
type peer struct {
	t  testing.TB
	nc *net.TCPConn
	fr *http2.Framer
	hb bytes.Buffer
	he *hpack.Encoder
}

func newPeer(t testing.TB, nc *net.TCPConn) *peer {
	p := &peer{t: t, nc: nc, fr: http2.NewFramer(nc, nc)}
	p.fr.AllowIllegalWrites = true
	p.fr.SetMaxReadFrameSize(1 << 20)
	p.he = newPeerEncoder(&p.hb)
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	return p
}

func newPeerEncoder(b *bytes.Buffer) *hpack.Encoder { return hpack.NewEncoder(b) }

// quickConfig ends what doesn't answer soon.
func quickConfig() Config {
	cfg := DefaultConfig()
	cfg.HandshakeTimeout = 5 * time.Second
	return cfg
}

// startServerUnder starts a server, and returns its peer before any preface.
func startServerUnder(t testing.TB, cfg Config, handler func(*Request)) (*peer, <-chan error) {
	t.Helper()
	a, b := tcpPair(t)
	p := newPeer(t, a)
	served := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		sc, err := startServer(context.Background(), newWire(b), nil, cfg)
		if err == nil {
			err = sc.Serve(handler)
		}
		served <- err
	}()
	t.Cleanup(func() {
		a.Close()
		within(t, "the server to end", done)
	})
	return p, served
}

// rawClientOf is the peer of a server, prefaces exchanged.
func rawClientOf(t testing.TB, cfg Config, handler func(*Request), settings ...http2.Setting) (*peer, <-chan error) {
	t.Helper()
	p, served := startServerUnder(t, cfg, handler)
	io.WriteString(p.nc, http2.ClientPreface)
	p.fr.WriteSettings(settings...)
	p.fr.WriteSettingsAck()
	return p, served
}

// rawServerOf is the peer of a client, prefaces exchanged.
func rawServerOf(t testing.TB, cfg Config, settings ...http2.Setting) (*ClientConn, *peer) {
	t.Helper()
	a, b := tcpPair(t)
	cc, err := startClient(newWire(b), nil, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cc.Close()
		within(t, "the client to end", cc.Done())
	})
	p := newPeer(t, a)
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(a, preface); err != nil || string(preface) != http2.ClientPreface {
		t.Fatalf("preface %q, %v", preface, err)
	}
	p.fr.WriteSettings(settings...)
	p.fr.WriteSettingsAck()
	return cc, p
}

func (p *peer) block(pairs ...string) []byte {
	p.hb.Reset()
	for i := 0; i < len(pairs); i += 2 {
		p.he.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return bytes.Clone(p.hb.Bytes())
}

// connect sends a whole CONNECT.
func (p *peer) connect(id uint32, more ...string) {
	p.headers(id, false, append([]string{":method", "CONNECT", ":authority", "192.0.2.1:80"}, more...)...)
}

func (p *peer) headers(id uint32, end bool, pairs ...string) {
	p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(pairs...), EndHeaders: true, EndStream: end})
}

// expect reads frames until f is true for one.
func (p *peer) expect(what string, f func(http2.Frame) bool) http2.Frame {
	p.t.Helper()
	for {
		fr, err := p.fr.ReadFrame()
		if err != nil {
			p.t.Fatalf("waiting for %s: %v", what, err)
		}
		if f(fr) {
			return fr
		}
	}
}

func (p *peer) expectGoAway(code http2.ErrCode) {
	p.t.Helper()
	p.expect("GOAWAY "+code.String(), func(f http2.Frame) bool {
		g, ok := f.(*http2.GoAwayFrame)
		if ok && g.ErrCode != code {
			p.t.Errorf("GOAWAY %v, want %v", g.ErrCode, code)
		}
		return ok
	})
}

func (p *peer) expectReset(id uint32, code http2.ErrCode) {
	p.t.Helper()
	p.expect("RST_STREAM "+code.String(), func(f http2.Frame) bool {
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			p.t.Fatalf("GOAWAY %v instead of a reset", f.ErrCode)
		case *http2.RSTStreamFrame:
			if f.StreamID == id && f.ErrCode != code {
				p.t.Errorf("reset with %v, want %v", f.ErrCode, code)
			}
			return f.StreamID == id
		}
		return false
	})
}

// expectStatus reads the response of a stream.
func (p *peer) expectStatus(id uint32, status string) {
	p.t.Helper()
	f := p.expect("HEADERS", func(f http2.Frame) bool {
		return f.Header().Type == http2.FrameHeaders && f.Header().StreamID == id
	}).(*http2.HeadersFrame)
	p.fr.ReadMetaHeaders = nil
	fields, err := hpack.NewDecoder(4096, nil).DecodeFull(f.HeaderBlockFragment())
	if err != nil || len(fields) == 0 || fields[0].Value != status {
		p.t.Errorf("response %v, %v, want %s", fields, err, status)
	}
}

// expectAlive asks for a pong.
func (p *peer) expectAlive() {
	p.t.Helper()
	data := [8]byte{'a', 'l', 'i', 'v', 'e'}
	p.fr.WritePing(false, data)
	p.expect("a pong", func(f http2.Frame) bool {
		if g, ok := f.(*http2.GoAwayFrame); ok {
			p.t.Fatalf("GOAWAY %v instead of a pong", g.ErrCode)
		}
		pf, ok := f.(*http2.PingFrame)
		return ok && pf.IsAck() && pf.Data == data
	})
}

// request reads frames until the client's next CONNECT.
func (p *peer) request() uint32 {
	p.t.Helper()
	return p.expect("a request", func(f http2.Frame) bool { return f.Header().Type == http2.FrameHeaders }).Header().StreamID
}
