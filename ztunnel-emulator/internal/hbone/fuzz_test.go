package hbone

import (
	"bytes"
	"context"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// FuzzServerFrames feeds whatever bytes to a server after the magic. It never
// panics, never hangs, and gives back all it lent.
func FuzzServerFrames(f *testing.F) {
	seed := func(do func(*http2.Framer, *peer)) {
		var b bytes.Buffer
		fr := http2.NewFramer(&b, nil)
		fr.AllowIllegalWrites = true
		fr.WriteSettings()
		p := &peer{fr: fr}
		p.he = newPeerEncoder(&p.hb)
		do(fr, p)
		f.Add(b.Bytes())
	}
	seed(func(fr *http2.Framer, p *peer) { p.connect(1); fr.WriteData(1, true, []byte("hello")) })
	seed(func(fr *http2.Framer, p *peer) {
		p.connect(1)
		fr.WriteDataPadded(1, false, []byte("x"), make([]byte, 9))
		fr.WriteRSTStream(1, http2.ErrCodeCancel)
	})
	seed(func(fr *http2.Framer, p *peer) {
		p.headers(1, true, ":method", "GET", ":path", "/", ":scheme", "x")
		p.connect(3, "baggage", "a=b")
		fr.WriteWindowUpdate(3, 100)
		fr.WriteGoAway(0, http2.ErrCodeNo, []byte("bye"))
		fr.WritePing(false, [8]byte{})
	})
	f.Fuzz(func(t *testing.T, frames []byte) {
		a, b := net.Pipe()
		client := make(chan struct{})
		go func() {
			defer close(client)
			a.SetDeadline(time.Now().Add(5 * time.Second))
			go io.Copy(io.Discard, a)
			io.WriteString(a, http2.ClientPreface)
			a.Write(frames)
			a.Close()
		}()
		cfg := quickConfig()
		sc, err := startServer(context.Background(), newWire(b), nil, cfg)
		if err != nil {
			a.Close()
			<-client
			return
		}
		sc.Serve(swallow)
		a.Close()
		<-client
		if n := sc.Streams(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
		if sc.queued != 0 || sc.held != 0 {
			t.Errorf("%d bytes are counted as waiting, %d held", sc.queued, sc.held)
		}
		if sc.in.buf != nil || sc.wire.in != nil || sc.wire.out != nil {
			t.Error("a buffer is kept")
		}
	})
}
