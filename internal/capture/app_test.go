package capture

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"ambient-emulator/internal/worldtest"
)

// packets is a UDP socket in a place.
func packets(t *testing.T, p *worldtest.Place, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	var c *net.UDPConn
	if _, err := p.Do(func() (err error) {
		c, err = net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
		return err
	}); err != nil {
		t.Fatalf("in %s: %v", p.Name, err)
	}
	c.SetDeadline(time.Now().Add(worldtest.Patience))
	t.Cleanup(func() { c.Close() })
	return c
}

func local(c net.Conn) netip.AddrPort  { return c.LocalAddr().(*net.TCPAddr).AddrPort() }
func remote(c net.Conn) netip.AddrPort { return c.RemoteAddr().(*net.TCPAddr).AddrPort() }

// reset ends a connection by a RST.
func reset(t *testing.T, c *worldtest.Conn) {
	t.Helper()
	if err := c.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// talk is a whole exchange over a new connection, which must go well.
func talk(t *testing.T, from *worldtest.Place, to worldtest.Server) {
	t.Helper()
	c := from.Dial(t, to.At)
	c.Say(t, "ping")
	s := to.Accept(t)
	s.Hears(t, "ping")
	s.Say(t, "pong")
	c.Hears(t, "pong")
	c.Close()
	s.HearsEnd(t)
	s.Close()
}
