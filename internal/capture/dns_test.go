package capture

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"ambient-emulator/internal/worldtest"
)

// resolver answers every question with one address, over UDP and TCP, and tells
// who has asked.
type resolver struct {
	addr  netip.AddrPort
	asked chan netip.AddrPort
}

// theAnswer is the address that the resolver knows.
var theAnswer = [4]byte{192, 0, 2, 7}

// resolve starts a resolver in a place of its own.
func resolve(t *testing.T, p *worldtest.Place, six bool) resolver {
	t.Helper()
	r := resolver{at(p, six, 53), make(chan netip.AddrPort, 16)}
	go r.overUDP(packets(t, p, r.addr))
	go r.overTCP(p.Listen(t, r.addr))
	return r
}

// asker waits for who asks next.
func (r resolver) asker(t *testing.T) netip.AddrPort {
	t.Helper()
	select {
	case from := <-r.asked:
		return from
	case <-time.After(worldtest.Patience):
		t.Fatal("nobody has asked the resolver")
		panic("not reached")
	}
}

func (r resolver) overUDP(c *net.UDPConn) {
	b := make([]byte, 512)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return // closed
		}
		r.asked <- unmapped(from)
		if answer, err := answerTo(b[:n]); err == nil {
			c.WriteToUDPAddrPort(answer, from)
		}
	}
}

func (r resolver) overTCP(l worldtest.Server) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return // closed
		}
		c.SetDeadline(time.Now().Add(worldtest.Patience))
		r.asked <- remote(c)
		if query, err := readMessage(c); err == nil {
			if answer, err := answerTo(query); err == nil {
				writeMessage(c, answer)
			}
		}
		c.Close()
	}
}

func answerTo(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	m.Response, m.Additionals = true, nil
	m.Answers = []dnsmessage.Resource{{
		Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 60},
		Body:   &dnsmessage.AResource{A: theAnswer},
	}}
	return m.Pack()
}

func readMessage(c net.Conn) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeMessage(c net.Conn, b []byte) error {
	_, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}

// question asks for the address of a name.
func question(t *testing.T, id uint16) []byte {
	t.Helper()
	b, err := (&dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("example.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func checkAnswer(t *testing.T, b []byte, id uint16) {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatalf("%q: %v", b, err)
	}
	if m.ID != id || !m.Response || m.RCode != dnsmessage.RCodeSuccess || len(m.Answers) != 1 || m.Answers[0].Body.(*dnsmessage.AResource).A != theAnswer {
		t.Errorf("the answer is %v", m.GoString())
	}
}

// askUDP asks over UDP, as a stub resolver does it: from a connected socket, which
// takes answers of that server only.
func askUDP(t *testing.T, p *worldtest.Place, server netip.AddrPort, id uint16) {
	t.Helper()
	unspecified := netip.IPv4Unspecified()
	if server.Addr().Is6() {
		unspecified = netip.IPv6Unspecified()
	}
	c := packets(t, p, netip.AddrPortFrom(unspecified, 0))
	defer c.Close()
	if _, err := c.WriteToUDPAddrPort(question(t, id), server); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 512)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	if unmapped(from) != server {
		t.Errorf("the answer comes from %v, and %v was asked", from, server)
	}
	checkAnswer(t, b[:n], id)
}

func askTCP(t *testing.T, p *worldtest.Place, server netip.AddrPort, id uint16) {
	t.Helper()
	c := p.Dial(t, server)
	defer c.Close()
	if err := writeMessage(c, question(t, id)); err != nil {
		t.Fatal(err)
	}
	b, err := readMessage(c)
	if err != nil {
		t.Fatal(err)
	}
	checkAnswer(t, b, id)
}

// resolvConf is a setting of ztunnel: whom it asks.
func resolvConf(t *testing.T, r resolver) func(*worldtest.Node) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, fmt.Appendf(nil, "nameserver %v\n", r.addr.Addr()), 0o644); err != nil {
		t.Fatal(err)
	}
	return func(n *worldtest.Node) { n.Args = append(n.Args, "--resolv-conf", path) }
}

// elsewhere is a server that does not exist, for who asks it and is captured.
func elsewhere(six bool) netip.AddrPort {
	if six {
		return netip.MustParseAddrPort("[fd00:53::53]:53")
	}
	return netip.MustParseAddrPort("10.53.53.53:53")
}

// Captured, a query goes to the node's resolver, whomever the application asks;
// it still leaves from the pod, and the answer seems to come from who was asked.
func TestDNSCaptured(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		client, srv := pod(t, 2), pod(t, 3)
		r := resolve(t, srv, six)
		n := newNode(t, resolvConf(t, r))
		n.Add(t, client, "--capture", form, "--dns-capture")
		for id := uint16(1); id < 4; id++ {
			askUDP(t, client, elsewhere(six), id)
			if from := r.asker(t); from.Addr() != client.IP(six) {
				t.Errorf("over UDP the resolver was asked by %v", from)
			}
			askTCP(t, client, elsewhere(six), id)
			if from := r.asker(t); from.Addr() != client.IP(six) {
				t.Errorf("over TCP the resolver was asked by %v", from)
			}
		}
		// The pod's own resolver stays its own.
		own := resolve(t, client, six)
		askUDP(t, client, own.addr, 7)
		if from := own.asker(t); from.Addr() != client.IP(six) {
			t.Errorf("the pod's own resolver was asked by %v", from)
		}
		if lines := n.ZT.Lines(); len(lines) > 0 {
			t.Errorf("DNS has access lines: %q", lines)
		}
	})
}

// Not captured, a query over UDP goes where it was sent; over TCP it is a
// connection like others.
func TestDNSNotCaptured(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		client, srv := pod(t, 2), pod(t, 3)
		r := resolve(t, srv, six)
		n := newNode(t, resolvConf(t, resolver{addr: elsewhere(six)}))
		n.Add(t, client, "--capture", form)
		askUDP(t, client, r.addr, 1)
		r.asker(t)
		askTCP(t, client, r.addr, 2)
		r.asker(t)
		n.ZT.Line(t, fmt.Sprintf(`dst.addr=%v direction="outbound"`, r.addr))
	})
}

// The resolver is silent, and the pod is deleted: nothing waits for it, and
// nothing keeps the namespace.
func TestPodDeletedWhileResolving(t *testing.T) {
	t.Parallel()
	client, srv := pod(t, 2), pod(t, 3)
	silent := packets(t, srv, srv.At(53))
	silentTCP := srv.Listen(t, srv.At(53))
	n := newNode(t, resolvConf(t, resolver{addr: srv.At(53)}))
	n.Add(t, client, "--capture", "redirect", "--dns-capture")
	c := packets(t, client, netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
	if _, err := c.WriteToUDPAddrPort(question(t, 1), elsewhere(false)); err != nil {
		t.Fatal(err)
	}
	overTCP := client.Dial(t, elsewhere(false))
	if err := writeMessage(overTCP, question(t, 2)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := silent.ReadFromUDPAddrPort(make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	silentTCP.Accept(t)
	began := time.Now()
	n.Del(t, client)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("del took %v", took)
	}
	c.Close()
	overTCP.Close()
	client.Freed(t)
}
