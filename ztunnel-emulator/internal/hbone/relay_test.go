package hbone

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"
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

// takesLittle makes the kernel hold little for the client's application.
func (p *path) takesLittle(t *testing.T) {
	t.Helper()
	p.client.SetReadBuffer(4096)
	raw, err := p.cFile.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096) })
	if err != nil {
		t.Fatal(err)
	}
}

// Cancel frees a relay that waits for an application that doesn't read, whether
// the stream is still open or ended long ago.
func TestCancelOfStalled(t *testing.T) {
	for _, ended := range []bool{false, true} {
		h := newPathHandler(t)
		cc, _ := tunnel(t, DefaultConfig(), h.handle)
		p := newPath(t, cc, h)
		p.takesLittle(t)
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

// Bytes and the end of a stream that come while a relay lets go of it are for nobody,
// and count as taken: or all streams would have less room for ever.
func TestEndWhileDetaching(t *testing.T) {
	cc, _ := tunnel(t, DefaultConfig(), func(r *Request) {
		if s, err := r.Respond(200); err == nil {
			io.Copy(io.Discard, s)
			<-t.Context().Done()
		}
	})
	s, _, err := cc.Open(t.Context(), "192.0.2.1:80", nil)
	if err != nil {
		t.Fatal(err)
	}
	s.deliver([]byte("late")) // there is no sink any more
	s.c.endLocal(s)
	s.c.endRemote(s)
	s.detach()
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.queued != 0 {
		t.Errorf("%d bytes wait for nobody", s.c.queued)
	}
}
