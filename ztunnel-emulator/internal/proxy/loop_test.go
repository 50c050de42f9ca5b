package proxy

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"ambient-emulator/ztunnel-emulator/internal/dns"
)

// Without the mark that the pods' rules know, what we send comes back to us. That
// is refused before it has eaten all descriptors.
func TestUnmarkedLoop(t *testing.T) {
	const captured = "127.0.7.7:80" // also what we send
	said := &lines{}
	config := &Config{Log: slog.New(slog.NewTextHandler(said, nil)), KeepAlive: DefaultKeepAlive()}
	p := config.NewPod(Identity{}, func(f func() error) error { return f() }, nil)
	w := &world{}
	t.Cleanup(closePipes)
	w.capture(t, captured, p, PortOutbound)
	c := dial(t, captured)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d connections later: %v", len(p.sessions()), err)
	}
	p.Close()
	said.with(t, "connection failed", errRecursive.Error())
}

// The same of DNS: what we ask of a resolver comes back as a query.
func TestUnmarkedDNSLoop(t *testing.T) {
	const captured = "127.0.7.7:5300"
	said := &lines{}
	config := &Config{
		Log: slog.New(slog.NewTextHandler(said, &slog.HandlerOptions{Level: slog.LevelDebug})), KeepAlive: DefaultKeepAlive(),
		DNS: dns.Resolvers{Servers: []netip.AddrPort{netip.MustParseAddrPort(captured), netip.MustParseAddrPort(captured)}},
	}
	p := config.NewPod(Identity{}, func(f func() error) error { return f() }, nil)
	defer p.Close()
	(&world{}).capture(t, captured, p, PortDNS)
	udp, err := net.ListenPacket("udp", captured)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		buf := make([]byte, 512)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			p.DNS(bytes.Clone(buf[:n]), from.(*net.UDPAddr).AddrPort(), func(answer []byte) { udp.WriteTo(answer, from) })
		}
	}()
	defer func() { udp.Close(); <-served }()

	query := []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01")
	for _, network := range []string{"udp", "tcp"} {
		c, err := net.Dial(network, captured)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		answer := make([]byte, 512)
		if network == "tcp" {
			c.Write([]byte{0, byte(len(query))})
		}
		c.Write(query)
		if network == "tcp" {
			io.ReadFull(c, answer[:2])
		}
		if n, err := c.Read(answer); err != nil || n < 12 || answer[3]&15 != 2 {
			t.Errorf("%s: answer %x, %v, want SERVFAIL", network, answer[:n], err)
		}
	}
	said.with(t, "connection failed", errRecursive.Error())
	if n := strings.Count(said.String(), "dns query"); n > 20 {
		t.Errorf("two queries have become %d", n)
	}
}
