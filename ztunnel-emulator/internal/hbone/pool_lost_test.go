package hbone

import (
	"context"
	"io"
	"sync/atomic"
	"testing"
)

// refuser is a peer that ends each connection before it has said anything, as one
// does that does not accept our certificate.
type refuser struct {
	cfg   Config
	dials atomic.Int32
}

func (r *refuser) dial(t testing.TB) func(context.Context) (*ClientConn, error) {
	return func(context.Context) (*ClientConn, error) {
		r.dials.Add(1)
		a, b := tcpPair(t)
		cc, err := startClient(newWire(b), nil, r.cfg)
		if err != nil {
			return nil, err
		}
		a.Close()
		<-cc.Done()
		return cc, nil
	}
}

// Who is refused before a first answer is refused: there is one attempt.
func TestPoolDoesNotRetryWhoIsRefused(t *testing.T) {
	cfg := quickConfig()
	r := &refuser{cfg: cfg}
	p := NewPool(cfg)
	defer p.Close()
	_, _, err := p.Open(context.Background(), Key{}, r.dial(t), "192.0.2.1:80", nil)
	if !endsQuietly(err) {
		t.Errorf("got %v, want why the connection ended", err)
	}
	if n := r.dials.Load(); n != 1 {
		t.Errorf("%d connections for one request, want 1", n)
	}
}

// A tunnel that has served before, and dies while it is borrowed, was no refusal.
func TestPoolRetriesWhereATunnelHasServed(t *testing.T) {
	cfg := quickConfig()
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	first := openMany(t, p, s, 1)
	old := first[0].c
	old.wmu.Lock() // the next request is borrowed a tunnel, and can't be written
	next := make(chan []*Stream, 1)
	go func() { next <- openMany(t, p, s, 1) }()
	eventually(t, "a borrower", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		for lent := range p.all {
			return lent.inUse == 2
		}
		return false
	})
	failed := make(chan struct{})
	go func() {
		defer close(failed)
		old.fail(io.EOF)
	}()
	eventually(t, "its end", func() bool { return old.Err() != nil })
	old.wmu.Unlock()
	within(t, "its end", failed)
	endAll(t, within(t, "another tunnel", next))
	if got := s.conns.Load(); got != 2 {
		t.Errorf("%d connections, want 2", got)
	}
}

// A tunnel that takes no more streams goes from its lane, and the next one takes
// its place there: it is shared, and the pool forgets it in time.
func TestPoolSharesTheSuccessor(t *testing.T) {
	cfg := DefaultConfig()
	cfg.PoolSize = 1
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	first := openMany(t, p, s, 1) // which keeps the first tunnel
	s.each(func(sc *ServerConn) { sc.Drain() })
	eventually(t, "GOAWAY", func() bool { return !first[0].c.usable() })
	second := append(openMany(t, p, s, 1), openMany(t, p, s, 1)...)
	if got := s.conns.Load(); got != 2 {
		t.Errorf("%d connections, want 2: the successor is shared", got)
	}
	endAll(t, append(first, second...))
}

// The same, and a tunnel of another key makes the pool forget the successor.
func TestPoolForgetsTheSuccessor(t *testing.T) {
	cfg := DefaultConfig()
	cfg.PoolSize = 1
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	first := openMany(t, p, s, 1)
	s.each(func(sc *ServerConn) { sc.Drain() })
	eventually(t, "GOAWAY", func() bool { return !first[0].c.usable() })
	second := openMany(t, p, s, 1)
	opened := make(chan *Stream, 1)
	go func() {
		st, _, err := p.Open(context.Background(), Key{Source: "another"}, s.dial, "192.0.2.1:80", nil)
		if err != nil {
			t.Error(err)
		}
		opened <- st
	}()
	endAll(t, append(append(first, second...), within(t, "a tunnel of another key", opened)))
	eventually(t, "one to be left", func() bool { return p.Tunnels() == 1 })
	p.Close()
}

// A lane goes with its last tunnel.
func TestPoolKeepsNoEmptyLanes(t *testing.T) {
	cfg := DefaultConfig()
	cfg.MaxStreamsPerConn = 1
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	endAll(t, openMany(t, p, s, 2))
	eventually(t, "no lane", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.lanes) == 0
	})
}
