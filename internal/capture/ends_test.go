package capture

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// There is no way to where the client wants to go: it is reset at once, and the
// access line says which error it was.
func TestUnreachable(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client := newNode(t), pod(t, 2)
		n.Add(t, client, "--capture", form)
		to := netip.AddrPortFrom(netip.MustParseAddr(map[string]string{"redirect": "10.98.0.1", "tproxy": "10.98.0.2"}[form]), 80)
		says := "No route to host (os error 113)"
		if six {
			to = netip.AddrPortFrom(netip.MustParseAddr(map[string]string{"redirect": "fd00:98::1", "tproxy": "fd00:98::2"}[form]), 80)
			says = "Network is unreachable (os error 101)"
		}
		nowhere(t, "unreachable", 2, to.Addr())
		c := client.Dial(t, to)
		c.HearsReset(t)
		want := fmt.Sprintf(`error access connection complete src.addr=%v src.workload="%s" src.namespace="default" dst.addr=%v direction="outbound" bytes_sent=0 bytes_recv=0 duration="…" error="io error: %s"`,
			local(c), client.Name, to, says)
		if got := n.ZT.Line(t, fmt.Sprintf("dst.addr=%v ", to)); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	})
}

// nowhere gives a node a route of the kind to an address: unreachable, which it
// says to its pods, or blackhole.
func nowhere(t *testing.T, kind string, node int, addr netip.Addr) {
	t.Helper()
	world(t).Open(t, fmt.Sprint("node", node)).Run(t, "ip", "route", "add", kind, addr.String())
}

// Nobody answers: after ten seconds the client is reset.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	to := netip.MustParseAddrPort("10.99.0.1:80")
	nowhere(t, "blackhole", 2, to.Addr())
	n, client := newNode(t), pod(t, 2)
	n.Add(t, client, "--capture", "redirect")
	began := time.Now()
	c := client.Dial(t, to)
	c.HearsReset(t)
	if took := time.Since(began); took < 10*time.Second || took > 13*time.Second {
		t.Errorf("the reset came after %v, want 10s", took)
	}
	want := fmt.Sprintf(`error access connection complete src.addr=%v src.workload="%s" src.namespace="default" dst.addr=%v direction="outbound" bytes_sent=0 bytes_recv=0 duration="…" error="io error: timed out"`,
		local(c), client.Name, to)
	if got := n.ZT.Line(t, fmt.Sprintf("dst.addr=%v ", to)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

const drained = `error="connection closed due to connection drain"`

// A pod that is deleted while it connects: the client is reset at once, and not
// when nobody has answered.
func TestPodDeletedWhileConnecting(t *testing.T) {
	t.Parallel()
	to := netip.MustParseAddrPort("10.99.0.2:80")
	nowhere(t, "blackhole", 2, to.Addr())
	n, client := newNode(t, withEnv("RUST_LOG=debug")), pod(t, 2)
	n.Add(t, client, "--capture", "redirect")
	c := client.Dial(t, to)
	n.ZT.Line(t, "connection opened")
	began := time.Now()
	n.Del(t, client)
	c.HearsReset(t)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the reset came after %v", took)
	}
	if got := n.ZT.Line(t, "connection complete"); !strings.HasPrefix(got, "error ") || !strings.HasSuffix(got, " "+drained) {
		t.Errorf("the access line is %s", got)
	}
}

// A pod is deleted in the midst of a transfer: both ends are told, the access line
// says why, and nothing of ours keeps the kernel from freeing the namespace.
func TestPodDeletedInMidTransfer(t *testing.T) {
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			n, client, srv := newNode(t, withEnv("ISTIO_META_DNS_CAPTURE=true")), pod(t, 2), pod(t, 3)
			n.Add(t, client, "--capture", form, "--dns-capture")
			l := srv.Listen(t, srv.At(0))
			c := client.Dial(t, l.At)
			s := l.Accept(t)
			ended := make(chan error, 1)
			go pour(c, ended)
			s.Hears(t, strings.Repeat("\x00", 4<<20))
			idle := client.Dial(t, l.At)
			idleServer := l.Accept(t)

			n.Del(t, client)
			if err := <-ended; err == nil {
				t.Error("the client has not been told")
			}
			for {
				if _, err := s.Read(make([]byte, 64<<10)); err != nil {
					break
				}
			}
			idle.HearsReset(t)
			idleServer.HearsReset(t)
			for _, from := range []net.Conn{c, idle} {
				got := n.ZT.Line(t, fmt.Sprintf("src.addr=%v ", local(from)))
				if !strings.HasPrefix(got, "error ") || !strings.HasSuffix(got, drained) {
					t.Errorf("the access line is %s", got)
				}
			}

			c.Close()
			idle.Close()
			client.Freed(t)
		})
	}
}

// pour writes zeros until that fails.
func pour(c net.Conn, ended chan<- error) {
	b := make([]byte, 64<<10)
	for {
		if _, err := c.Write(b); err != nil {
			ended <- err
			return
		}
	}
}

// ztunnel is killed in mid-traffic: what runs, ends; what comes is refused, not
// let by; and with the next ztunnel all is well again, without anybody's doing.
func TestZtunnelKilled(t *testing.T) {
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			n, client, srv := newNode(t), pod(t, 2), pod(t, 2)
			n.Add(t, client, "--capture", form)
			n.Add(t, srv, "--capture", form)
			l := srv.Listen(t, srv.At(0))
			c := client.Dial(t, l.At)
			s := l.Accept(t)
			ended := make(chan error, 1)
			go pour(c, ended)
			s.Hears(t, strings.Repeat("\x00", 4<<20))

			n.ZT.End(t, unix.SIGKILL)
			if err := <-ended; err == nil {
				t.Error("the client has not been told")
			}
			for {
				if _, err := s.Read(make([]byte, 64<<10)); err != nil {
					break
				}
			}
			if c, err := client.Connect(l.At); err == nil {
				c.Close()
				t.Error("connected while there is no ztunnel")
			}

			n.StartZtunnel(t)
			n.ZT.Says(t, "ready\tpods=2")
			talk(t, client, l)
		})
	}
}

// The application goes and comes back; ztunnel keeps nothing of the old one.
func TestApplicationRestarted(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		l := p.listen(t)
		c := p.client.Dial(t, l.At)
		s := l.Accept(t)
		l.Close()
		s.Close()
		c.HearsEnd(t)
		c.Close()
		gap := p.client.Dial(t, l.At)
		gap.HearsReset(t)
		talk(t, p.client, p.server.Listen(t, l.At))
	})
}

// SIGTERM: no new connections, but those that run may go on until the deadline.
func TestDrain(t *testing.T) {
	t.Parallel()
	const deadline = 1500 * time.Millisecond
	n, client, srv := newNode(t, withEnv("CONNECTION_TERMINATION_DEADLINE="+deadline.String())), pod(t, 2), pod(t, 3)
	n.Add(t, client, "--capture", "redirect")
	l := srv.Listen(t, srv.At(0))
	c := client.Dial(t, l.At)
	s := l.Accept(t)
	ends := client.Dial(t, l.At)
	endsServer := l.Accept(t)

	began := time.Now()
	n.ZT.Signal(unix.SIGTERM)
	worldtest.WaitFor(t, "end of the listeners", func() bool {
		late, err := client.Connect(l.At)
		if err == nil {
			late.Close()
		}
		return err != nil
	})
	c.Say(t, "still here")
	s.Hears(t, "still here")
	s.Say(t, "so am I")
	c.Hears(t, "so am I")
	ends.Close()
	endsServer.HearsEnd(t)
	endsServer.Close()
	if got := n.ZT.Line(t, fmt.Sprintf("src.addr=%v ", local(ends))); !strings.HasPrefix(got, "info ") {
		t.Errorf("of a connection that ends by itself it says %s", got)
	}

	c.HearsReset(t)
	if took := time.Since(began); took < deadline {
		t.Errorf("cut after %v, before the deadline", took)
	}
	s.HearsReset(t)
	n.ZT.End(t, 0)
	want := fmt.Sprintf(`error access connection complete src.addr=%v src.workload="%s" src.namespace="default" dst.addr=%v direction="outbound" bytes_sent=10 bytes_recv=7 duration="…" %s`,
		local(c), client.Name, l.At, drained)
	if got := n.ZT.Line(t, fmt.Sprintf("src.addr=%v ", local(c))); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// With no connection left the end does not wait for the deadline.
func TestDrainOfNothing(t *testing.T) {
	t.Parallel()
	n, client, srv := newNode(t, withEnv("CONNECTION_TERMINATION_DEADLINE=1m")), pod(t, 2), pod(t, 3)
	n.Add(t, client, "--capture", "redirect")
	talk(t, client, srv.Listen(t, srv.At(0)))
	n.ZT.End(t, unix.SIGTERM)
}
