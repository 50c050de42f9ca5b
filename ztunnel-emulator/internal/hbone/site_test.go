package hbone

import (
	"context"
	"net"
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
