package mesh

import (
	"fmt"
	"net"
	"regexp"
	"testing"

	"github.com/pires/go-proxyproto"

	"ambient-emulator/internal/worldtest"
)

// viaWaypoint is a request that a waypoint without ztunnel answers, and the line
// about it.
func viaWaypoint(t *testing.T, client, waypoint *pod, s *hboneServer, to, service string) {
	t.Helper()
	client.request(t, addr(to), "waypoint\n"+hello)
	client.node.says(t, access{
		src: client, dst: waypoint, addr: waypoint.At(15008), hbone: to, service: service, sent: 11, recv: 20,
	})
	asked := s.asked()
	if len(asked) != 1 {
		t.Fatalf("the waypoint was asked for %v", asked)
	}
	got := asked[0]
	if got.authority != to || got.peer != client.identity() {
		t.Errorf("the waypoint was asked for %s by %s, want %s by %s", got.authority, got.peer, to, client.identity())
	}
	const baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client,service.name=client"
	if got.baggage != baggage {
		t.Errorf("baggage is %q, want %q", got.baggage, baggage)
	}
	forwarded := fmt.Sprintf(`^for="%v:\d+"$`, client.IP4)
	if service != "" {
		forwarded = fmt.Sprintf(`^for="%v:\d+";host=%s$`, client.IP4, service)
	}
	if !regexp.MustCompile(forwarded).MatchString(got.forwarded) {
		t.Errorf("forwarded is %q, want %s", got.forwarded, forwarded)
	}
	if !regexp.MustCompile("^00-[0-9a-f]{32}-[0-9a-f]{16}-00$").MatchString(got.traceparent) {
		t.Errorf("traceparent is %q", got.traceparent)
	}
}

// gateway is a reference to a waypoint.
func gateway(destination string) string {
	return fmt.Sprintf("waypoint: {destination: %q, hboneMtlsPort: 15008}", destination)
}

// A workload's waypoint.
func workloadWaypoint(t *testing.T) {
	m := newMesh(t)
	client, server, waypoint := m.pod(t, "client", local), m.pod(t, "server", local), m.uncaptured(t, "waypoint", remote)
	server.more = []string{gateway("/" + waypoint.IP4.String())}
	m.start(t)
	s := waypoint.waypointServer(t)
	viaWaypoint(t, client, waypoint, s, server.At(8080).String(), "")
}

// A service's waypoint: it is asked for the VIP.
func serviceWaypoint(t *testing.T) {
	m := newMesh(t)
	client, server, waypoint := m.pod(t, "client", local), m.pod(t, "server", local), m.uncaptured(t, "waypoint", remote)
	m.services = service("service", "10.10.0.1", "{80: 80}") + "\n  " + gateway("/"+waypoint.IP4.String())
	server.services = fmt.Sprintf("{default/%s: {80: 80}}", hostname("service"))
	m.start(t)
	s := waypoint.waypointServer(t)
	viaWaypoint(t, client, waypoint, s, "10.10.0.1:80", hostname("service"))
}

// A workload's waypoint that is named as a service.
func serviceWaypointHostname(t *testing.T) {
	m := newMesh(t)
	client, server, waypoint := m.pod(t, "client", local), m.pod(t, "server", local), m.uncaptured(t, "waypoint", remote)
	m.services = service("waypoint", "10.10.0.2", "{15008: 15008}")
	waypoint.services = fmt.Sprintf("{default/%s: {15008: 15008}}", hostname("waypoint"))
	server.more = []string{gateway("default/" + hostname("waypoint"))}
	m.start(t)
	s := waypoint.waypointServer(t)
	viaWaypoint(t, client, waypoint, s, server.At(8080).String(), "")
}

// A workload's waypoint that is named as a workload.
func serviceWaypointWorkloadHostname(t *testing.T) {
	m := newMesh(t)
	client, server, waypoint := m.pod(t, "client", local), m.pod(t, "server", local), m.uncaptured(t, "waypoint", remote)
	waypoint.more = []string{"hostname: waypoint.example.com"}
	server.more = []string{gateway("default/waypoint.example.com")}
	m.start(t)
	s := waypoint.waypointServer(t)
	viaWaypoint(t, client, waypoint, s, server.At(8080).String(), "")
}

// A waypoint that is captured itself, and gets what it is asked for by its ztunnel.
func sandwichWaypointPlain(t *testing.T) {
	m := newMesh(t)
	client, server, waypoint := m.pod(t, "client", local), m.pod(t, "server", local), m.pod(t, "waypoint", local)
	waypoint.more = []string{"applicationTunnel: {protocol: NONE}"}
	server.more = []string{gateway("/" + waypoint.IP4.String())}
	m.start(t)
	server.echoTwice(t)
	waypoint.Serve(t, waypoint.At(8080), func(c *worldtest.Conn) {
		waypoint.forwardTo(c, server.At(8080))
	})
	client.request(t, server.At(8080), hello+hello)
	sandwiched(t, client, server, waypoint, "")
}

// A waypoint that is told by a PROXY header who wants to go where, and that is found
// at a VIP without ports.
func sandwichWaypointProxyProtocol(t *testing.T) {
	m := newMesh(t)
	client, server, waypoint := m.pod(t, "client", local), m.pod(t, "server", local), m.pod(t, "waypoint", local)
	m.services = service("waypoint", "10.10.0.2", "{}")
	waypoint.services = fmt.Sprintf("{default/%s: {}}", hostname("waypoint"))
	waypoint.more = []string{"applicationTunnel: {protocol: PROXY, port: 15088}"}
	server.more = []string{gateway("/10.10.0.2")}
	m.start(t)
	server.echoTwice(t)
	headers := make(chan *proxyproto.Header, 1)
	waypoint.Serve(t, addr("127.0.0.1:15088"), waypoint.forwardByProxyHeader(headers))
	client.request(t, server.At(8080), hello+hello)
	sandwiched(t, client, server, waypoint, hostname("waypoint"))

	h := <-headers
	tlvs, err := h.TLVs()
	if err != nil {
		t.Fatal(err)
	}
	const tlvIdentity = 0xd0
	source := h.SourceAddr.(*net.TCPAddr).AddrPort().Addr()
	if h.Version != 2 || h.DestinationAddr.String() != server.At(8080).String() || source != client.IP4 ||
		len(tlvs) != 1 || tlvs[0].Type != tlvIdentity || string(tlvs[0].Value) != client.identity() {
		t.Errorf("the PROXY header is %+v with %v", h, tlvs)
	}
}

// sandwiched checks the four lines of a request that went through a captured
// waypoint: to it, and from it.
func sandwiched(t *testing.T, client, server, waypoint *pod, service string) {
	t.Helper()
	out, in := direct(client, waypoint)
	out.hbone, in.hbone = server.At(8080).String(), server.At(8080).String()
	onwardOut, onwardIn := direct(waypoint, server)
	client.node.says(t, out, in, onwardOut, onwardIn)
}
