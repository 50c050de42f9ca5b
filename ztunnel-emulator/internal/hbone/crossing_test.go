package hbone

import (
	"net/http"
	"testing"

	"golang.org/x/net/http2"
)

// A client gives up what it was refused. Its reset may cross ours, which follows the
// answer: that is no flood, however often, and costs the tunnel's other streams nothing.
func TestManyRefusedRequests(t *testing.T) {
	p, _ := rawClientOf(t, quickConfig(), func(r *Request) { r.Respond(http.StatusUnauthorized) })
	for id := uint32(1); id < 6*controlBurst; id += 2 {
		p.connect(id)
		p.expectReset(id, http2.ErrCodeNo)
		p.fr.WriteRSTStream(id, http2.ErrCodeCancel)
	}
	p.expectAlive()
}

// More resets than there were streams cross nothing.
func TestResetsOfNothing(t *testing.T) {
	p, _ := rawClientOf(t, quickConfig(), func(r *Request) { r.Respond(http.StatusUnauthorized) })
	p.connect(1)
	p.expectReset(1, http2.ErrCodeNo)
	go func() {
		for range 2 * controlBurst {
			if p.fr.WriteRSTStream(1, http2.ErrCodeCancel) != nil {
				return // it has hung up already
			}
		}
	}()
	p.expectGoAway(http2.ErrCodeEnhanceYourCalm)
}
