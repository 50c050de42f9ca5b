package capture

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"ambient-emulator/internal/worldtest"
)

// What is not captured does not pass through ztunnel: UDP, and whatever the pod
// says to itself.
func TestUntouched(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client, srv := newNode(t), pod(t, 2), pod(t, 3)
		n.Add(t, client, "--capture", form)
		n.Add(t, srv, "--capture", form)

		// UDP: the ports are those of both, on both sides.
		there := packets(t, srv, at(srv, six, 0))
		to := there.LocalAddr().(*net.UDPAddr).AddrPort()
		here := packets(t, client, at(client, six, 0))
		from := here.LocalAddr().(*net.UDPAddr).AddrPort()
		if _, err := here.WriteToUDPAddrPort([]byte("ping"), to); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 16)
		m, peer, err := there.ReadFromUDPAddrPort(b)
		if err != nil || string(b[:m]) != "ping" || unmapped(peer) != from {
			t.Fatalf("got %q from %v (%v), want it from %v", b[:m], peer, err, from)
		}
		if _, err := there.WriteToUDPAddrPort([]byte("pong"), peer); err != nil {
			t.Fatal(err)
		}
		if m, peer, err = here.ReadFromUDPAddrPort(b); err != nil || string(b[:m]) != "pong" || unmapped(peer) != to {
			t.Fatalf("got %q from %v (%v), want it from %v", b[:m], peer, err, to)
		}

		// The pod itself: by loopback, by its own address, with the ports of both.
		selves := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.5"), client.IP4}
		if six {
			selves = []netip.Addr{netip.IPv6Loopback(), client.IP6}
		}
		for _, ip := range selves {
			l := client.Listen(t, netip.AddrPortFrom(ip, 0))
			c := client.Dial(t, l.At)
			s := l.Accept(t)
			if remote(s) != local(c) {
				t.Errorf("at %v the server sees %v, want %v", ip, remote(s), local(c))
			}
			c.Say(t, "x")
			s.Hears(t, "x")
		}

		// None of it was ztunnel's; what is, has a line on each side.
		talk(t, client, srv.Listen(t, at(srv, six, 0)))
		n.ZT.Line(t, "outbound")
		n.ZT.Line(t, "inbound")
	})
}

// Who calls ztunnel's own ports is refused: it would call itself, for ever.
func TestSelfCalls(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, p, other := newNode(t), pod(t, 2), pod(t, 3)
		n.Add(t, p, "--capture", form)
		loopback := netip.MustParseAddr("127.0.0.1")
		if six {
			loopback = netip.IPv6Loopback()
		}
		for _, tt := range []struct {
			from      *worldtest.Place
			to        netip.Addr
			port      uint16
			direction string
		}{
			{p, p.IP(six), 15001, "outbound"},
			{p, p.IP(six), 15006, "inbound"},
			{p, loopback, 15001, "outbound"},
			{p, loopback, 15006, "inbound"},
			{other, p.IP(six), 15001, "inbound"},
			{other, p.IP(six), 15006, "inbound"},
		} {
			to := netip.AddrPortFrom(tt.to, tt.port)
			c := tt.from.Dial(t, to)
			if b, err := c.Read(make([]byte, 1)); b != 0 || err == nil {
				t.Errorf("from %s to %v: %d bytes, %v", tt.from.Name, to, b, err)
			}
			want := fmt.Sprintf(`warn access connection failed src.addr=%v dst.addr=%v direction="%s" error="attempted recursive call to ourselves"`, local(c), to, tt.direction)
			if got := n.ZT.Line(t, fmt.Sprintf("src.addr=%v ", local(c))); got != want {
				t.Errorf("from %s to %v: got\n%s\nwant\n%s", tt.from.Name, to, got, want)
			}
		}
		// HBONE's port is ztunnel's as it is.
		c := other.Dial(t, at(p, six, 15008))
		c.Hears(t, "ok\n")
	})
}

// One captured pod calls the ztunnel of another: the second one refuses it.
func TestSelfCallsOfAnother(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client, p := newNode(t), pod(t, 2), pod(t, 3)
		n.Add(t, client, "--capture", form)
		n.Add(t, p, "--capture", form)
		for _, port := range []uint16{15001, 15006} {
			to := at(p, six, port)
			c := client.Dial(t, to)
			if b, err := c.Read(make([]byte, 1)); b != 0 || err == nil {
				t.Errorf("to %v: %d bytes, %v", to, b, err)
			}
			n.ZT.Line(t, "connection failed", fmt.Sprintf(`dst.addr=%v direction="inbound" error="attempted recursive call to ourselves"`, to))
		}
	})
}

// A pod that calls itself by an address that leads back to it from outside goes
// through ztunnel twice, and arrives: as itself.
func TestOwnServiceAddress(t *testing.T) {
	t.Parallel()
	for _, form := range forms {
		n, p := newNode(t), pod(t, 2)
		n.Add(t, p, "--capture", form)
		vip := netip.MustParseAddr("10.96.0.1")
		if form == "tproxy" {
			vip = netip.MustParseAddr("10.96.0.2")
		}
		l := p.Listen(t, p.At(0))
		world(t).Open(t, "node2").Run(t, "iptables", "-t", "nat", "-A", "PREROUTING", "-d", vip.String(), "-p", "tcp", "-j", "DNAT", "--to-destination", p.IP4.String())
		// So that the answers come back the same way, as kube-proxy does it.
		world(t).Open(t, "node2").Run(t, "iptables", "-t", "nat", "-A", "POSTROUTING", "-s", p.IP4.String(), "-d", p.IP4.String(), "-j", "MASQUERADE")
		c := p.Dial(t, netip.AddrPortFrom(vip, l.At.Port()))
		s := l.Accept(t)
		c.Say(t, "it is me")
		s.Hears(t, "it is me")
		c.Close()
		s.HearsEnd(t)
		s.Close()
		n.ZT.Line(t, `direction="outbound"`)
		n.ZT.Line(t, `direction="inbound"`)
	}
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
