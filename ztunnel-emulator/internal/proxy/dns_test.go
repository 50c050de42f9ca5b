package proxy

import (
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"ambient-emulator/ztunnel-emulator/internal/dns"
)

// Anybody may send an empty datagram in a resolver's name. It is no answer, and no
// reason not to wait for one.
func TestEmptyDatagram(t *testing.T) {
	resolver, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		buf := make([]byte, 512)
		n, from, err := resolver.ReadFrom(buf)
		if err != nil {
			return
		}
		resolver.WriteTo(nil, from)
		buf[2] |= 0x80
		resolver.WriteTo(buf[:n], from)
	}()
	defer func() { resolver.Close(); <-answered }()
	config := &Config{Log: slog.New(slog.DiscardHandler), DNS: dns.Resolvers{Servers: []netip.AddrPort{netip.MustParseAddrPort(resolver.LocalAddr().String())}}}
	p := config.NewPod(Identity{}, func(f func() error) error { return f() }, nil)
	defer p.Close()

	got := make(chan []byte, 1)
	query := []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01")
	p.DNS(query, netip.MustParseAddrPort("127.0.0.1:5"), func(answer []byte) { got <- answer })
	select {
	case answer := <-got:
		if rcode := answer[3] & 15; rcode != 0 {
			t.Errorf("rcode %d, want that of the answer", rcode)
		}
	case <-time.After(10 * time.Second):
		t.Error("no answer")
	}
}
