package hbone

import (
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// swallow answers 200 and reads to the end.
func swallow(r *Request) {
	s, err := r.Respond(200)
	if err != nil {
		return
	}
	io.Copy(io.Discard, s)
	s.CloseWrite()
}

// waitForEnd answers nothing until the stream has ended.
func waitForEnd(r *Request) { <-r.Context().Done() }

func TestNoPreface(t *testing.T) {
	for name, bytes := range map[string]string{
		"http/1":      "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"noise":       strings.Repeat("\x00\xff", 100),
		"no settings": http2.ClientPreface + "\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678",
	} {
		t.Run(name, func(t *testing.T) {
			p, served := startServerUnder(t, quickConfig(), swallow)
			io.WriteString(p.nc, bytes)
			p.expectGoAway(http2.ErrCodeProtocol)
			var he *HandshakeError
			if err := within(t, "the server", served); !errors.As(err, &he) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestSlowPreface(t *testing.T) {
	cfg := DefaultConfig()
	cfg.HandshakeTimeout = 50 * time.Millisecond
	p, served := startServerUnder(t, cfg, swallow)
	io.WriteString(p.nc, http2.ClientPreface[:10])
	var he *HandshakeError
	if err := within(t, "the server", served); !errors.As(err, &he) || !isTimeout(err) {
		t.Errorf("got %v", err)
	}
}

// Each hostile client does one thing, and gets the answer it should.
func TestHostileClient(t *testing.T) {
	goAway := func(code http2.ErrCode) func(*peer) { return func(p *peer) { p.expectGoAway(code) } }
	reset := func(id uint32, code http2.ErrCode) func(*peer) {
		return func(p *peer) {
			p.expectReset(id, code)
			p.expectAlive()
		}
	}
	alive := func(p *peer) { p.expectAlive() }
	raw := func(b string) func(*peer) { return func(p *peer) { io.WriteString(p.nc, b) } }
	for _, tc := range []struct {
		name string
		do   func(*peer)
		want func(*peer)
	}{
		{"a frame above the limit", raw("\x10\x00\x01\x00\x00\x00\x00\x00\x01"), goAway(http2.ErrCodeFrameSize)},
		{"large headers frame", raw("\x0f\xff\xff\x01\x04\x00\x00\x00\x01"), goAway(http2.ErrCodeEnhanceYourCalm)},
		{"unknown frame", raw("\x00\x00\x05\x77\xff\x00\x00\x00\x03hello"), alive},
		{"priority", raw("\x00\x00\x05\x02\x00\x00\x00\x00\x03\x00\x00\x00\x00\x10"), alive},
		{"ping of 7 bytes", raw("\x00\x00\x07\x06\x00\x00\x00\x00\x001234567"), goAway(http2.ErrCodeFrameSize)},
		{"ping on a stream", raw("\x00\x00\x08\x06\x00\x00\x00\x00\x0112345678"), goAway(http2.ErrCodeProtocol)},
		{"settings of 5 bytes", raw("\x00\x00\x05\x04\x00\x00\x00\x00\x0012345"), goAway(http2.ErrCodeFrameSize)},
		{"settings: window of 2^31", func(p *peer) {
			p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		}, goAway(http2.ErrCodeFlowControl)},
		{"settings: frame of 1", func(p *peer) {
			p.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1})
		}, goAway(http2.ErrCodeProtocol)},
		{"settings: ten thousand", func(p *peer) {
			// Each goes through all streams: what such frames cost us keeps a core busy.
			p.connect(1)
			p.fr.WriteSettings(slices.Repeat([]http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1}, {ID: http2.SettingInitialWindowSize, Val: 2}}, 5_000)...)
		}, goAway(http2.ErrCodeEnhanceYourCalm)},
		{"push promise", raw("\x00\x00\x05\x05\x04\x00\x00\x00\x01\x00\x00\x00\x02\x82"), goAway(http2.ErrCodeProtocol)},
		{"continuation of nothing", raw("\x00\x00\x00\x09\x04\x00\x00\x00\x01"), goAway(http2.ErrCodeProtocol)},
		{"headers interrupted", func(p *peer) {
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(":method", "CONNECT")})
			p.fr.WritePing(false, [8]byte{})
		}, goAway(http2.ErrCodeProtocol)},
		{"headers that are no hpack", func(p *peer) {
			p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true})
		}, goAway(http2.ErrCodeCompression)},
		{"even stream", func(p *peer) { p.connect(2) }, goAway(http2.ErrCodeProtocol)},
		{"stream numbers going back", func(p *peer) { p.connect(5); p.connect(3) }, goAway(http2.ErrCodeProtocol)},
		{"data on idle", func(p *peer) { p.fr.WriteData(1, false, []byte("x")) }, goAway(http2.ErrCodeProtocol)},
		{"data on stream 0", raw("\x00\x00\x01\x00\x00\x00\x00\x00\x00x"), goAway(http2.ErrCodeProtocol)},
		{"reset on idle", func(p *peer) { p.fr.WriteRSTStream(1, http2.ErrCodeCancel) }, goAway(http2.ErrCodeProtocol)},
		{"window update on idle", func(p *peer) { p.fr.WriteWindowUpdate(1, 1) }, goAway(http2.ErrCodeProtocol)},
		{"connection window update of 0", func(p *peer) { p.fr.WriteWindowUpdate(0, 0) }, goAway(http2.ErrCodeProtocol)},
		{"stream window update of 0", func(p *peer) { p.connect(1); p.fr.WriteWindowUpdate(1, 0) }, reset(1, http2.ErrCodeProtocol)},
		{"connection window overflow", func(p *peer) { p.fr.WriteWindowUpdate(0, maxWindow) }, goAway(http2.ErrCodeFlowControl)},
		{"stream window overflow", func(p *peer) { p.connect(1); p.fr.WriteWindowUpdate(1, maxWindow) }, reset(1, http2.ErrCodeFlowControl)},
		{"window overflow by settings", func(p *peer) {
			p.connect(1)
			p.fr.WriteWindowUpdate(1, maxWindow-initialWindow)
			p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: initialWindow + 1})
		}, goAway(http2.ErrCodeFlowControl)},
		{"data after its end", func(p *peer) {
			p.connect(1)
			p.fr.WriteData(1, true, []byte("x"))
			p.fr.WriteData(1, false, []byte("y"))
		}, func(p *peer) {
			// Either our own end had left, and it is ignored; or the stream is reset.
			p.expectAlive()
		}},
		{"scheme", func(p *peer) { p.connect(1, ":scheme", "https") }, reset(1, http2.ErrCodeProtocol)},
		{"path", func(p *peer) { p.connect(1, ":path", "/") }, reset(1, http2.ErrCodeProtocol)},
		{"upper-case header", func(p *peer) { p.connect(1, "Baggage", "x") }, reset(1, http2.ErrCodeProtocol)},
		{"method twice", func(p *peer) { p.connect(1, ":method", "CONNECT") }, reset(1, http2.ErrCodeProtocol)},
		{"a response's header", func(p *peer) { p.connect(1, ":status", "200") }, reset(1, http2.ErrCodeProtocol)},
		{"trailers without an end", func(p *peer) {
			p.connect(1)
			p.headers(1, false, "x", "y")
		}, reset(1, http2.ErrCodeProtocol)},
		{"padding without length", raw("\x00\x00\x00\x00\x08\x00\x00\x00\x01"), goAway(http2.ErrCodeProtocol)},
		{"more padding than data", func(p *peer) {
			p.connect(1)
			io.WriteString(p.nc, "\x00\x00\x02\x00\x08\x00\x00\x00\x01\x05x")
		}, goAway(http2.ErrCodeProtocol)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, _ := rawClientOf(t, quickConfig(), waitForEnd)
			tc.do(p)
			tc.want(p)
		})
	}
}

func TestDataAfterEndOfStream(t *testing.T) {
	p, _ := rawClientOf(t, quickConfig(), waitForEnd) // our half stays open
	p.connect(1)
	p.fr.WriteData(1, true, []byte("x"))
	p.fr.WriteData(1, false, []byte("y"))
	p.expectReset(1, http2.ErrCodeStreamClosed)
	p.expectAlive()
}

func TestHeaderBombs(t *testing.T) {
	t.Run("one frame", func(t *testing.T) {
		// 60 KB of references to one entry of the table, which decode to far more.
		p, _ := rawClientOf(t, quickConfig(), waitForEnd)
		block := p.block(":method", "CONNECT", ":authority", "x", "bomb", strings.Repeat("b", 3000))
		last := p.block("bomb", strings.Repeat("b", 3000))
		for len(block) < 60<<10 {
			block = append(block, last...)
		}
		p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
		p.expectStatus(1, "431")
		p.expectAlive()
	})
	t.Run("continuations", func(t *testing.T) {
		p, served := rawClientOf(t, quickConfig(), waitForEnd)
		p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.block(":method", "CONNECT", ":authority", "x")})
		go func() {
			for i := 0; ; i++ {
				if p.fr.WriteContinuation(1, false, p.block("x", strings.Repeat("y", 8000))) != nil {
					return
				}
			}
		}()
		var ce *ConnError
		if err := within(t, "the server", served); !errors.As(err, &ce) || ce.Code != http2.ErrCodeProtocol {
			t.Errorf("got %v", err)
		}
	})
}

func TestTooManyStreams(t *testing.T) {
	cfg := quickConfig()
	cfg.ServerMaxStreams = 3
	p, _ := rawClientOf(t, cfg, waitForEnd)
	for id := uint32(1); id < 9; id += 2 {
		p.connect(id)
	}
	p.expectReset(7, http2.ErrCodeRefusedStream)
	p.expectAlive()
	p.fr.WriteRSTStream(1, http2.ErrCodeCancel)
	p.connect(9)
	p.expectAlive()
}

func TestRapidReset(t *testing.T) {
	p, served := rawClientOf(t, quickConfig(), waitForEnd)
	go func() {
		for id := uint32(1); ; id += 2 {
			p.connect(id)
			if p.fr.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
		}
	}()
	var ce *ConnError
	if err := within(t, "the server", served); !errors.As(err, &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("got %v", err)
	}
}

// A peer that floods is cut, whether it reads the answers or not.
func TestFloods(t *testing.T) {
	for name, frame := range map[string]func(*http2.Framer) error{
		"ping":       func(f *http2.Framer) error { return f.WritePing(false, [8]byte{}) },
		"settings":   func(f *http2.Framer) error { return f.WriteSettings() },
		"empty data": func(f *http2.Framer) error { return f.WriteData(1, false, nil) },
		"priority":   func(f *http2.Framer) error { return f.WritePriority(1, http2.PriorityParam{}) },
		"unknown":    func(f *http2.Framer) error { return f.WriteRawFrame(0x42, 0, 0, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			p, served := rawClientOf(t, quickConfig(), waitForEnd)
			p.connect(1)
			go func() {
				for frame(p.fr) == nil {
				}
			}()
			var ce *ConnError
			if err := within(t, "the server", served); !errors.As(err, &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A flood of window updates asks for no answer: it costs no memory, and other
// work goes on until the window overflows.
func TestWindowUpdateFlood(t *testing.T) {
	p, _ := rawClientOf(t, quickConfig(), waitForEnd)
	p.connect(1)
	for range 100_000 {
		p.fr.WriteWindowUpdate(1, 1)
	}
	p.expectAlive()
}

// Control frames for a peer that does not read have a bound.
func TestControlBound(t *testing.T) {
	a, _ := net.Pipe() // nobody reads
	defer a.Close()
	c := newConn(newWire(a), nil, DefaultConfig(), true)
	for i := 0; c.Err() == nil && i < 1_000_000; i++ {
		c.control(func(fr *http2.Framer) { fr.WritePing(true, [8]byte{}) })
	}
	var ce *ConnError
	if !errors.As(c.Err(), &ce) || ce.Code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("got %v", c.Err())
	}
	if n := c.ctl.Len(); n > c.cfg.MaxControl+1024 {
		t.Errorf("%d bytes wait", n)
	}
	c.work.Wait()
	c.wire.release()
}
