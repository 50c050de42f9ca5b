package interop

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// called is a pod with h2 at its 15008, and what else a case is about.
type called struct {
	*process
	n      *node
	caller *pod
	id     identity.ID
	app    netip.AddrPort // what the caller calls: nobody listens there
	vip    netip.AddrPort // the same, by its service
}

func (s *called) dial(t *testing.T) *net.TCPConn { return s.caller.dial(t, s.app) }

// exchange is a whole exchange with a server that says everything back.
func exchange(t *testing.T, c *net.TCPConn) {
	t.Helper()
	say(t, c, "ping")
	hears(t, c, "ping")
	must(t, c.CloseWrite())
	hearsEnd(t, c)
	c.Close()
}

// TestServer: what a captured pod sends goes to h2, at the 15008 of other pods.
// Each has a pod of its own, but certificates, which have one after the other.
func TestServer(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name string
		test func(*testing.T, *called)
	}{
		{"requests", testRequests},
		{"half_close", testHalfClose},
		{"refuses", testRefuses},
		{"closes", testCloses},
		{"goes_away", testGoesAway},
		{"unprocessed", func(t *testing.T, s *called) { exchange(t, s.dial(t)) }},
		{"resets", testResets},
		{"resets_request", func(t *testing.T, s *called) {
			hearsReset(t, s.dial(t))
			exchange(t, s.dial(t))
		}},
		{"small_windows", testSmallWindows},
		{"few_streams", testFewStreams},
		{"never_acks", func(t *testing.T, s *called) {
			exchange(t, s.dial(t))
			exchange(t, s.dial(t))
		}},
		{"back", testBack},
		{"certificates", testCertificates},
	}
	caller := newPod(t, 2, "caller")
	var peers []*pod
	for _, tc := range cases {
		peers = append(peers, newPod(t, 3, strings.ReplaceAll(tc.name, "_", "-")))
	}
	n := newNode(t, append(peers, caller)...)
	n.start(t, caller)
	for i, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := &called{n: n, caller: caller, id: idOf(peers[i].name), app: peers[i].at(8080), vip: netip.AddrPortFrom(n.vip(i), 80)}
			about := map[string]any{"root": n.ca.root(), "pem": n.ca.of(t, peers[i].name)}
			if tc.name == "certificates" {
				about["certificates"] = s.badCertificates(t)
			}
			s.process = peers[i].peer(t, "server.py", tc.name, about)
			s.expect(t, "ready")
			tc.test(t, s)
			s.isContent(t)
		})
	}
}

// testRequests: what we are in TLS, and what we ask for, to the letter.
func testRequests(t *testing.T, s *called) {
	c := s.dial(t)
	var hello struct {
		Version, ALPN string
		SNI           []*string
		Identity      []string
	}
	s.next(t, &hello)
	if hello.Version != "TLSv1.3" || hello.ALPN != "h2" || len(hello.SNI) != 1 || hello.SNI[0] != nil || !slices.Equal(hello.Identity, []string{idOf("caller").String()}) {
		t.Errorf("the handshake was %+v", hello)
	}
	s.isAsked(t, c, "")
	exchange(t, c)
	c = s.caller.dial(t, s.vip)
	s.isAsked(t, c, ";host=requests.default.svc.cluster.local")
	exchange(t, c)
	line := s.n.zt.line(t, "dst.hbone_addr="+s.app.String(), "dst.service=")
	want := fmt.Sprintf(`info access connection complete src.addr=%v src.workload="caller" src.namespace="default" src.identity=%q src.cluster="Kubernetes" `+
		`dst.addr=%v:15008 dst.hbone_addr=%v dst.service="requests.default.svc.cluster.local" dst.workload="requests" dst.namespace="default" dst.identity=%q dst.cluster="Kubernetes" `+
		`direction="outbound" bytes_sent=4 bytes_recv=4 duration="…"`, c.LocalAddr(), idOf("caller"), s.app.Addr(), s.app, s.id)
	if line != want {
		t.Errorf("the line is\n%s\nwant\n%s", line, want)
	}
}

// isAsked wants the next request to be c's: these fields in this order, and no
// others.
func (s *called) isAsked(t *testing.T, c *net.TCPConn, host string) {
	t.Helper()
	var got [][2]string
	s.next(t, &got)
	want := [][2]string{
		{":method", "CONNECT"},
		{":authority", s.app.String()},
		{"baggage", "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=caller-deployed,service.name=caller-app,service.version=v1"},
		{"forwarded", fmt.Sprintf(`for="%v"%s`, c.LocalAddr(), host)},
	}
	if len(got) != 5 || !slices.Equal(got[:4], want) {
		t.Fatalf("the request is\n%q\nwant\n%q\nand a traceparent", got, want)
	}
	if v := got[4][1]; got[4][0] != "traceparent" || hbone.ParseTraceparent(v) != v || !strings.HasPrefix(v, "00-") || !strings.HasSuffix(v, "-00") {
		t.Errorf("the last field is %q", got[4])
	}
}

func testHalfClose(t *testing.T, s *called) {
	c := s.dial(t)
	hears(t, c, "question")
	hearsEnd(t, c)
	say(t, c, "answer")
	c.Close()
	c = s.dial(t)
	say(t, c, "question")
	must(t, c.CloseWrite())
	hears(t, c, "answer")
	hearsEnd(t, c)
}

func testRefuses(t *testing.T, s *called) {
	for _, status := range []string{"401 Unauthorized", "503 Service Unavailable", "204 No Content"} {
		hearsReset(t, s.dial(t))
		s.n.zt.line(t, "error access", s.app.String(), "http status: "+status)
	}
	exchange(t, s.dial(t))
}

func testCloses(t *testing.T, s *called) {
	for range 2 { // after TLS, and after the request
		c := s.dial(t)
		hearsReset(t, c)
		s.n.zt.line(t, "error access", fmt.Sprintf("src.addr=%v ", c.LocalAddr()))
	}
	c := s.dial(t)
	hears(t, c, "some")
	say(t, c, "more")
	hearsEnd(t, c)
	c.Close()
	exchange(t, s.dial(t))
}

func testGoesAway(t *testing.T, s *called) {
	first := s.dial(t)
	say(t, first, "first")
	s.expect(t, "gone")
	second := s.dial(t)
	say(t, second, "second")
	hears(t, first, "still here")
	say(t, first, "last")
	must(t, first.CloseWrite())
	hearsEnd(t, first)
	exchange(t, second)
}

func testResets(t *testing.T, s *called) {
	for _, hearsIt := range []func(*testing.T, net.Conn){hearsEnd, hearsEnd, hearsReset} {
		c := s.dial(t)
		say(t, c, "some")
		hears(t, c, "more")
		hearsIt(t, c)
		c.Close()
	}
	s.n.zt.line(t, "error access", s.app.String(), "stream error received: unexpected internal error encountered")
	exchange(t, s.dial(t))
}

func testSmallWindows(t *testing.T, s *called) {
	c := s.dial(t)
	const size = 200_000
	say(t, c, strings.Repeat("x", size))
	must(t, c.CloseWrite())
	hears(t, c, fmt.Sprint(size))
	hearsEnd(t, c)
}

func testFewStreams(t *testing.T, s *called) {
	one := s.dial(t)
	say(t, one, "ping")
	hears(t, one, "ping")
	two := s.dial(t)
	s.expect(t, "full")
	exchange(t, s.dial(t))
	exchange(t, two)
	exchange(t, one)
}

// testBack: much goes to h2, which has it all before it says it back.
func testBack(t *testing.T, s *called) {
	c := s.dial(t)
	sent := make(chan uint32, 1)
	go sendBulk(c, sent)
	crc := crc32.NewIEEE()
	if n, err := io.Copy(crc, c); n != bulk || err != nil {
		t.Errorf("after %d bytes of %d: %v", n, bulk, err)
	}
	if crc.Sum32() != <-sent {
		t.Error("other bytes have come back than were sent")
	}
}

func sendBulk(c *net.TCPConn, sum chan<- uint32) {
	crc, block := crc32.NewIEEE(), make([]byte, 1<<20)
	for i := range bulk / len(block) {
		copy(block, bytes.Repeat([]byte{byte(i), byte(i >> 3), 7}, 1000))
		crc.Write(block)
		c.Write(block)
	}
	c.CloseWrite()
	sum <- crc.Sum32()
}

// badCertificates are those that we must not accept, with the alert that says so.
// Since nobody but the pod's identity is expected, a check of names is one of them.
func (s *called) badCertificates(t *testing.T) [][3]string {
	const bad = "SSLV3_ALERT_BAD_CERTIFICATE"
	sign := s.n.ca.sign
	return [][3]string{
		{"other root", newCA(t).sign(t, identitytest.Good(s.id)), bad},
		{"expired", sign(t, identitytest.Expired(s.id)), bad},
		{"not yet valid", sign(t, identitytest.NotYetValid(s.id)), bad},
		{"no SAN", sign(t, identitytest.NoSAN()), bad},
		{"only DNS", sign(t, identitytest.OnlyDNS(s.id)), bad},
		{"other trust domain", sign(t, identitytest.OtherDomain(s.id)), bad},
		{"for clients", sign(t, identitytest.OnlyUsage(s.id, x509.ExtKeyUsageClientAuth)), bad},
		{"somebody else", s.n.ca.of(t, "stranger"), bad},
	}
}

func testCertificates(t *testing.T, s *called) {
	for _, why := range []string{
		"signed by unknown authority", "has expired", "not yet valid", "without a URI SAN: expected", "without a URI SAN: expected",
		"elsewhere.cluster.local/ns/default/sa/certificates: expected", "incompatible key usage", "sa/stranger: expected",
	} {
		c := s.dial(t)
		hearsReset(t, c)
		if line := s.n.zt.line(t, "error access", fmt.Sprintf("src.addr=%v ", c.LocalAddr())); !strings.Contains(line, why) {
			t.Errorf("the line is\n%s\nand has not %q", line, why)
		}
	}
	exchange(t, s.dial(t))
}

// TestSilent: a server that says nothing after TLS keeps who calls it waiting, but
// not ztunnel from ending.
func TestSilent(t *testing.T) {
	t.Parallel()
	caller, silent := newPod(t, 2, "caller"), newPod(t, 3, "silent")
	n := newNode(t, caller, silent)
	n.start(t, caller)
	s := silent.peer(t, "server.py", "silent", map[string]any{"root": n.ca.root(), "pem": n.ca.of(t, "silent")})
	s.expect(t, "ready")
	c := caller.dial(t, silent.at(8080))
	say(t, c, "is anybody there?")
	s.expect(t, "asked")
	n.zt.end(t)
	hearsReset(t, c)
	s.isContent(t)
}
