package hbone

import (
	"bytes"
	"io"
	"testing"

	"golang.org/x/net/http2"
)

// smallWindows makes limits that a test reaches quickly.
func smallWindows() Config {
	cfg := quickConfig()
	cfg.StreamWindow, cfg.ConnWindow = 1000, initialWindow
	return cfg
}

func TestDataBeyondStreamWindow(t *testing.T) {
	p, _ := rawClientOf(t, smallWindows(), waitForEnd) // nobody takes it
	p.connect(1)
	p.fr.WriteData(1, false, make([]byte, 1000))
	p.expectAlive()
	p.fr.WriteData(1, false, make([]byte, 1))
	p.expectReset(1, http2.ErrCodeFlowControl)
	p.expectAlive()
}

func TestDataBeyondConnectionWindow(t *testing.T) {
	cfg := quickConfig()
	cfg.ConnWindow, cfg.MaxQueued = initialWindow, 0
	p, _ := rawClientOf(t, cfg, waitForEnd)
	for id := uint32(1); id < 9; id += 2 {
		p.connect(id)
		p.fr.WriteData(id, false, make([]byte, 16<<10)) // 64 KiB in all: one too many
	}
	p.expectGoAway(http2.ErrCodeFlowControl)
}

// Streams whose application does not read do not use up the connection's window.
func TestStalledStreamsGiveBackTheConnection(t *testing.T) {
	cfg := quickConfig()
	cfg.ConnWindow = initialWindow
	p, _ := rawClientOf(t, cfg, waitForEnd)
	given := credit(p, 0, func() {
		for id := uint32(1); id < 9; id += 2 {
			p.connect(id)
			p.fr.WriteData(id, false, make([]byte, 15<<10))
		}
	})
	if given < 30<<10 {
		t.Errorf("only %d bytes of window came back", given)
	}
}

// credit is what the window of a stream (or the connection: 0) grows by what do does.
func credit(p *peer, id uint32, do func()) (given int) {
	p.t.Helper()
	do()
	data := [8]byte{'c', 'r', 'e', 'd', 'i', 't'}
	for range 2 { // window updates may leave a moment after a pong
		p.fr.WritePing(false, data)
		p.expect("a pong", func(f http2.Frame) bool {
			if w, ok := f.(*http2.WindowUpdateFrame); ok && w.StreamID == id {
				given += int(w.Increment)
			}
			pf, ok := f.(*http2.PingFrame)
			return ok && pf.IsAck() && pf.Data == data
		})
	}
	return given
}

// What nobody wants is still given back to the connection: data on a stream that
// has ended, and padding.
func TestCreditForDataOfNobody(t *testing.T) {
	cfg := quickConfig()
	cfg.ConnWindow = initialWindow
	p, _ := rawClientOf(t, cfg, func(r *Request) { r.Respond(401) })
	p.connect(1)
	p.fr.WriteData(1, true, nil)
	p.expectStatus(1, "401")
	given := credit(p, 0, func() {
		for range 3 {
			p.fr.WriteData(1, false, make([]byte, 12<<10))
		}
	})
	if given < initialWindow/2 {
		t.Errorf("only %d bytes of window came back", given)
	}
}

func TestPaddedData(t *testing.T) {
	got := make(chan []byte, 1)
	p, _ := rawClientOf(t, quickConfig(), func(r *Request) {
		s, err := r.Respond(200)
		if err != nil {
			t.Error(err)
			return
		}
		b, _ := io.ReadAll(s)
		got <- b
		s.CloseWrite()
	})
	p.connect(1)
	p.fr.WriteDataPadded(1, false, []byte("hello "), make([]byte, 200))
	p.fr.WriteDataPadded(1, false, nil, make([]byte, 255))
	p.fr.WriteDataPadded(1, true, []byte("world"), make([]byte, 0))
	if b := within(t, "the bytes", got); string(b) != "hello world" {
		t.Errorf("got %q", b)
	}
	p.expectAlive()
}

// The window given back is exactly what was taken, padding included.
func TestCreditIsExact(t *testing.T) {
	cfg := smallWindows()
	p, _ := rawClientOf(t, cfg, swallow)
	p.connect(1)
	sent, window := 0, cfg.StreamWindow
	for range 200 {
		n := min(window, 300)
		if n < 20 {
			// It must come by itself.
			w := p.expect("window", func(f http2.Frame) bool {
				w, ok := f.(*http2.WindowUpdateFrame)
				return ok && w.StreamID == 1
			}).(*http2.WindowUpdateFrame)
			window += int(w.Increment)
			continue
		}
		p.fr.WriteDataPadded(1, false, make([]byte, n-11), make([]byte, 10))
		sent += n
		window -= n
		if window > cfg.StreamWindow {
			t.Fatalf("a window of %d", window)
		}
	}
	p.expectAlive()
}

// A sender obeys both windows, wherever SETTINGS move them.
func TestPeerWindowChanges(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789"), 1000)
	p, _ := rawClientOf(t, quickConfig(), func(r *Request) {
		s, err := r.Respond(200)
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := s.Write(body); err != nil {
			t.Error("write:", err)
		}
		s.CloseWrite()
		io.Copy(io.Discard, s)
	}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
	p.connect(1)
	var got []byte
	data := func(want int) {
		t.Helper()
		for n := 0; n < want; {
			f := p.expect("data", func(f http2.Frame) bool { return f.Header().Type == http2.FrameData }).(*http2.DataFrame)
			got = append(got, f.Data()...)
			n += len(f.Data())
			if n > want {
				t.Fatalf("%d bytes, the window was %d", n, want)
			}
		}
	}
	data(100)
	// Down: the window is negative now, and an update only makes it less so.
	p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 50})
	p.fr.WriteWindowUpdate(1, 50) // -50 + 50 = 0
	p.expectAlive()
	p.fr.WriteWindowUpdate(1, 30)
	data(30)
	// Up: the difference may be sent at once.
	p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1050})
	data(1000)
	p.fr.WriteWindowUpdate(1, 100_000)
	data(len(body) - 1130)
	if !bytes.Equal(got, body) {
		t.Error("the bytes differ")
	}
}
