package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"ambient-emulator/internal/worldtest"
)

// The cases of the real ztunnel's tests/namespaced.rs, by their names there.
//
// Left out, because what they are about is not built:
//
//	double_hbone1, double_hbone2
//	    there is one network
//	test_hbone_metrics_access
//	    needs the metrics server, and ztunnel's own listener on 15008
//
// Of malicious_calls_inpod some cells are left out for the last of these reasons.
func TestNamespaced(t *testing.T) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"local_captured_inpod", func(t *testing.T) { captured(t, local, local) }},
		{"server_uncaptured_inpod", serverUncaptured},
		{"client_uncaptured_inpod", serverUncaptured}, // the same there, name notwithstanding
		{"cross_node_captured_inpod", func(t *testing.T) { captured(t, local, remote) }},
		{"server_uncaptured_dedicated", serverUncapturedDedicated},
		{"client_uncaptured_dedicated", serverUncapturedDedicated}, // the same there, again
		{"cross_node_captured_dedicated", crossNodeCapturedDedicated},
		{"workload_waypoint", workloadWaypoint},
		{"service_waypoint", serviceWaypoint},
		{"service_waypoint_hostname", serviceWaypointHostname},
		{"service_waypoint_workload_hostname", serviceWaypointWorkloadHostname},
		{"sandwich_waypoint_plain", sandwichWaypointPlain},
		{"sandwich_waypoint_proxy_protocol", sandwichWaypointProxyProtocol},
		{"service_loadbalancing", serviceLoadbalancing},
		{"test_ztunnel_shutdown", ztunnelShutdown},
		{"test_server_shutdown", serverShutdown},
		{"test_policy", policyRejects},
		{"hbone_ip_mismatch", hboneIPMismatch},
		{"test_svc_hostname_port", func(t *testing.T) { svcHostnamePort(t, 8080) }},
		{"test_svc_hostname_named_port", func(t *testing.T) { svcHostnamePort(t, 0) }},
		{"malicious_calls_inpod", maliciousCalls},
		{"trust_domain_mismatch_rejected", trustDomainMismatch},
		{"test_prefetch_forget_certs", prefetchForgetCerts},
		{"crl_inbound_rejects_revoked_cert", crlInboundRejects},
		{"crl_outbound_rejects_revoked_cert", crlOutboundRejects},
		{"crl_inbound_terminates_existing_connection_on_revocation", crlInboundTerminates},
		{"crl_outbound_terminates_existing_connection_on_revocation", crlOutboundTerminates},
	} {
		t.Run(c.name, c.run)
	}
}

// captured is a request between pods of which each has a ztunnel. On one node that
// is the same: they too talk through the tunnel.
func captured(t *testing.T, clientOn, serverOn int) {
	m := newMesh(t)
	client, server := m.pod(t, "client", clientOn), m.pod(t, "server", serverOn)
	m.start(t)
	server.echoTwice(t)
	client.request(t, server.At(8080), hello+hello)
	out, in := direct(client, server)
	if client.node == server.node {
		client.node.says(t, out, in)
	} else {
		client.node.says(t, out)
		server.node.says(t, in)
	}
}

func serverUncaptured(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.uncaptured(t, "server", remote)
	m.start(t)
	server.echoTwice(t)
	client.request(t, server.At(8080), hello+hello)
	client.node.says(t, access{src: client, dst: server, addr: server.At(8080), sent: 11, recv: 22})
}

func serviceLoadbalancing(t *testing.T) {
	m := newMesh(t)
	client := m.pod(t, "client", local)
	one, two := m.pod(t, "server1", local), m.pod(t, "server2", remote)
	m.services = service("echo", "10.10.0.1", "{80: 8080}")
	one.services = fmt.Sprintf("{default/%s: {80: 8080}}", hostname("echo"))
	two.services = one.services
	m.start(t)
	one.echoTwice(t)
	two.echoTwice(t)

	count := func() (ones, twos int) {
		for _, line := range lines(client.node.ZT) {
			out1, _ := direct(client, one)
			out2, _ := direct(client, two)
			out1.service, out2.service = hostname("echo"), hostname("echo")
			switch line {
			case out1.String():
				ones++
			case out2.String():
				twos++
			}
		}
		return ones, twos
	}
	lines := func(n int) (ones, twos int) {
		worldtest.WaitFor(t, "access lines", func() bool { ones, twos = count(); return ones+twos >= n })
		return ones, twos
	}
	client.request(t, addr("10.10.0.1:80"), hello+hello)
	if ones, twos := lines(1); ones+twos != 1 {
		t.Errorf("one request went to %d+%d servers", ones, twos)
	}
	for range 50 {
		client.request(t, addr("10.10.0.1:80"), hello+hello)
	}
	ones, twos := lines(51)
	if ones == 0 || twos == 0 {
		t.Errorf("of 51 requests, %d went to one server and %d to the other", ones, twos)
	}
	_, in := direct(client, two)
	in.service = hostname("echo")
	var want []any
	for range twos {
		want = append(want, in)
	}
	two.node.says(t, want...)
}

func hboneIPMismatch(t *testing.T) {
	m := newMesh(t)
	client, server := m.uncaptured(t, "client", remote), m.pod(t, "server", local)
	m.start(t)
	server.echoTwice(t)
	n := client.dialTunnel(t, server)
	if status, _ := n.connect(t, 1, client.At(8080).String()); status != "400" {
		t.Errorf("CONNECT for another address is answered with %s", status)
	}
	server.node.says(t, denied(client, server.At(15008), "inbound", fmt.Sprintf("ip mismatch: %v != %v", server.IP4, client.IP4)))
}

// svcHostnamePort asks for a service by its name; with target 0 its port has a name
// too, and the endpoint says which number that is.
func svcHostnamePort(t *testing.T, target int) {
	m := newMesh(t)
	client, server := m.uncaptured(t, "client", remote), m.pod(t, "server", local)
	m.services = service("server", "10.10.0.1", fmt.Sprintf("{80: %d}", target))
	server.services = fmt.Sprintf("{default/%s: {80: 8080}}", hostname("server"))
	m.start(t)
	server.echoTwice(t)
	n := client.dialTunnel(t, server)
	authority := hostname("server") + ":80"
	status, h := n.connect(t, 1, authority)
	if status != "200" {
		t.Fatalf("CONNECT %s is answered with %s", authority, status)
	}
	const baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=server,service.name=server"
	if got := header(h, "baggage"); got != baggage {
		t.Errorf("the server describes itself as %q, want %q", got, baggage)
	}
	n.talks(t, 1)
	_, in := direct(client, server)
	in.hbone, in.service = authority, hostname("server")
	server.node.says(t, in)
}

// trustDomainMismatch: the client's certificate is of the same CA and of another
// trust domain. It is accepted nowhere.
func trustDomainMismatch(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	client.trustDomain = "clusterset.local"
	m.start(t)
	server.echoTwice(t)
	client.isRefused(t, server.At(8080))
	// The refusal comes after the client's handshake, and a reset may overtake it.
	got := client.node.line(t, "connection complete")
	if !regexp.MustCompile(`^error .* bytes_sent=0 bytes_recv=0 duration="…" error="io error: (remote error: tls: bad certificate|Connection reset by peer \(os error 104\)|Broken pipe \(os error 32\))"$`).MatchString(got) {
		t.Errorf("the client's side says %s", got)
	}
	// And it was one handshake: who is refused does not try again.
	server.node.says(t, denied(client, server.At(15008), "inbound",
		`tls handshake error: peer spiffe://clusterset.local/ns/default/sa/client: expected trust domain "cluster.local"`))
}

// prefetchForgetCerts: who has a certificate, of whom there is nothing to see yet but
// what the log says (the real case looks at the admin server's dump).
func prefetchForgetCerts(t *testing.T) {
	m := newMesh(t)
	one, two, other := m.pod(t, "one", local), m.pod(t, "two", local), m.pod(t, "other", local)
	far := m.pod(t, "far", remote)
	two.account = one.account
	n := one.node
	n.Env = append(n.Env, "RUST_LOG=debug")
	m.start(t)
	const issued, dropped = "certificate issued\t", "certificate dropped"
	count := func(what string, p *pod) (lines int) {
		for line := range strings.Lines(n.ZT.Log()) {
			if strings.Contains(line, what) && strings.Contains(line, fmt.Sprintf("identity=%q", p.identity())) {
				lines++
			}
		}
		return lines
	}
	worldtest.WaitFor(t, "certificates", func() bool { return count(issued, one) > 0 && count(issued, other) > 0 })
	n.del(t, one)
	n.del(t, other)
	worldtest.WaitFor(t, "end of a certificate", func() bool { return count(dropped, other) > 0 })
	if count(dropped, one) != 0 {
		t.Error("a certificate is gone that another pod uses")
	}
	n.del(t, two)
	worldtest.WaitFor(t, "end of the other certificate", func() bool { return count(dropped, one) > 0 })
	for p, want := range map[*pod]int{one: 1, other: 1, far: 0} {
		if got := count(issued, p); got != want {
			t.Errorf("%d certificates for %s, want %d", got, p.Name, want)
		}
	}
}

// Matrix cells of maliciousCalls.
const (
	refused = 'C' // refused or unreachable
	resets  = 'R' // it connects, but there is no exchange
	http400 = 'H'
	leftOut = '-' // see TestNamespaced
)

func maliciousCalls(t *testing.T) {
	m := newMesh(t)
	client, stranger := m.pod(t, "client", local), m.uncaptured(t, "stranger", remote)
	zt := m.nodes[local].home
	m.start(t)
	for _, row := range []struct {
		from *pod
		to   netip.Addr
		want string // for each port
	}{
		{client, zt.IP4, "RRRRR--"},
		{client, client.IP4, "RRRCCCC"},
		{client, netip.MustParseAddr("127.0.0.1"), "RRRCCCC"},
		{stranger, zt.IP4, "CC-CC-H"},
		{stranger, client.IP4, "RRRRRRR"},
	} {
		for i, port := range []uint16{15001, 15006, 15008, 15080, 15000, 15020, 15021} {
			want := row.want[i]
			if want == leftOut {
				continue
			}
			to := netip.AddrPortFrom(row.to, port)
			if got := maliciousCall(row.from, to); got != want {
				t.Errorf("from %s to %v it is %c, want %c", row.from.Name, to, got, want)
			}
		}
	}
	// It has survived all that.
	server := m.uncaptured(t, "server", remote)
	server.echoTwice(t)
	client.request(t, server.At(8080), hello+hello)
}

func maliciousCall(from *pod, to netip.AddrPort) byte {
	c, err := from.Connect(to)
	if err != nil {
		return refused
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(worldtest.Patience))
	c.Write([]byte(hello + "\r\n\r\n"))
	answer := make([]byte, len("HTTP/1.1 400"))
	n, err := c.Read(answer)
	switch {
	case string(answer[:n]) == "HTTP/1.1 400":
		return http400
	case n == 0 && !errors.Is(err, os.ErrDeadlineExceeded), n > 0 && answer[0] == tlsAlert:
		return resets
	}
	return '?' // an answer, or none and no end: neither is ever right
}

const tlsAlert = 21 // the type of a record, RFC 8446, section 5.1
