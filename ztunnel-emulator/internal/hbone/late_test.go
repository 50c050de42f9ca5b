package hbone

import (
	"context"
	"sync"
	"testing"

	"golang.org/x/net/http2"
)

// A request may cross the end of a drain. It is refused, and what else comes of it
// is for nobody: the tunnel's other streams go on (RFC 9113, 6.8).
func TestFramesOfRequestRefusedInDrain(t *testing.T) {
	for name, more := range map[string]func(*peer){
		"reset":         func(p *peer) { p.fr.WriteRSTStream(3, http2.ErrCodeCancel) },
		"data":          func(p *peer) { p.fr.WriteData(3, true, []byte("x")) },
		"window update": func(p *peer) { p.fr.WriteWindowUpdate(3, 1) },
		"trailers":      func(p *peer) { p.headers(3, true, "x", "y") },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			p := newPeer(t, a)
			conns := make(chan *ServerConn, 1)
			var work sync.WaitGroup
			work.Go(func() {
				sc, err := startServer(context.Background(), newWire(b), nil, quickConfig())
				if err != nil {
					t.Error(err)
					close(conns)
					return
				}
				conns <- sc
				sc.Serve(holdUntilClosed)
			})
			defer work.Wait()
			defer a.Close()
			p.nc.Write([]byte(http2.ClientPreface))
			p.fr.WriteSettings()
			p.connect(1)
			p.expectStatus(1, "200")
			sc, ok := <-conns
			if !ok {
				return
			}
			sc.Drain()
			p.expect("the drain's ping", func(f http2.Frame) bool {
				ping, ok := f.(*http2.PingFrame)
				return ok && ping.Data == drainPing
			})
			p.fr.WritePing(true, drainPing)
			p.expectGoAway(http2.ErrCodeNo)
			p.connect(3)
			more(p)
			p.expectReset(3, http2.ErrCodeRefusedStream)
			p.expectAlive()
			sc.Close()
			last := p.expect("GOAWAY", func(f http2.Frame) bool { return f.Header().Type == http2.FrameGoAway }).(*http2.GoAwayFrame)
			if last.LastStreamID != 1 {
				t.Errorf("the last GOAWAY takes back stream %d", last.LastStreamID)
			}
		})
	}
}
