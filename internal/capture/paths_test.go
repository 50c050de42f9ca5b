package capture

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"ambient-emulator/internal/worldtest"
)

// path is a way from a client to a server through ztunnel, on one side or on both.
type path struct {
	client, server         *worldtest.Place
	clientNode, serverNode *worldtest.Node // nil where nothing is captured
	six                    bool
}

// eachPath runs f on pods of two nodes: captured where the connection leaves,
// where it arrives, and in both places; with each form of rules and each family.
func eachPath(t *testing.T, f func(t *testing.T, p path)) {
	for _, form := range forms {
		for _, where := range []string{"outbound", "inbound", "both"} {
			t.Run(form+"/"+where, func(t *testing.T) {
				t.Parallel()
				p := path{client: pod(t, 2), server: pod(t, 3)}
				if where != "inbound" {
					p.clientNode = newNode(t)
					p.clientNode.Add(t, p.client, "--capture", form)
				}
				if where != "outbound" {
					p.serverNode = newNode(t)
					p.serverNode.Add(t, p.server, "--capture", form)
				}
				for _, p.six = range []bool{false, true} {
					t.Run(family(p.six), func(t *testing.T) { f(t, p) })
				}
			})
		}
	}
}

// listen is the path's server, on a port that nobody else has.
func (p path) listen(t *testing.T) worldtest.Server {
	t.Helper()
	return p.server.Listen(t, at(p.server, p.six, 0))
}

// pair is both ends of a new connection.
func (p path) pair(t *testing.T) (c, s *worldtest.Conn) {
	t.Helper()
	l := p.listen(t)
	c = p.client.Dial(t, l.At)
	return c, l.Accept(t)
}

// checkLines compares the access lines of a connection on both sides, whole. What
// follows the direction is as the client's side has it, and as the server's.
func (p path) checkLines(t *testing.T, from, to netip.AddrPort, level, outbound, inbound string) {
	t.Helper()
	if p.clientNode != nil {
		want := fmt.Sprintf(`%s access connection complete src.addr=%v src.workload="%s" src.namespace="default" dst.addr=%v direction="outbound" %s`,
			level, from, p.client.Name, to, outbound)
		if got := p.clientNode.ZT.Line(t, fmt.Sprintf("src.addr=%v ", from)); got != want {
			t.Errorf("the client's side says\n%s\nwant\n%s", got, want)
		}
	}
	if p.serverNode != nil {
		want := fmt.Sprintf(`%s access connection complete src.addr=%v dst.addr=%v dst.workload="%s" dst.namespace="default" direction="inbound" %s`,
			level, from, to, p.server.Name, inbound)
		got := p.serverNode.ZT.Line(t, fmt.Sprintf("dst.addr=%v ", to))
		if p.clientNode != nil { // it was the client's ztunnel that called, from a port of its own
			got, want = worldtest.AnyPort(got), worldtest.AnyPort(want)
		}
		if got != want {
			t.Errorf("the server's side says\n%s\nwant\n%s", got, want)
		}
	}
}

// Both ends see each other, and not ztunnel; and each side says who has talked to
// whom.
func TestOriginalAddresses(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		l := p.listen(t)
		c := p.client.Dial(t, l.At)
		from := local(c)
		if remote(c) != l.At || from.Addr() != p.client.IP(p.six) {
			t.Errorf("the client sees %v -> %v, want %v -> %v", from, remote(c), p.client.IP(p.six), l.At)
		}
		s := l.Accept(t)
		if local(s) != l.At || remote(s).Addr() != p.client.IP(p.six) {
			t.Errorf("the server sees %v -> %v, want %v -> %v", remote(s), local(s), p.client.IP(p.six), l.At)
		}
		c.Say(t, "hello world")
		s.Hears(t, "hello world")
		s.Say(t, "and hello to you, too!")
		c.Hears(t, "and hello to you, too!")
		c.Close()
		s.HearsEnd(t)
		s.Close()
		p.checkLines(t, from, l.At, "info",
			`bytes_sent=11 bytes_recv=22 duration="…"`,
			`bytes_sent=22 bytes_recv=11 duration="…"`)
	})
}

// One end says that it has no more to say, and goes on listening.
func TestHalfClose(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		for _, clientFirst := range []bool{true, false} {
			c, s := p.pair(t)
			from, to := local(c), remote(c)
			first, second := c, s
			sent, received := len("first"), len("second")
			if !clientFirst {
				first, second = s, c
				sent, received = received, sent
			}
			first.Say(t, "first")
			first.CloseWrite()
			second.Hears(t, "first")
			second.HearsEnd(t)
			second.Say(t, "second")
			first.Hears(t, "second")
			second.CloseWrite()
			first.HearsEnd(t)
			p.checkLines(t, from, to, "info",
				fmt.Sprintf(`bytes_sent=%d bytes_recv=%d duration="…"`, sent, received),
				fmt.Sprintf(`bytes_sent=%d bytes_recv=%d duration="…"`, received, sent))
		}
	})
}

// A reset goes through to the other end, from either; what was said before arrives.
func TestReset(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		for _, clientResets := range []bool{true, false} {
			c, s := p.pair(t)
			from, to := local(c), remote(c)
			resets, other := c, s
			if !clientResets {
				resets, other = s, c
			}
			resets.Say(t, "last words")
			other.Hears(t, "last words")
			reset(t, resets)
			other.HearsReset(t)
			sent, received := len("last words"), 0
			if !clientResets {
				sent, received = received, sent
			}
			p.checkLines(t, from, to, "info",
				fmt.Sprintf(`bytes_sent=%d bytes_recv=%d duration="…"`, sent, received),
				fmt.Sprintf(`bytes_sent=%d bytes_recv=%d duration="…"`, received, sent))
		}
	})
}

// Nobody listens: the client, whose connect(2) went well, is reset at once.
func TestRefused(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		l := p.listen(t)
		l.Close()
		c := p.client.Dial(t, l.At)
		c.HearsReset(t)
		const nothing = `bytes_sent=0 bytes_recv=0 duration="…"`
		if p.serverNode == nil {
			p.checkLines(t, local(c), l.At, "error", nothing+` error="io error: Connection refused (os error 111)"`, "")
			return
		}
		// The client's ztunnel is connected to the server's, and no more than
		// reset. If that comes early enough, it is an error of the connecting.
		if p.clientNode != nil {
			got := p.clientNode.ZT.Line(t, fmt.Sprintf("src.addr=%v ", local(c)))
			if !strings.HasSuffix(got, nothing) && !strings.HasSuffix(got, nothing+` error="io error: Connection reset by peer (os error 104)"`) {
				t.Errorf("the client's side says %s", got)
			}
		}
		got := p.serverNode.ZT.Line(t, fmt.Sprintf("dst.addr=%v ", l.At))
		if want := nothing + ` error="connection failed: Connection refused (os error 111)"`; !strings.HasPrefix(got, "error ") || !strings.HasSuffix(got, want) {
			t.Errorf("the server's side says %s", got)
		}
	})
}

// Much goes through unharmed, both ways at once.
func TestMegabytes(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		c, s := p.pair(t)
		from, to := local(c), remote(c)
		const there, back = 5<<20 + 1, 3<<20 + 7
		var passing sync.WaitGroup
		passing.Go(func() { worldtest.Pass(t, c, s, there, 1) })
		worldtest.Pass(t, s, c, back, 2)
		passing.Wait()
		p.checkLines(t, from, to, "info",
			fmt.Sprintf(`bytes_sent=%d bytes_recv=%d duration="…"`, there, back),
			fmt.Sprintf(`bytes_sent=%d bytes_recv=%d duration="…"`, back, there))
	})
}
