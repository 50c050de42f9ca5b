package hbone

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// site is a server that pools dial, on loopback with TLS, and counts its connections.
type site struct {
	t       testing.TB
	l       net.Listener
	cfg     Config
	handler func(*Request)
	conns   atomic.Int32
	open    atomic.Int32
	mu      sync.Mutex
	servers []*ServerConn
	work    sync.WaitGroup
}

func newSite(t testing.TB, cfg Config, handler func(*Request)) *site {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, l: l, cfg: cfg, handler: handler}
	s.work.Add(1)
	go s.accept()
	t.Cleanup(func() {
		l.Close()
		s.each(func(sc *ServerConn) { sc.Close() })
		s.work.Wait()
	})
	return s
}

func (s *site) each(f func(*ServerConn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sc := range s.servers {
		f(sc)
	}
}

func (s *site) accept() {
	defer s.work.Done()
	_, serverTLS := tlsConfigs()
	for {
		raw, err := s.l.Accept()
		if err != nil {
			return
		}
		s.work.Add(1)
		go func() {
			defer s.work.Done()
			sc, err := Accept(context.Background(), raw, serverTLS, s.cfg)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.servers = append(s.servers, sc)
			s.mu.Unlock()
			s.conns.Add(1)
			s.open.Add(1)
			defer s.open.Add(-1)
			sc.Serve(s.handler)
		}()
	}
}

func (s *site) dial(ctx context.Context) (*ClientConn, error) {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", s.l.Addr().String())
	if err != nil {
		return nil, err
	}
	clientTLS, _ := tlsConfigs()
	return Dial(ctx, raw, clientTLS, s.cfg)
}

// holdUntilClosed answers 200 and reads until the client ends.
func holdUntilClosed(r *Request) {
	s, err := r.Respond(200)
	if err != nil {
		return
	}
	var b [1024]byte
	for {
		if _, err := s.Read(b[:]); err != nil {
			s.CloseWrite()
			return
		}
	}
}

// openMany opens n streams at the same time and holds them all open together.
func openMany(t testing.TB, p *Pool, s *site, n int) []*Stream {
	t.Helper()
	streams := make(chan *Stream, n)
	errs := make(chan error, n)
	for range n {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			st, _, err := p.Open(ctx, Key{}, s.dial, "192.0.2.1:80", nil)
			if err != nil {
				errs <- err
				return
			}
			streams <- st
		}()
	}
	var all []*Stream
	for range n {
		select {
		case st := <-streams:
			all = append(all, st)
		case err := <-errs:
			t.Fatal(err)
		}
	}
	return all
}

// endAll ends streams on both sides.
func endAll(t testing.TB, streams []*Stream) {
	t.Helper()
	for _, s := range streams {
		s.CloseWrite()
		if _, err := s.Read(make([]byte, 1)); err == nil {
			t.Error("bytes where an end was expected")
		}
	}
}

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
