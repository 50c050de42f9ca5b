package hbone

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

func TestHalfClose(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	p := newPath(t, cc, h)
	// The client ends; the server sees it and goes on.
	p.client.CloseWrite()
	if b, err := io.ReadAll(p.server); len(b) != 0 || err != nil {
		t.Errorf("the server got %q, %v", b, err)
	}
	for i := range 3 {
		msg := []byte{byte(i)}
		p.server.Write(msg)
		if _, err := io.ReadFull(p.client, msg); err != nil || msg[0] != byte(i) {
			t.Fatalf("got %v, %v", msg, err)
		}
	}
	p.server.CloseWrite()
	if b, err := io.ReadAll(p.client); len(b) != 0 || err != nil {
		t.Errorf("the client got %q, %v", b, err)
	}
	if got := within(t, "the client's relay", p.cDone); got != (relayed{Counts{0, 3}, nil}) {
		t.Errorf("client: %+v", got)
	}
	if got := within(t, "the server's relay", p.sDone); got != (relayed{Counts{3, 0}, nil}) {
		t.Errorf("server: %+v", got)
	}
}

// A reset by one application is an end for the other, and no error.
func TestApplicationResets(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	p := newPath(t, cc, h)
	p.client.SetLinger(0)
	p.client.Close()
	if b, err := io.ReadAll(p.server); len(b) != 0 || err != nil {
		t.Errorf("the server got %q, %v", b, err)
	}
	p.server.Close()
	for side, ch := range map[string]<-chan relayed{"client": p.cDone, "server": p.sDone} {
		if got := within(t, side, ch); got.err != nil {
			t.Errorf("%s: %v", side, got.err)
		}
	}
}

// An application that closes while the other still sends: the sender is stopped
// by a reset that it sees as an end, and nobody waits for ever.
func TestApplicationClosesWhileBytesCome(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	p := newPath(t, cc, h)
	p.server.Close()
	go func() {
		for {
			if _, err := p.client.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	for side, ch := range map[string]<-chan relayed{"client": p.cDone, "server": p.sDone} {
		if got := within(t, side, ch); got.err != nil {
			t.Errorf("%s: %v", side, got.err)
		}
	}
	eventually(t, "no stream", func() bool { return cc.Streams() == 0 })
}

func TestCancel(t *testing.T) {
	for _, from := range []string{"client", "server", "server that has finished"} {
		t.Run(from, func(t *testing.T) {
			h := newPathHandler(t)
			cc, _ := tunnel(t, DefaultConfig(), h.handle)
			p := newPath(t, cc, h)
			policy := errors.New("connection closed due to policy change")
			mine, other, app := p.sDone, p.cDone, p.client
			switch from {
			case "client":
				p.cStream.Cancel(policy)
				mine, other, app = p.cDone, p.sDone, p.server
			case "server that has finished":
				p.server.CloseWrite()
				io.ReadAll(p.client)
				fallthrough
			default:
				p.sStream.Cancel(policy)
			}
			if got := within(t, "the cancelled relay", mine); got.err != policy {
				t.Errorf("got %v", got.err)
			}
			if got := within(t, "the other relay", other); got.err != nil {
				t.Errorf("the other got %v", got.err)
			}
			if b, _ := io.ReadAll(app); len(b) != 0 {
				t.Errorf("the application got %q", b)
			}
		})
	}
}

// Cancel frees a relay that waits for an application that doesn't read, whether
// the stream is still open or ended long ago.
func TestCancelOfStalled(t *testing.T) {
	for _, ended := range []bool{false, true} {
		h := newPathHandler(t)
		cc, _ := tunnel(t, DefaultConfig(), h.handle)
		p := newPath(t, cc, h)
		p.client.SetReadBuffer(4096)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			p.server.Write(make([]byte, 3<<20))
			if ended {
				p.server.CloseWrite()
			}
		}()
		within(t, "the server to send", sent)
		p.client.CloseWrite()
		if ended {
			within(t, "the server's relay", p.sDone)
		}
		p.cStream.Cancel(errors.New("enough"))
		if got := within(t, "the client's relay", p.cDone); got.err == nil || got.err.Error() != "enough" {
			t.Errorf("got %v", got.err)
		}
	}
}

func TestCloseEndsRelays(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	p := newPath(t, cc, h)
	cc.Close()
	if got := within(t, "the client's relay", p.cDone); got.err == nil || got.err.Error() != "receive: the tunnel was closed" {
		t.Errorf("client: %v", got.err)
	}
	if got := within(t, "the server's relay", p.sDone); got.err != nil {
		t.Errorf("server: %v", got.err)
	}
}

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

// DATA that comes before the handler relays is not lost.
func TestEarlyData(t *testing.T) {
	app, file := appPair(t)
	go1 := make(chan struct{})
	p, _ := rawClientOf(t, quickConfig(), func(r *Request) {
		s, err := r.Respond(200)
		if err != nil {
			t.Error(err)
			return
		}
		<-go1
		if c, err := s.Relay(file); err != nil || c.Received != 300_000 {
			t.Errorf("%+v, %v", c, err)
		}
		file.Close()
	})
	p.connect(1)
	body := make([]byte, 300_000)
	rand.Read(body)
	for at := 0; at < len(body); at += 10_000 {
		p.fr.WriteData(1, at+10_000 == len(body), body[at:at+10_000])
	}
	p.expectAlive()
	close(go1)
	if b, _ := io.ReadAll(app); !bytes.Equal(b, body) {
		t.Error("the bytes differ")
	}
	app.Close()
}

// One application that does not read keeps no other stream from its bytes.
func TestSlowApplicationBlocksNobody(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	stalled := make([]*path, 6) // with 4 MiB each more than a connection's window
	for i := range stalled {
		p := newPath(t, cc, h)
		p.client.SetReadBuffer(4096)
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

// Many bytes arrive as they were sent, both ways at once.
func TestLongTransfer(t *testing.T) {
	size := int64(1 << 30)
	if raceEnabled {
		size = 128 << 20
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
