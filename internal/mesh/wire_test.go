package mesh

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// Between the nodes there is nothing but connections to 15008, and in these nothing
// but TLS.
func TestWire(t *testing.T) {
	m := newMesh(t)
	client, server, neighbour := m.pod(t, "client", local), m.pod(t, "server", remote), m.pod(t, "neighbour", local)
	m.services = service("echo", "10.10.0.1", "{80: 8080}")
	server.services = fmt.Sprintf("{default/%s: {80: 8080}}", hostname("echo"))
	m.start(t)
	server.echoTwice(t)
	client.echoTwice(t)

	wire := m.tap(t, "bridge")
	client.request(t, server.At(8080), hello+hello)
	neighbour.request(t, addr("10.10.0.1:80"), hello+hello)
	server.request(t, client.At(8080), hello+hello)
	client.node.line(t, "direction=\"inbound\"") // all is over
	flows := wire.flows(t)
	if len(flows) != 2*3 { // a tunnel for each pair of pods, each with two directions
		t.Errorf("on the wire there were %d directions of connections, want 6", len(flows))
	}
	for f, text := range flows {
		if f.src.Port() != 15008 && f.dst.Port() != 15008 {
			t.Errorf("on the wire there was %v -> %v", f.src, f.dst)
		}
		if err := onlyTLS(text); err != nil {
			t.Errorf("%v -> %v: %v", f.src, f.dst, err)
		}
		if strings.Contains(string(text), hello) {
			t.Errorf("%v -> %v: what the pods said can be read", f.src, f.dst)
		}
	}

	// Without a mesh it would have been seen.
	plain := m.uncaptured(t, "plain", remote)
	plain.request(t, client.At(8080), hello+hello)
	found := false
	for _, text := range wire.flows(t) {
		found = found || strings.Contains(string(text), hello)
	}
	if !found {
		t.Error("the tap does not see what is said in plaintext")
	}
}

// onlyTLS wants records of TLS, from the first byte to the last: a handshake, and
// then application data (RFC 8446, section 5.1).
func onlyTLS(text []byte) error {
	const changeCipherSpec, handshake, applicationData = 20, 22, 23
	var types []byte
	for at := 0; at < len(text); {
		if len(text)-at < 5 {
			return fmt.Errorf("at byte %d there is half a header", at)
		}
		h := text[at:]
		version, n := binary.BigEndian.Uint16(h[1:]), int(binary.BigEndian.Uint16(h[3:]))
		if !slices.Contains([]byte{changeCipherSpec, handshake, applicationData}, h[0]) || version != tls.VersionTLS12 && version != tls.VersionTLS10 {
			return fmt.Errorf("at byte %d there is no TLS record: % x", at, h[:5])
		}
		types = append(types, h[0])
		at += 5 + n
	}
	// Of TLS 1.3 only the hellos are in the clear.
	if len(types) < 4 || types[0] != handshake || slices.Contains(types[1:], byte(handshake)) {
		return fmt.Errorf("the records are of the types %v", types)
	}
	return nil
}

// tap sees all of IPv4 that comes in at any port of a place. (Asked for IPv4 alone
// the kernel would not show what a bridge passes on.)
type tap struct{ fd int }

func (m *mesh) tap(t *testing.T, name string) tap {
	t.Helper()
	p := m.world.Open(t, name)
	w := tap{-1}
	if _, err := p.Do(func() (err error) {
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		return os.NewSyscallError("socket", err)
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(w.fd) })
	unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	return w
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// flow is one direction of a connection.
type flow struct{ src, dst netip.AddrPort }

// flows takes the packets since the last time: what was said in each direction,
// without what was said twice. Everything must be TCP.
func (w tap) flows(t *testing.T) map[flow][]byte {
	t.Helper()
	flows, next := map[flow][]byte{}, map[flow]uint32{}
	packet := make([]byte, 1<<17)
	for {
		n, from, err := unix.Recvfrom(w.fd, packet, 0)
		if errors.Is(err, unix.EAGAIN) {
			return flows
		}
		if err != nil {
			t.Fatal(err)
		}
		if at := from.(*unix.SockaddrLinklayer); at.Pkttype == unix.PACKET_OUTGOING || at.Protocol != htons(unix.ETH_P_IP) {
			continue
		}
		ip := packet[:n]
		header := int(ip[0]&0xf) * 4
		if ip[9] != unix.IPPROTO_TCP {
			t.Fatalf("on the wire there is a packet of protocol %d", ip[9])
		}
		src, _ := netip.AddrFromSlice(ip[12:16])
		dst, _ := netip.AddrFromSlice(ip[16:20])
		tcp := ip[header:binary.BigEndian.Uint16(ip[2:])]
		f := flow{netip.AddrPortFrom(src, binary.BigEndian.Uint16(tcp)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(tcp[2:]))}
		seq, text := binary.BigEndian.Uint32(tcp[4:]), tcp[int(tcp[12]>>4)*4:]
		const fin, syn = 1, 2
		if tcp[13]&syn != 0 {
			flows[f], next[f] = nil, seq+1
			continue
		}
		if _, ok := next[f]; !ok { // a connection of before
			next[f] = seq
		}
		// Within a machine nothing overtakes anything, but it may be sent again.
		switch behind := int32(next[f] - seq); {
		case behind < 0:
			t.Fatalf("%v -> %v: the tap has missed %d bytes", f.src, f.dst, -behind)
		case int(behind) < len(text):
			flows[f] = append(flows[f], text[behind:]...)
			next[f] = seq + uint32(len(text))
		}
		if tcp[13]&fin != 0 { // it counts as a byte
			next[f] = seq + uint32(len(text)) + 1
		}
	}
}

// Every socket lives in the pod that it belongs to: listeners, tunnels in both
// directions, and what leads to the application. In ztunnel's own place there is
// none but for probes.
func TestSocketsAreInPods(t *testing.T) {
	m := newMesh(t)
	client, server, plain := m.pod(t, "client", local), m.pod(t, "server", remote), m.uncaptured(t, "plain", remote)
	m.start(t)
	server.echoTwice(t)
	plain.echoTwice(t)
	talks(t, client.Dial(t, server.At(8080)))
	talks(t, client.Dial(t, plain.At(8080)))

	for _, p := range []*pod{client, server} {
		for _, listener := range []string{"*:15001", "*:15006", "*:15008", "127.0.0.1:15053"} {
			if n := p.sockets(t, "LISTEN", listener, ".*"); n != 1 {
				t.Errorf("in %s, %d sockets of its ztunnel listen at %s", p.Name, n, listener)
			}
		}
	}
	for _, s := range []struct {
		in       *pod
		from, to string
		what     string
	}{
		{client, client.IP4.String() + `:\d+`, server.At(15008).String(), "the tunnel that it has made"},
		{client, client.IP4.String() + `:\d+`, plain.At(8080).String(), "the connection in plaintext"},
		{server, fmt.Sprintf(`\[::ffff:%v\]:15008`, server.IP4), fmt.Sprintf(`\[::ffff:%v\]:\d+`, client.IP4), "the tunnel to it"},
		{server, client.IP4.String() + `:\d+`, server.At(8080).String(), "the connection to the application, from the client's address"},
	} {
		if n := s.in.sockets(t, "ESTAB", s.from, s.to); n != 1 {
			t.Errorf("in %s there are %d sockets for %s:\n%s", s.in.Name, n, s.what, s.in.Run(t, "ss", "-tnpH"))
		}
	}
	for _, n := range m.nodes {
		if got := n.home.Run(t, "ss", "-tnaH", "sport != :15021"); got != "" {
			t.Errorf("in the place of ztunnel itself there is\n%s", got)
		}
		if got := m.world.Open(t, fmt.Sprint("node", n.number)).Run(t, "ss", "-tnaH"); got != "" {
			t.Errorf("on the node there is\n%s", got)
		}
	}
}

// sockets counts the sockets in the pod, in one state, that belong to its ztunnel,
// between two addresses that are regular expressions.
func (p *pod) sockets(t *testing.T, state, from, to string) (n int) {
	t.Helper()
	is := regexp.MustCompile(fmt.Sprintf(`^%s +\d+ +\d+ +%s +%s .*\bpid=%d,`, state, strings.ReplaceAll(from, "*", `\*`), to, p.node.ZT.Pid))
	for line := range strings.Lines(p.Run(t, "ss", "-tnapH")) {
		if is.MatchString(line) {
			n++
		}
	}
	return n
}

// Certificates change while connections last and others come: nobody notices but
// who looks at the certificates.
func TestCertificateRotation(t *testing.T) {
	m := newMesh(t)
	client, server, probe := m.pod(t, "client", local), m.pod(t, "server", remote), m.uncaptured(t, "probe", local)
	for _, n := range m.nodes {
		n.Env = append(n.Env, "SECRET_TTL=2s", "POOL_MAX_STREAMS_PER_CONNECTION=2") // so that there are new tunnels all the time
	}
	m.start(t)
	server.echoTwice(t)
	c := client.Dial(t, server.At(8080))
	seen := map[string]bool{}
	rounds := 0
	for began := time.Now(); time.Since(began) < 5*time.Second || len(seen) < 4; rounds++ {
		if time.Since(began) > 20*time.Second {
			t.Fatalf("in %v there were %d certificates", time.Since(began), len(seen))
		}
		c.SetDeadline(time.Now().Add(worldtest.Patience))
		talks(t, c)
		client.request(t, server.At(8080), hello+hello)
		n := probe.dialTunnel(t, server)
		cert := n.tls.ConnectionState().PeerCertificates[0]
		n.tls.NetConn().Close()
		seen[cert.SerialNumber.String()] = true
		if left := time.Until(cert.NotAfter); left > 2*time.Second || left < 0 {
			t.Errorf("a certificate that is good for %v more", left)
		}
	}
	c.Close()
	out, in := direct(client, server)
	long, longIn := out, in
	long.sent, long.recv, longIn.sent, longIn.recv = rounds*11, rounds*22, rounds*22, rounds*11
	outs, ins := []any{long}, []any{longIn}
	for range rounds {
		outs, ins = append(outs, out), append(ins, in)
	}
	client.node.says(t, outs...)
	server.node.says(t, ins...)
}
