package hbone

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// What a peer's reset means for who relays.
func TestResetCodes(t *testing.T) {
	for code, want := range map[http2.ErrCode]string{
		http2.ErrCodeNo:           "",
		http2.ErrCodeCancel:       "",
		http2.ErrCodeStreamClosed: "",
		http2.ErrCodeInternal:     "receive: stream error received: unexpected internal error encountered",
		http2.ErrCode(99):         "receive: stream error received: unknown error code 0x63",
	} {
		t.Run(code.String(), func(t *testing.T) {
			cc, p := rawServerOf(t, quickConfig())
			got := open(cc)
			id := p.request()
			p.headers(id, false, ":status", "200")
			o := within(t, "the answer", got)
			if o.err != nil {
				t.Fatal(o.err)
			}
			app, file := appPair(t)
			done := relay(o.s, file)
			p.fr.WriteData(id, false, []byte("before"))
			p.fr.WriteRSTStream(id, code)
			r := within(t, "the relay", done)
			if text := errText(r.err); text != want {
				t.Errorf("got %q, want %q", text, want)
			}
			if want == "" {
				if b, err := io.ReadAll(app); string(b) != "before" || err != nil {
					t.Errorf("the application got %q, %v", b, err)
				}
			}
		})
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// One application that does not read keeps no other stream from its bytes.
func TestSlowApplicationBlocksNobody(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	stalled := make([]*path, 6) // with 4 MiB each more than a connection's window
	for i := range stalled {
		p := newPath(t, cc, h)
		p.takesLittle(t)
		go p.server.Write(make([]byte, 16<<20))
		stalled[i] = p
	}
	p := newPath(t, cc, h)
	body := make([]byte, 20<<20)
	rand.Read(body)
	got := make(chan []byte, 1)
	go receive(p.client, got)
	go send(p.server, body)
	if !bytes.Equal(within(t, "the quick one", got), body) {
		t.Error("the bytes differ")
	}
	for _, p := range stalled {
		p.client.Close()
		p.server.Close()
	}
}

// A peer that stops reading in the middle of a transfer costs the time of a ping.
func TestPeerStopsReading(t *testing.T) {
	cfg := quickConfig()
	cfg.PingInterval, cfg.PingTimeout = 50*time.Millisecond, 200*time.Millisecond
	cc, p := rawServerOf(t, cfg,
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: maxWindow})
	p.fr.WriteWindowUpdate(0, maxWindow-initialWindow)
	got := open(cc)
	p.headers(p.request(), false, ":status", "200")
	o := within(t, "the answer", got)
	if o.err != nil {
		t.Fatal(o.err)
	}
	app, file := appPair(t)
	done := relay(o.s, file)
	go func() {
		for {
			if _, err := app.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	}()
	r := within(t, "the relay", done)
	if text := errText(r.err); text != "receive: "+ErrPingTimeout.Error() {
		t.Errorf("got %q", text)
	}
}

func TestDrain(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			h := newPathHandler(t)
			cc, sc := tunnel(t, DefaultConfig(), h.handle)
			p := newPath(t, cc, h)
			if side == "client" {
				cc.Drain()
			} else {
				sc.Drain()
			}
			eventually(t, "no new streams", func() bool { return !cc.usable() })
			if o := within(t, "a new stream", open(cc)); !errors.Is(o.err, ErrNotSent) {
				t.Errorf("got %v", o.err)
			}
			body := make([]byte, 3<<20)
			got := make(chan []byte, 1)
			go receive(p.server, got)
			send(p.client, body)
			if n := len(within(t, "the rest", got)); n != len(body) {
				t.Errorf("%d bytes of %d", n, len(body))
			}
			p.server.Close()
			for _, ch := range []<-chan relayed{p.cDone, p.sDone} {
				if r := within(t, "a relay", ch); r.err != nil {
					t.Error(r.err)
				}
			}
			within(t, "the client's end", cc.Done())
			within(t, "the server's end", sc.Done())
		})
	}
}
