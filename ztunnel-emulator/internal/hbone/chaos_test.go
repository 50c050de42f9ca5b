package hbone

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// Many bytes arrive as they were sent, both ways at once.
func TestLongTransfer(t *testing.T) {
	size := int64(1 << 30)
	if raceEnabled {
		size = 64 << 20
	}
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	p := newPath(t, cc, h)
	sums := make(chan [2][32]byte, 2)
	transfer := func(from, to *net.TCPConn, seed byte) {
		var w sync.WaitGroup
		var sent [32]byte
		w.Add(1)
		go func() {
			defer w.Done()
			sum := sha256.New()
			src := io.TeeReader(io.LimitReader(mrand.NewChaCha8([32]byte{seed}), size), sum)
			io.CopyBuffer(struct{ io.Writer }{from}, src, make([]byte, 256<<10))
			from.CloseWrite()
			sum.Sum(sent[:0])
		}()
		sum := sha256.New()
		io.CopyBuffer(sum, struct{ io.Reader }{to}, make([]byte, 256<<10))
		w.Wait()
		var got [32]byte
		sum.Sum(got[:0])
		sums <- [2][32]byte{sent, got}
	}
	go transfer(p.client, p.server, 1)
	if raceEnabled {
		go transfer(p.server, p.client, 2)
	} else {
		p.server.CloseWrite()
		sums <- [2][32]byte{}
	}
	for range 2 {
		select {
		case s := <-sums:
			if s[0] != s[1] {
				t.Error("the bytes differ")
			}
		case <-time.After(2 * time.Minute):
			t.Fatal("too slow")
		}
	}
	if r := within(t, "the client's relay", p.cDone); r.err != nil || r.Sent != size {
		t.Errorf("%+v", r)
	}
	if r := within(t, "the server's relay", p.sDone); r.err != nil || r.Received != size {
		t.Errorf("%+v", r)
	}
}

// echo answers 200 and sends back what comes.
func echo(r *Request) {
	s, err := r.Respond(200)
	if err != nil {
		return
	}
	io.Copy(s, s)
	s.CloseWrite()
}

func TestManyStreams(t *testing.T) {
	streams := 10_000
	if raceEnabled {
		streams = 3000
	}
	cfg := DefaultConfig()
	s := newSite(t, cfg, echo)
	p := NewPool(cfg)
	defer p.Close()
	todo := make(chan int, streams)
	for i := range streams {
		todo <- i
	}
	close(todo)
	var w sync.WaitGroup
	for range 99 { // one below the limit: then the one tunnel lasts
		w.Add(1)
		go func() {
			defer w.Done()
			for range todo {
				st, _, err := p.Open(context.Background(), Key{}, s.dial, "192.0.2.1:80", nil)
				if err != nil {
					t.Error(err)
					return
				}
				st.Write([]byte("hello"))
				st.CloseWrite()
				if b, err := io.ReadAll(st); string(b) != "hello" || err != nil {
					t.Errorf("got %q, %v", b, err)
				}
			}
		}()
	}
	w.Wait()
	if n := s.conns.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// Streams that open, reset, half-close and die in every order leave nothing
// behind, and the connection lives and keeps its windows.
func TestChaos(t *testing.T) {
	cfg := DefaultConfig()
	cfg.ConnWindow = 256 << 10
	cfg.StreamWindow = 64 << 10
	cfg.MaxQueued = 100 << 10   // so that window is held back, and given back
	cfg.ServerMaxStreams = 1000 // its limit of early resets too
	cc, sc := tunnel(t, cfg, func(r *Request) {
		if mrand.N(10) == 0 {
			r.Respond(503)
			return
		}
		s, err := r.Respond(200)
		if err != nil {
			return
		}
		switch mrand.N(4) {
		case 0:
			s.Cancel(nil)
		case 1:
			s.CloseWrite()
			io.Copy(io.Discard, s)
		case 2:
			io.CopyN(s, s, 30_000)
		default:
			io.Copy(s, s)
			s.CloseWrite()
		}
	})
	var w sync.WaitGroup
	for range 16 {
		w.Add(1)
		go func() {
			defer w.Done()
			for range 40 {
				chaosOnce(t, cc)
			}
		}()
	}
	w.Wait()
	eventually(t, "no streams", func() bool { return cc.Streams() == 0 && sc.Streams() == 0 })
	if cc.Err() != nil || sc.Err() != nil {
		t.Fatalf("the connection died: %v, %v", cc.Err(), sc.Err())
	}
	// All window is back, but for what is collected to be given back together.
	for name, pair := range map[string][2]*conn{"there": {cc.conn, sc.conn}, "back": {sc.conn, cc.conn}} {
		from, to := pair[0], pair[1]
		var state string
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			from.mu.Lock()
			can := from.sendWindow
			from.mu.Unlock()
			to.mu.Lock()
			state = fmt.Sprintf("may send %d, may come %d, owed %d, queued %d, held %d", can, to.recvWindow, to.owed, to.queued, to.held)
			ok := can == to.recvWindow && to.recvWindow+to.owed == int64(cfg.ConnWindow) && to.queued == 0 && to.held == 0
			to.mu.Unlock()
			if ok {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s: %s", name, state)
				break
			}
		}
	}
}

func chaosOnce(t *testing.T, cc *ClientConn) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if mrand.N(10) == 0 {
		go cancel()
	}
	s, _, err := cc.Open(ctx, "192.0.2.1:80", nil)
	if err != nil {
		return
	}
	app, file := appPair(t)
	defer app.Close()
	done := relay(s, file)
	if mrand.N(5) == 0 {
		go s.Cancel(errors.New("enough"))
	}
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		app.Write(make([]byte, mrand.N(200_000)))
		switch mrand.N(3) {
		case 0:
			app.CloseWrite()
		case 1:
			app.SetLinger(0)
			app.Close()
		default:
			app.CloseWrite()
		}
	}()
	io.Copy(io.Discard, app)
	<-wrote
	app.Close()
	within(t, "the relay", done)
}
