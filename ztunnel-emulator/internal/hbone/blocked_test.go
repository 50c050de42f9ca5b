package hbone

import (
	"testing"

	"golang.org/x/net/http2"
)

// Streams that end while they wait for the connection's window wait no longer: a
// peer that gives none, and resets one stream after the other, costs no memory.
func TestBlockedStreamsAreForgotten(t *testing.T) {
	cc, p := rawServerOf(t, quickConfig(), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	waiting := func() int {
		cc.mu.Lock()
		defer cc.mu.Unlock()
		return len(cc.blocked)
	}
	for range 20 {
		ch := open(cc)
		id := p.request()
		p.headers(id, false, ":status", "200")
		s := within(t, "the answer", ch).s
		written := make(chan error, 1)
		go func() {
			_, err := s.Write(make([]byte, 2*initialWindow))
			written <- err
		}()
		eventually(t, "the stream to wait", func() bool { return waiting() > 0 })
		p.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		if err := within(t, "its end", written); err == nil {
			t.Fatal("written without window")
		}
		eventually(t, "nobody to wait", func() bool { return waiting() == 0 })
	}
}
