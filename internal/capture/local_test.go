package capture

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
)

// What is not captured does not pass through ztunnel: UDP, and whatever the pod
// says to itself.
func TestUntouched(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client, srv := newNode(t), pod(t, 2), pod(t, 3)
		n.add(t, client, "--capture", form)
		n.add(t, srv, "--capture", form)

		// UDP: the ports are those of both, on both sides.
		there := srv.packets(t, netip.AddrPortFrom(srv.ip(six), 0))
		to := there.LocalAddr().(*net.UDPAddr).AddrPort()
		here := client.packets(t, netip.AddrPortFrom(client.ip(six), 0))
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
		selves := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.5"), client.ip4}
		if six {
			selves = []netip.Addr{netip.IPv6Loopback(), client.ip6}
		}
		for _, ip := range selves {
			l := client.listen(t, ip, 0)
			c := client.dial(t, l.addr)
			s := l.accept(t)
			if remote(s) != local(c) {
				t.Errorf("at %v the server sees %v, want %v", ip, remote(s), local(c))
			}
			say(t, c, "x")
			hears(t, s, "x")
		}

		// None of it was ztunnel's; what is, has a line on each side.
		talk(t, client, srv.listen(t, srv.ip(six), 0))
		n.zt.line(t, "outbound")
		n.zt.line(t, "inbound")
	})
}

// Who calls ztunnel's own ports is refused: it would call itself, for ever.
func TestSelfCalls(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, p, other := newNode(t), pod(t, 2), pod(t, 3)
		n.add(t, p, "--capture", form)
		loopback := netip.MustParseAddr("127.0.0.1")
		if six {
			loopback = netip.IPv6Loopback()
		}
		for _, tt := range []struct {
			from      *place
			to        netip.Addr
			port      uint16
			direction string
		}{
			{p, p.ip(six), 15001, "outbound"},
			{p, p.ip(six), 15006, "inbound"},
			{p, loopback, 15001, "outbound"},
			{p, loopback, 15006, "inbound"},
			{other, p.ip(six), 15001, "inbound"},
			{other, p.ip(six), 15006, "inbound"},
		} {
			to := netip.AddrPortFrom(tt.to, tt.port)
			c := tt.from.dial(t, to)
			if b, err := c.Read(make([]byte, 1)); b != 0 || err == nil {
				t.Errorf("from %s to %v: %d bytes, %v", tt.from.name, to, b, err)
			}
			want := fmt.Sprintf(`warn access connection failed src.addr=%v dst.addr=%v direction="%s" error="attempted recursive call to ourselves"`, local(c), to, tt.direction)
			if got := n.zt.line(t, fmt.Sprintf("src.addr=%v ", local(c))); got != want {
				t.Errorf("from %s to %v: got\n%s\nwant\n%s", tt.from.name, to, got, want)
			}
		}
		// HBONE's port is ztunnel's as it is.
		c := other.dial(t, netip.AddrPortFrom(p.ip(six), 15008))
		hears(t, c, "ok\n")
	})
}

// One captured pod calls the ztunnel of another: the second one refuses it.
func TestSelfCallsOfAnother(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client, p := newNode(t), pod(t, 2), pod(t, 3)
		n.add(t, client, "--capture", form)
		n.add(t, p, "--capture", form)
		for _, port := range []uint16{15001, 15006} {
			to := netip.AddrPortFrom(p.ip(six), port)
			c := client.dial(t, to)
			if b, err := c.Read(make([]byte, 1)); b != 0 || err == nil {
				t.Errorf("to %v: %d bytes, %v", to, b, err)
			}
			n.zt.line(t, "connection failed", fmt.Sprintf(`dst.addr=%v direction="inbound" error="attempted recursive call to ourselves"`, to))
		}
	})
}

// A pod that calls itself by an address that leads back to it from outside goes
// through ztunnel twice, and arrives: as itself.
func TestOwnServiceAddress(t *testing.T) {
	t.Parallel()
	for _, form := range forms {
		n, p := newNode(t), pod(t, 2)
		n.add(t, p, "--capture", form)
		vip := netip.MustParseAddr("10.96.0.1")
		if form == "tproxy" {
			vip = netip.MustParseAddr("10.96.0.2")
		}
		l := p.listen(t, p.ip4, 0)
		(&place{name: "node2"}).run(t, "iptables", "-t", "nat", "-A", "PREROUTING", "-d", vip.String(), "-p", "tcp", "-j", "DNAT", "--to-destination", p.ip4.String())
		// So that the answers come back the same way, as kube-proxy does it.
		(&place{name: "node2"}).run(t, "iptables", "-t", "nat", "-A", "POSTROUTING", "-s", p.ip4.String(), "-d", p.ip4.String(), "-j", "MASQUERADE")
		c := p.dial(t, netip.AddrPortFrom(vip, l.addr.Port()))
		s := l.accept(t)
		say(t, c, "it is me")
		hears(t, s, "it is me")
		c.Close()
		hearsEnd(t, s)
		s.Close()
		n.zt.line(t, `direction="outbound"`)
		n.zt.line(t, `direction="inbound"`)
	}
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
