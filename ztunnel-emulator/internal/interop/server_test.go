package interop

import (
	"crypto/x509"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// called is a pod with h2 at its 15008, and what else a case is about.
type called struct {
	*peer
	n      *node
	caller *worldtest.Place
	id     identity.ID
	app    netip.AddrPort // what the caller calls: nobody listens there
	vip    netip.AddrPort // the same, by its service
}

func (s *called) dial(t *testing.T) *worldtest.Conn { return s.caller.Dial(t, s.app) }

// exchange is a whole exchange with a server that says everything back.
func exchange(t *testing.T, c *worldtest.Conn) {
	t.Helper()
	c.Say(t, "ping")
	c.Hears(t, "ping")
	must(t, c.CloseWrite())
	c.HearsEnd(t)
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
			s.dial(t).HearsReset(t)
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
	var peers []*worldtest.Place
	for _, tc := range cases {
		peers = append(peers, newPod(t, 3, strings.ReplaceAll(tc.name, "_", "-")))
	}
	n := newNode(t, append(peers, caller)...)
	n.start(t, caller)
	for i, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := &called{n: n, caller: caller, id: idOf(peers[i].Name), app: peers[i].At(8080), vip: netip.AddrPortFrom(n.vip(i), 80)}
			about := map[string]any{"root": n.ca.root(), "pem": n.ca.of(t, peers[i].Name)}
			if tc.name == "certificates" {
				about["certificates"] = s.badCertificates(t)
			}
			s.peer = startPeer(t, peers[i], "server.py", tc.name, about)
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
	c = s.caller.Dial(t, s.vip)
	s.isAsked(t, c, ";host=requests.default.svc.cluster.local")
	exchange(t, c)
	line := s.n.ZT.Line(t, "dst.hbone_addr="+s.app.String(), "dst.service=")
	want := fmt.Sprintf(`info access connection complete src.addr=%v src.workload="caller" src.namespace="default" src.identity=%q src.cluster="Kubernetes" `+
		`dst.addr=%v:15008 dst.hbone_addr=%v dst.service="requests.default.svc.cluster.local" dst.workload="requests" dst.namespace="default" dst.identity=%q dst.cluster="Kubernetes" `+
		`direction="outbound" bytes_sent=4 bytes_recv=4 duration="…"`, c.LocalAddr(), idOf("caller"), s.app.Addr(), s.app, s.id)
	if line != want {
		t.Errorf("the line is\n%s\nwant\n%s", line, want)
	}
}

// isAsked wants the next request to be c's: these fields in this order, and no
// others.
func (s *called) isAsked(t *testing.T, c *worldtest.Conn, host string) {
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
	c.Hears(t, "question")
	c.HearsEnd(t)
	c.Say(t, "answer")
	c.Close()
	c = s.dial(t)
	c.Say(t, "question")
	must(t, c.CloseWrite())
	c.Hears(t, "answer")
	c.HearsEnd(t)
}

func testRefuses(t *testing.T, s *called) {
	for _, status := range []string{"401 Unauthorized", "503 Service Unavailable", "204 No Content"} {
		s.dial(t).HearsReset(t)
		s.n.ZT.Line(t, "error access", s.app.String(), "http status: "+status)
	}
	exchange(t, s.dial(t))
}

func testCloses(t *testing.T, s *called) {
	for range 2 { // after TLS, and after the request
		c := s.dial(t)
		c.HearsReset(t)
		s.n.ZT.Line(t, "error access", fmt.Sprintf("src.addr=%v ", c.LocalAddr()))
	}
	c := s.dial(t)
	c.Hears(t, "some")
	c.Say(t, "more")
	c.HearsEnd(t)
	c.Close()
	exchange(t, s.dial(t))
}

func testGoesAway(t *testing.T, s *called) {
	first := s.dial(t)
	first.Say(t, "first")
	s.expect(t, "gone")
	second := s.dial(t)
	second.Say(t, "second")
	first.Hears(t, "still here")
	first.Say(t, "last")
	must(t, first.CloseWrite())
	first.HearsEnd(t)
	exchange(t, second)
}

func testResets(t *testing.T, s *called) {
	end, reset := (*worldtest.Conn).HearsEnd, (*worldtest.Conn).HearsReset
	for _, hears := range []func(*worldtest.Conn, *testing.T){end, end, reset} {
		c := s.dial(t)
		c.Say(t, "some")
		c.Hears(t, "more")
		hears(c, t)
		c.Close()
	}
	s.n.ZT.Line(t, "error access", s.app.String(), "stream error received: unexpected internal error encountered")
	exchange(t, s.dial(t))
}

func testSmallWindows(t *testing.T, s *called) {
	c := s.dial(t)
	const size = 200_000
	c.Say(t, strings.Repeat("x", size))
	must(t, c.CloseWrite())
	c.Hears(t, fmt.Sprint(size))
	c.HearsEnd(t)
}

func testFewStreams(t *testing.T, s *called) {
	one := s.dial(t)
	one.Say(t, "ping")
	one.Hears(t, "ping")
	two := s.dial(t)
	s.expect(t, "full")
	exchange(t, s.dial(t))
	exchange(t, two)
	exchange(t, one)
}

// testBack: much goes to h2, which has it all before it says it back.
func testBack(t *testing.T, s *called) {
	c := s.dial(t)
	worldtest.Pass(t, c, c, bulk, 1)
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
		c.HearsReset(t)
		if line := s.n.ZT.Line(t, "error access", fmt.Sprintf("src.addr=%v ", c.LocalAddr())); !strings.Contains(line, why) {
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
	s := startPeer(t, silent, "server.py", "silent", map[string]any{"root": n.ca.root(), "pem": n.ca.of(t, "silent")})
	s.expect(t, "ready")
	c := caller.Dial(t, silent.At(8080))
	c.Say(t, "is anybody there?")
	s.expect(t, "asked")
	n.ZT.End(t, unix.SIGTERM)
	c.HearsReset(t)
	s.isContent(t)
}
