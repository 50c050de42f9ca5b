package hbone

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

func TestPoolCounts(t *testing.T) {
	for _, tc := range []struct {
		name    string
		limit   int
		batches []int
		conns   []int32 // in all, after each batch
		closed  []bool  // all connections closed after the batch ended
	}{
		{"limit 3", 3, []int{2, 2}, []int32{1, 1}, []bool{false, false}},
		{"limit 2", 2, []int{4, 5}, []int32{2, 5}, []bool{true, false}},
		{"limit 1", 1, []int{2}, []int32{2}, []bool{true}},
		{"limit 101", 101, []int{100}, []int32{1}, []bool{false}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.MaxStreamsPerConn = tc.limit
			s := newSite(t, cfg, holdUntilClosed)
			p := NewPool(cfg)
			defer p.Close()
			for i, n := range tc.batches {
				endAll(t, openMany(t, p, s, n))
				if got := s.conns.Load(); got != tc.conns[i] {
					t.Errorf("batch %d: %d connections, want %d", i, got, tc.conns[i])
				}
				if tc.closed[i] {
					eventually(t, "all to be closed", func() bool { return s.open.Load() == 0 && p.Tunnels() == 0 })
				}
			}
		})
	}
}

func TestPoolUnusedTimeout(t *testing.T) {
	cfg := DefaultConfig()
	cfg.UnusedTimeout = 100 * time.Millisecond
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	streams := openMany(t, p, s, 1)
	eventually(t, "the pool to forget it", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.lanes) == 0
	})
	if p.Tunnels() != 1 {
		t.Error("the tunnel ended before its stream did")
	}
	endAll(t, streams)
	eventually(t, "the connection to close", func() bool { return s.open.Load() == 0 && p.Tunnels() == 0 })
}

func TestPoolGoAway(t *testing.T) {
	cfg := DefaultConfig()
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	first := openMany(t, p, s, 1)
	s.each(func(sc *ServerConn) { sc.Drain() })
	eventually(t, "GOAWAY", func() bool { return !first[0].c.usable() })
	second := openMany(t, p, s, 1)
	if got := s.conns.Load(); got != 2 {
		t.Errorf("%d connections, want 2", got)
	}
	endAll(t, append(first, second...))
	eventually(t, "the first to close", func() bool { return s.open.Load() == 1 })
}

func TestPoolFailedAttempt(t *testing.T) {
	p := NewPool(DefaultConfig())
	defer p.Close()
	failed := errors.New("no route")
	started, release := make(chan struct{}), make(chan struct{})
	var dials atomic.Int32
	dial := func(context.Context) (*ClientConn, error) {
		if dials.Add(1) == 1 {
			close(started)
		}
		<-release
		return nil, failed
	}
	errs := make(chan error, 11)
	open := func() {
		_, _, err := p.Open(context.Background(), Key{}, dial, "x", nil)
		errs <- err
	}
	go open()
	<-started
	for range 10 {
		go open()
	}
	close(release)
	for range 11 {
		if err := within(t, "everybody's error", errs); err != failed {
			t.Errorf("got %v", err)
		}
	}
}

// A user who gives up takes only its own attempt with it.
func TestPoolWinnerGivesUp(t *testing.T) {
	cfg := DefaultConfig()
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	ctx, cancel := context.WithCancel(context.Background())
	started := make(chan struct{})
	stuck := func(ctx context.Context) (*ClientConn, error) {
		close(started)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	first := make(chan error, 1)
	go func() {
		_, _, err := p.Open(ctx, Key{}, stuck, "x", nil)
		first <- err
	}()
	<-started
	second := make(chan []*Stream, 1)
	go func() { second <- openMany(t, p, s, 3) }()
	cancel()
	if err := within(t, "the first", first); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	endAll(t, within(t, "the others", second))
}

func TestPoolKeysAreIndependent(t *testing.T) {
	cfg := DefaultConfig()
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	ctx, cancel := context.WithCancel(context.Background())
	started, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		p.Open(ctx, Key{Dst: netip.MustParseAddrPort("192.0.2.1:15008")}, func(ctx context.Context) (*ClientConn, error) {
			close(started)
			<-ctx.Done()
			return nil, ctx.Err()
		}, "x", nil)
	}()
	<-started
	endAll(t, openMany(t, p, s, 1))
	cancel()
	within(t, "the stuck one", done)
}

func TestPoolCloseEndsStreams(t *testing.T) {
	cfg := DefaultConfig()
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	streams := openMany(t, p, s, 5)
	p.Close()
	for _, st := range streams {
		if _, err := st.Read(make([]byte, 1)); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
	if _, _, err := p.Open(context.Background(), Key{}, s.dial, "x", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestPoolForgetsTheLeastRecent(t *testing.T) {
	cfg := DefaultConfig()
	cfg.PoolSize = 3
	s := newSite(t, cfg, holdUntilClosed)
	p := NewPool(cfg)
	defer p.Close()
	for i := range 5 {
		st, _, err := p.Open(context.Background(), Key{Source: string(rune('a' + i))}, s.dial, "x", nil)
		if err != nil {
			t.Fatal(err)
		}
		endAll(t, []*Stream{st})
	}
	eventually(t, "three to be left", func() bool { return p.Tunnels() == 3 && s.open.Load() == 3 })
}

// A tunnel that refuses, or goes away before the request, is not the user's problem.
func TestPoolRetriesWhatWasNotSent(t *testing.T) {
	for name, refuse := range map[string]func(*peer, uint32){
		"refused": func(p *peer, id uint32) { p.fr.WriteRSTStream(id, http2.ErrCodeRefusedStream) },
		"goaway":  func(p *peer, id uint32) { p.fr.WriteGoAway(0, http2.ErrCodeNo, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := quickConfig()
			bad, peer := rawServerOf(t, cfg)
			s := newSite(t, cfg, holdUntilClosed)
			p := NewPool(cfg)
			defer p.Close()
			first := true
			dial := func(ctx context.Context) (*ClientConn, error) {
				if first {
					first = false
					return bad, nil
				}
				return s.dial(ctx)
			}
			got := make(chan *Stream, 1)
			go func() {
				st, _, err := p.Open(context.Background(), Key{}, dial, "192.0.2.1:80", nil)
				if err != nil {
					t.Error(err)
				}
				got <- st
			}()
			refuse(peer, peer.request())
			endAll(t, []*Stream{within(t, "the stream", got)})
		})
	}
}

// A tunnel within the tunnel: TLS and HTTP/2 over a stream.
func TestDoubleTunnel(t *testing.T) {
	_, serverTLS := tlsConfigs()
	cfg := DefaultConfig()
	cc, _ := tunnel(t, cfg, func(r *Request) {
		s, err := r.Respond(200)
		if err != nil {
			return
		}
		inner, err := Accept(r.Context(), s.Conn(), serverTLS, cfg)
		if err != nil {
			t.Error(err)
			return
		}
		inner.Serve(echo)
	})
	s, _, err := cc.Open(context.Background(), "gateway.example:15008", nil)
	if err != nil {
		t.Fatal(err)
	}
	clientTLS, _ := tlsConfigs()
	inner, err := Dial(context.Background(), s.Conn(), clientTLS, cfg)
	if err != nil {
		t.Fatal(err)
	}
	st, _, err := inner.Open(context.Background(), "echo.example:80", nil)
	if err != nil {
		t.Fatal(err)
	}
	body := make([]byte, 1<<20)
	rand.Read(body)
	go func() {
		st.Write(body)
		st.CloseWrite()
	}()
	if b, err := io.ReadAll(st); !bytes.Equal(b, body) || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	inner.Close()
	within(t, "the inner end", inner.Done())
}
