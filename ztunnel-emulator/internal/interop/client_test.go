package interop

import (
	"crypto/x509"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
	"ambient-emulator/ztunnel-emulator/internal/identity/identitytest"
)

// denyStranger is a policy of the namespace.
const denyStranger = `
- name: no-strangers
  namespace: default
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/default/sa/stranger]`

// whatever is said of a client in its tunnel, and what ztunnel makes of it.
const (
	baggage   = "k8s.cluster.name=far,k8s.namespace.name=away,k8s.job.name=cleaner,service.name=cleaner-app,service.version=v7,cloud.region=r1,cloud.availability_zone=z1"
	forwarded = `for="192.0.2.9:4711";host=server.default.svc.cluster.local`
	trace     = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00"
)

// TestClient: h2 calls pods at their 15008.
func TestClient(t *testing.T) {
	t.Parallel()
	served, from := newPod(t, 2, "server"), newPod(t, 3, "client")
	n := newNode(t, served)
	n.policies = denyStranger
	n.start(t, served)
	about := map[string]any{
		"to": served.At(15008).String(), "root": n.ca.root(), "pem": n.ca.of(t, "client"), "identity": idOf("server").String(),
		"stranger": n.ca.of(t, "stranger"), "app": served.Serve(t, served.At(0), echo).At.String(),
	}
	// start starts a case, with more about it.
	start := func(t *testing.T, what string, more map[string]any) *peer {
		t.Helper()
		all := maps.Clone(about)
		maps.Copy(all, more)
		return startPeer(t, from, "client.py", what, all)
	}
	app := func(l worldtest.Server) map[string]any { return map[string]any{"app": l.At.String()} }

	for _, what := range []string{"plain", "trailers", "goes_away", "no_alpn", "many", "small_windows"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			start(t, what, nil).isContent(t)
		})
	}
	t.Run("headers", func(t *testing.T) {
		t.Parallel()
		to := served.Serve(t, served.At(0), echo).At
		start(t, "headers", map[string]any{
			"app":     to.String(),
			"headers": [][2]string{{"baggage", baggage}, {"forwarded", forwarded}, {"traceparent", trace}},
			"baggage": "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=server-deployed,service.name=server-app,service.version=v1",
		}).isContent(t)
		// Nobody in the configuration has the client's address, so it is who it says.
		line := n.ZT.Line(t, "dst.hbone_addr="+to.String())
		for _, part := range []string{
			fmt.Sprintf("info access connection complete src.addr=%v:", from.IP4),
			fmt.Sprintf(` src.workload="cleaner-app" src.namespace="away" src.identity=%q src.cluster="far" `, idOf("client")),
			fmt.Sprintf(` dst.addr=%v dst.hbone_addr=%v dst.service="server.default.svc.cluster.local" dst.workload="server" dst.namespace="default" dst.identity=%q dst.cluster="Kubernetes" direction="inbound"`,
				served.At(15008), to, idOf("server")),
			` bytes_sent=4 bytes_recv=4 duration="…"`,
		} {
			if !strings.Contains(line, part) {
				t.Errorf("the line is\n%s\nand has not\n%s", line, part)
			}
		}
	})
	t.Run("client ends first", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		c := start(t, "client_ends", app(l))
		s := l.Accept(t)
		s.Hears(t, "question")
		s.HearsEnd(t)
		s.Say(t, "answer")
		s.Close()
		c.isContent(t)
	})
	t.Run("application ends first", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		c := start(t, "app_ends", app(l))
		s := l.Accept(t)
		s.Say(t, "question")
		must(t, s.CloseWrite())
		s.Hears(t, "answer")
		s.HearsEnd(t)
		c.isContent(t)
	})
	t.Run("upload", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		c := start(t, "upload", map[string]any{"app": l.At.String(), "size": bulk})
		s := l.Accept(t)
		s.SetDeadline(time.Now().Add(2 * worldtest.Patience))
		crc := crc32.NewIEEE()
		if n, err := io.Copy(crc, s); n != bulk || err != nil {
			t.Errorf("after %d bytes of %d: %v", n, bulk, err)
		}
		s.Say(t, fmt.Sprintf("%08x", crc.Sum32()))
		s.Close()
		c.isContent(t)
	})
	t.Run("download", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		c := start(t, "download", map[string]any{"app": l.At.String(), "size": bulk})
		s := l.Accept(t)
		s.SetDeadline(time.Now().Add(2 * worldtest.Patience))
		crc := crc32.NewIEEE()
		block := make([]byte, 1<<20)
		for i := range bulk / len(block) {
			for j := range block {
				block[j] = byte(i + j + j>>8)
			}
			crc.Write(block)
			if _, err := s.Write(block); err != nil {
				t.Fatal(err)
			}
		}
		must(t, s.CloseWrite())
		c.expect(t, fmt.Sprintf("%08x", crc.Sum32()))
		c.isContent(t)
	})
	t.Run("bad requests", func(t *testing.T) {
		t.Parallel()
		start(t, "bad_requests", map[string]any{"unnamed": "server.default.svc.cluster.local:81"}).isContent(t)
		n.ZT.Line(t, "invalid method: GET")
		n.ZT.Line(t, fmt.Sprintf("ip mismatch: %v != 10.99.99.99", served.IP4))
		n.ZT.WaitLines(t, "there is no port")
	})
	t.Run("by name", func(t *testing.T) {
		t.Parallel()
		served.Serve(t, served.At(8080), echo)
		start(t, "by_name", map[string]any{"name": "server.default.svc.cluster.local:80"}).isContent(t)
	})
	t.Run("denied", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		start(t, "status", map[string]any{"app": l.At.String(), "status": "401"}).isContent(t)
		n.ZT.WaitLines(t, "error access", l.At.String(), "connection closed due to policy rejection: explicitly denied by: default/no-strangers")
	})
	t.Run("application refuses", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		l.Close()
		start(t, "status", map[string]any{"app": l.At.String(), "status": "503"}).isContent(t)
		n.ZT.WaitLines(t, "error access", l.At.String(), "Connection refused (os error 111)")
	})
	for _, r := range []struct {
		name string
		code int
		want func(*worldtest.Conn, *testing.T)
	}{
		{"NO_ERROR", 0, (*worldtest.Conn).HearsEnd},
		{"CANCEL", 8, (*worldtest.Conn).HearsEnd},
		{"INTERNAL_ERROR", 2, (*worldtest.Conn).HearsReset},
		{"PROTOCOL_ERROR", 1, (*worldtest.Conn).HearsReset},
	} {
		t.Run("client resets with "+r.name, func(t *testing.T) {
			t.Parallel()
			l := served.Listen(t, served.At(0))
			c := start(t, "reset", map[string]any{"app": l.At.String(), "code": r.code, "echo": about["app"]})
			s := l.Accept(t)
			s.Hears(t, "first part")
			s.Say(t, "go")
			r.want(s, t)
			s.Close()
			c.isContent(t)
		})
	}
	t.Run("application resets", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		c := start(t, "app_resets", map[string]any{"app": l.At.String(), "echo": about["app"]})
		s := l.Accept(t)
		s.Hears(t, "reset, please")
		must(t, s.SetLinger(0))
		s.Close()
		c.isContent(t)
	})
	t.Run("client leaves", func(t *testing.T) {
		t.Parallel()
		l := served.Listen(t, served.At(0))
		c := start(t, "leave", app(l))
		s := l.Accept(t)
		s.Hears(t, "bye")
		s.HearsEnd(t)
		s.Close()
		c.isContent(t)
	})
	t.Run("certificates", func(t *testing.T) {
		t.Parallel()
		id := idOf("client")
		other := newCA(t)
		start(t, "certificates", map[string]any{"certificates": [][3]string{
			{"none", "", "TLSV13_ALERT_CERTIFICATE_REQUIRED"},
			{"other root", other.sign(t, identitytest.Good(id)), "TLSV1_ALERT_UNKNOWN_CA"},
			{"expired", n.ca.sign(t, identitytest.Expired(id)), "SSLV3_ALERT_CERTIFICATE_EXPIRED"},
			{"not yet valid", n.ca.sign(t, identitytest.NotYetValid(id)), "SSLV3_ALERT_CERTIFICATE_EXPIRED"},
			{"no SAN", n.ca.sign(t, identitytest.NoSAN()), "SSLV3_ALERT_BAD_CERTIFICATE"},
			{"only DNS", n.ca.sign(t, identitytest.OnlyDNS(id)), "SSLV3_ALERT_BAD_CERTIFICATE"},
			{"other trust domain", n.ca.sign(t, identitytest.OtherDomain(id)), "SSLV3_ALERT_BAD_CERTIFICATE"},
			{"for servers", n.ca.sign(t, identitytest.OnlyUsage(id, x509.ExtKeyUsageServerAuth)), "SSLV3_ALERT_BAD_CERTIFICATE"},
		}}).isContent(t)
		n.ZT.Line(t, "warn access", "connection failed", "tls handshake error: ", "certificate signed by unknown authority")
		n.ZT.WaitLines(t, "warn access", "connection failed", "expected trust domain")
		n.ZT.WaitLines(t, "warn access", "connection failed", "certificate has expired")
	})
}

// bulk is a transfer that needs each window many times.
const bulk = 112 << 20

// TestGoAway: ztunnel ends while a stream is open.
func TestGoAway(t *testing.T) {
	t.Parallel()
	served, from := newPod(t, 2, "server"), newPod(t, 3, "client")
	n := newNode(t, served)
	n.Env = append(n.Env, "CONNECTION_TERMINATION_DEADLINE=15s")
	n.start(t, served)
	c := startPeer(t, from, "client.py", "goaway", map[string]any{
		"to": served.At(15008).String(), "root": n.ca.root(), "pem": n.ca.of(t, "client"), "app": served.Serve(t, served.At(0), echo).At.String(),
	})
	c.expect(t, "open")
	n.ZT.Signal(unix.SIGTERM)
	c.isContent(t)
	n.ZT.End(t, 0)
}
