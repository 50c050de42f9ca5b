package workload

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// cast is who there is in most of these tests.
const cast = `
workloads:
- {uid: client, name: client, namespace: demo, serviceAccount: client, trustDomain: td, node: here, workloadIps: [10.0.0.1], protocol: HBONE, services: {}}
- {uid: hbone, name: hbone, namespace: demo, serviceAccount: hbone, trustDomain: td, node: there, workloadIps: [10.0.0.2], protocol: HBONE, services: {demo/svc: {80: 8080}}}
- {uid: near, name: near, namespace: demo, serviceAccount: near, trustDomain: td, node: here, workloadIps: [10.0.0.3], protocol: HBONE, services: {}}
- {uid: plain, name: plain, namespace: demo, serviceAccount: plain, trustDomain: td, node: there, workloadIps: [10.0.0.4], services: {demo/plain: {80: 8080}}}
- {uid: behind, name: behind, namespace: demo, serviceAccount: behind, trustDomain: td, workloadIps: [10.0.0.5, "fd00::5"], protocol: HBONE, services: {demo/behind: {}},
   waypoint: {destination: /10.0.9.1, hboneMtlsPort: 15008}}
- {uid: behind-host, name: behind-host, namespace: demo, trustDomain: td, workloadIps: [10.0.0.6], protocol: HBONE, services: {},
   waypoint: {destination: demo/waypoint.demo, hboneMtlsPort: 15008}}
- {uid: behind-workload, name: behind-workload, namespace: demo, trustDomain: td, workloadIps: [10.0.0.7], protocol: HBONE, services: {},
   waypoint: {destination: demo/wp.host, hboneMtlsPort: 15009}}
- {uid: behind-nothing, name: behind-nothing, namespace: demo, trustDomain: td, workloadIps: [10.0.0.8], protocol: HBONE, services: {},
   waypoint: {destination: demo/nowhere, hboneMtlsPort: 15008}}
- {uid: behind-no-ip, name: behind-no-ip, namespace: demo, trustDomain: td, workloadIps: [10.0.0.9], protocol: HBONE, services: {},
   waypoint: {destination: /10.0.9.99, hboneMtlsPort: 15008}}
- {uid: behind-vip, name: behind-vip, namespace: demo, trustDomain: td, workloadIps: [10.0.0.10], protocol: HBONE, services: {},
   waypoint: {destination: /10.1.0.9, hboneMtlsPort: 15008}}
- {uid: host, name: host, namespace: demo, serviceAccount: host, trustDomain: td, networkMode: HostNetwork, workloadIps: [10.9.0.1], services: {demo/host: {80: 8080}}}
- {uid: dual, name: dual, namespace: demo, serviceAccount: dual, trustDomain: td, workloadIps: [10.0.0.20, "fd00::20", 10.0.0.21], protocol: HBONE, services: {demo/dual: {80: 8080}, demo/dual6: {80: 8080}, demo/dual4: {80: 8080}}}
- {uid: nowhere, name: nowhere, namespace: demo, hostname: '', workloadIps: ["fd00::30"], services: {}}
- {uid: tcp, name: tcp, namespace: demo, trustDomain: td, workloadIps: [10.0.0.23], services: {}}
- {uid: named, name: named, namespace: demo, trustDomain: td, hostname: named.example, workloadIps: [], protocol: HBONE, services: {demo/named: {80: 8080}}}
- {uid: remote, name: remote, namespace: demo, trustDomain: td, network: far, workloadIps: [], protocol: HBONE, services: {demo/remote: {80: 8080}}, networkGateway: {destination: far/10.8.0.1, hboneMtlsPort: 15008}}
- {uid: stranded, name: stranded, namespace: demo, trustDomain: td, network: far, workloadIps: [10.7.0.1], protocol: HBONE, services: {demo/stranded: {80: 8080}}}
- {uid: lost, name: lost, namespace: demo, trustDomain: td, network: far, workloadIps: [], services: {demo/lost: {80: 8080}}, networkGateway: {destination: far/10.8.0.9, hboneMtlsPort: 15008}}
- {uid: lost-host, name: lost-host, namespace: demo, trustDomain: td, network: far, workloadIps: [], services: {demo/lost-host: {80: 8080}}, networkGateway: {destination: demo/gw, hboneMtlsPort: 15009}}
- {uid: gw, name: gw, namespace: far, serviceAccount: gw, trustDomain: td, network: far, workloadIps: [10.8.0.1], services: {}}
- {uid: wp, name: wp, namespace: demo, serviceAccount: waypoint, trustDomain: td, hostname: wp.host, workloadIps: [10.0.9.1, "fd00::9:1"], protocol: HBONE, services: {demo/waypoint.demo: {15008: 15018}}}
- {uid: far-wp, name: far-wp, namespace: demo, serviceAccount: waypoint, trustDomain: td, network: far, workloadIps: [], services: {demo/far-waypoint: {15008: 15008}}, networkGateway: {destination: far/10.8.0.1, hboneMtlsPort: 15008}}
- {uid: sandwich, name: sandwich, namespace: demo, serviceAccount: waypoint, trustDomain: td, workloadIps: [10.0.9.2], protocol: HBONE, services: {demo/sandwich: {}}, applicationTunnel: {protocol: PROXY, port: 15088}}
services:
- {name: svc, namespace: demo, hostname: svc, vips: [/10.1.0.1], ports: {80: 80}, subjectAltNames: ["spiffe://td/ns/demo/sa/alias", "bad", "spiffe://td/ns/demo/sa/hbone"]}
- {name: plain, namespace: demo, hostname: plain, vips: [/10.1.0.2], ports: {80: 80}}
- {name: behind, namespace: demo, hostname: behind, vips: [/10.1.0.3], ports: {80: 8080}}
- {name: waypointed, namespace: demo, hostname: waypointed, vips: [/10.1.0.4], ports: {80: 80}, waypoint: {destination: /10.0.9.1, hboneMtlsPort: 15008}}
- {name: waypointed6, namespace: demo, hostname: waypointed6, vips: ["/fd01::4"], ports: {80: 80}, waypoint: {destination: /10.0.9.1, hboneMtlsPort: 15008}}
- {name: by-host, namespace: demo, hostname: by-host, vips: [/10.1.0.5, "/fd01::5"], ports: {80: 80}, waypoint: {destination: demo/waypoint.demo, hboneMtlsPort: 15008}}
- {name: empty, namespace: demo, hostname: empty, vips: [/10.1.0.6], ports: {80: 80}}
- {name: pass, namespace: demo, hostname: pass, vips: [/10.1.0.7], ports: {80: 80}, loadBalancer: {routingPreferences: [], mode: Passthrough, healthPolicy: AllowAll}}
- {name: pass-waypoint, namespace: demo, hostname: pass-waypoint, vips: [/10.1.0.8], ports: {80: 80}, waypoint: {destination: /10.0.9.1, hboneMtlsPort: 15008}, loadBalancer: {routingPreferences: [], mode: Passthrough, healthPolicy: AllowAll}}
- {name: waypoint, namespace: demo, hostname: waypoint.demo, vips: [/10.1.0.9], ports: {15008: 15008}, subjectAltNames: ["spiffe://td/ns/demo/sa/gateway"]}
- {name: host, namespace: demo, hostname: host, vips: [/10.1.0.10], ports: {80: 80}}
- {name: dual, namespace: demo, hostname: dual, vips: [/10.1.0.11, "/fd01::11"], ports: {80: 80}}
- {name: dual4, namespace: demo, hostname: dual4, vips: ["/fd01::12"], ports: {80: 80}, ipFamilies: IPv4}
- {name: dual6, namespace: demo, hostname: dual6, vips: [/10.1.0.13], ports: {80: 80}, ipFamilies: IPv6}
- {name: named, namespace: demo, hostname: named, vips: [/10.1.0.14], ports: {80: 80}}
- {name: remote, namespace: demo, hostname: remote, vips: [/10.1.0.15], ports: {80: 80}}
- {name: stranded, namespace: demo, hostname: stranded, vips: [/10.1.0.16], ports: {80: 80}}
- {name: lost, namespace: demo, hostname: lost, vips: [/10.1.0.17], ports: {80: 80}}
- {name: lost-host, namespace: demo, hostname: lost-host, vips: [/10.1.0.18], ports: {80: 80}}
- {name: far-waypointed, namespace: demo, hostname: far-waypointed, vips: [/10.1.0.19], ports: {80: 80}, waypoint: {destination: demo/far-waypoint, hboneMtlsPort: 15008}}
- {name: far-waypoint, namespace: demo, hostname: far-waypoint, vips: [], ports: {15008: 15008}}
- {name: no-waypoint, namespace: demo, hostname: no-waypoint, vips: [/10.1.0.20], ports: {80: 80}, waypoint: {destination: demo/empty, hboneMtlsPort: 80}}
- {name: sandwich, namespace: demo, hostname: sandwich, vips: [/10.1.0.21], ports: {}}
- {name: in-sandwich, namespace: demo, hostname: in-sandwich, vips: [/10.1.0.22], ports: {80: 80}, waypoint: {destination: /10.1.0.21, hboneMtlsPort: 15008}}
- {name: to-nowhere, namespace: demo, hostname: to-nowhere, vips: [/10.1.0.24], ports: {80: 80}, waypoint: {destination: demo/only4, hboneMtlsPort: 80}}
- {name: only4, namespace: demo, hostname: only4, vips: [], ports: {80: 80}, ipFamilies: IPv4, endpoints: {nowhere: {workloadUid: nowhere, port: {}}}}
- {name: hidden, namespace: prod, hostname: hidden, vips: [/10.1.0.23], ports: {80: 80}, visibility: Namespace}
- {name: gw, namespace: demo, hostname: gw, vips: [], ports: {15009: 15008}, endpoints: {gw: {workloadUid: gw, port: {15009: 15008}}}}
- {name: shadow, namespace: demo, hostname: shadow, vips: [/10.0.0.4], ports: {80: 80}}
- {name: whole, namespace: demo, hostname: whole, vips: [], cidrVips: [{network: '', cidr: 10.1.1.0/24}], ports: {80: 80}, endpoints: {hbone: {workloadUid: hbone, port: {80: 81}}}}
`

// routeText is a route in one line.
func routeText(r Route, err error) string {
	if err != nil {
		return "error: " + err.Error()
	}
	s := fmt.Sprintf("%s %s", r.Protocol, r.NextHop)
	if r.Authority != "" {
		s += " for " + r.Authority
	}
	if r.Workload != nil {
		s += " at " + r.Workload.Name
	}
	if r.Service != nil {
		s += " of " + r.Service.Name
	}
	for i, id := range r.Identities {
		s += []string{" as ", " or "}[min(i, 1)] + strings.TrimPrefix(id, "spiffe://td/ns/demo/sa/")
	}
	return s
}

func TestRoute(t *testing.T) {
	s := parse(t, cast)
	for _, c := range []struct{ name, dst, want string }{
		{"B: unknown", "192.0.2.1:80", "TCP 192.0.2.1:80"},
		{"B: unknown, mapped", "[::ffff:192.0.2.1]:80", "TCP 192.0.2.1:80"},
		{"B: passthrough", "10.1.0.7:80", "TCP 10.1.0.7:80 of pass"},
		{"B: passthrough, any port", "10.1.0.7:81", "TCP 10.1.0.7:81 of pass"},
		{"A: passthrough, with a waypoint", "10.1.0.8:80", "HBONE 10.0.9.1:15008 for 10.1.0.8:80 at wp of pass-waypoint as waypoint"},
		{"B: a node's address", "10.9.0.1:80", "TCP 10.9.0.1:80"},
		{"B: a service that is hidden from us", "10.1.0.23:80", "TCP 10.1.0.23:80"},

		{"A: waypoint by address", "10.1.0.4:80", "HBONE 10.0.9.1:15008 for 10.1.0.4:80 at wp of waypointed as waypoint"},
		{"A: any port", "10.1.0.4:9999", "HBONE 10.0.9.1:15008 for 10.1.0.4:9999 at wp of waypointed as waypoint"},
		{"A: of the other family", "[fd01::4]:80", "HBONE 10.0.9.1:15008 for [fd01::4]:80 at wp of waypointed6 as waypoint"},
		{"A: waypoint by hostname", "10.1.0.5:80", "HBONE 10.0.9.1:15018 for 10.1.0.5:80 at wp of by-host as gateway or waypoint"},
		{"A: waypoint by hostname, our family", "[fd01::5]:80", "HBONE [fd00::9:1]:15018 for [fd01::5]:80 at wp of by-host as gateway or waypoint"},
		{"A: no port, but an application tunnel", "10.1.0.22:80", "HBONE 10.0.9.2:15008 for 10.1.0.22:80 at sandwich of in-sandwich as waypoint"},
		{"A: a waypoint without endpoints", "10.1.0.20:80", "error: unknown waypoint: waypoint demo/empty not found"},
		{"A': a waypoint on another network", "10.1.0.19:80", `error: double HBONE is not built yet: far-waypointed:80 on the network "far", through its gateway 10.8.0.1:15008`},

		{"A: a waypoint of a family that its service forbids", "10.1.0.24:80", "error: no valid routing destination for workload: nowhere"},

		{"C: no endpoints", "10.1.0.6:80", "error: no healthy upstream: 10.1.0.6:80"},
		{"C: no such port", "10.1.0.1:81", "error: no healthy upstream: 10.1.0.1:81"},

		{"D: another network", "10.1.0.15:80", `error: double HBONE is not built yet: remote:80 on the network "far", through its gateway 10.8.0.1:15008`},
		{"D: no gateway", "10.1.0.16:80", "error: no valid routing destination for workload: stranded"},
		{"D: an unknown gateway", "10.1.0.17:80", "error: unknown network gateway: network gateway far/10.8.0.9 not found"},
		{"D: a gateway by hostname", "10.1.0.18:80", `error: double HBONE is not built yet: lost-host:80 on the network "far", through its gateway 10.8.0.1:15008`},

		{"E: waypoint by address", "10.0.0.5:80", "HBONE 10.0.9.1:15008 for 10.0.0.5:80 at wp as waypoint"},
		{"E: of the other family", "[fd00::5]:80", "HBONE 10.0.9.1:15008 for [fd00::5]:80 at wp as waypoint"},
		{"E: waypoint by hostname of a service", "10.0.0.6:80", "HBONE 10.0.9.1:15018 for 10.0.0.6:80 at wp as gateway or waypoint"},
		{"E: waypoint by hostname of a workload", "10.0.0.7:80", "HBONE 10.0.9.1:15009 for 10.0.0.7:80 at wp as waypoint"},
		{"E: waypoint by VIP", "10.0.0.10:80", "HBONE 10.0.9.1:15018 for 10.0.0.10:80 at wp as gateway or waypoint"},
		{"E: an unknown hostname", "10.0.0.8:80", "error: unknown waypoint: waypoint demo/nowhere not found"},
		{"E: an unknown address", "10.0.0.9:80", "error: unknown waypoint: waypoint /10.0.9.99 not found"},
		{"F: through a service, a workload's waypoint does not count", "10.1.0.3:80", "HBONE 10.0.0.5:15008 for 10.0.0.5:8080 at behind of behind as behind"},

		{"F: HBONE", "10.0.0.2:80", "HBONE 10.0.0.2:15008 for 10.0.0.2:80 at hbone as hbone"},
		{"F: HBONE, same node", "10.0.0.3:80", "HBONE 10.0.0.3:15008 for 10.0.0.3:80 at near as near"},
		{"F: ourselves", "10.0.0.1:15001", "HBONE 10.0.0.1:15008 for 10.0.0.1:15001 at client as client"},
		{"F: service", "10.1.0.1:80", "HBONE 10.0.0.2:15008 for 10.0.0.2:8080 at hbone of svc as alias or hbone"},
		{"F: service by CIDR", "10.1.1.77:80", "HBONE 10.0.0.2:15008 for 10.0.0.2:81 at hbone of whole as hbone"},
		{"F': TCP", "10.0.0.23:81", "TCP 10.0.0.23:81 at tcp"},
		// Found as a workload first, it is no service's traffic; then found as a
		// service without endpoints, it is passed on.
		{"B: a workload's address that is also a VIP", "10.0.0.4:81", "TCP 10.0.0.4:81"},
		{"F': service", "10.1.0.2:80", "TCP 10.0.0.4:8080 at plain of plain"},
		{"F': a node's address through a service", "10.1.0.10:80", "TCP 10.9.0.1:8080 at host of host"},

		{"the address that was asked for", "10.0.0.21:80", "HBONE 10.0.0.21:15008 for 10.0.0.21:80 at dual as dual"},
		{"the asked family", "10.1.0.11:80", "HBONE 10.0.0.20:15008 for 10.0.0.20:8080 at dual of dual as dual"},
		{"the asked family, IPv6", "[fd01::11]:80", "HBONE [fd00::20]:15008 for [fd00::20]:8080 at dual of dual as dual"},
		{"the service's family, IPv4", "[fd01::12]:80", "HBONE 10.0.0.20:15008 for 10.0.0.20:8080 at dual of dual4 as dual"},
		{"the service's family, IPv6", "10.1.0.13:80", "HBONE [fd00::20]:15008 for [fd00::20]:8080 at dual of dual6 as dual"},
		{"only a hostname", "10.1.0.14:80", "error: on-demand DNS is not built yet: named has no usable address, only the hostname named.example"},
	} {
		got := routeText(s.Route(Request{Source: s.WorkloadByUID("client"), Client: ip("10.0.0.1"), Dst: ap(c.dst)}))
		if got != c.want {
			t.Errorf("%s: %s\n got %s\nwant %s", c.name, c.dst, got, c.want)
		}
	}
}

func TestRouteErrors(t *testing.T) {
	s := parse(t, cast)
	for dst, want := range map[string]RouteReason{
		"10.1.0.6:80": NoHealthyUpstream, "10.0.0.8:80": UnknownWaypoint, "10.1.0.17:80": UnknownNetworkGateway,
		"10.1.0.16:80": NoDestination, "10.1.0.15:80": DoubleHBONE, "10.1.0.14:80": OnDemandDNS,
	} {
		r, err := s.Route(Request{Source: s.WorkloadByUID("client"), Dst: ap(dst)})
		var re *RouteError
		if !errors.As(err, &re) || re.Reason != want || r.NextHop.IsValid() {
			t.Errorf("%s: %+v, %v; want %s", dst, r, err, want)
		}
	}
}

// A waypoint is not sent to itself for what is behind it.
func TestRouteFromWaypoint(t *testing.T) {
	s := parse(t, cast)
	for _, c := range []struct{ name, dst, client, source, want string }{
		{"the waypoint", "10.0.0.5:80", "10.0.9.1", "wp", "HBONE 10.0.0.5:15008 for 10.0.0.5:80 at behind as behind"},
		{"its other address", "10.0.0.5:80", "fd00::9:1", "wp", "HBONE 10.0.0.5:15008 for 10.0.0.5:80 at behind as behind"},
		{"by hostname of its service", "10.0.0.6:80", "10.0.9.1", "wp", "HBONE 10.0.0.6:15008 for 10.0.0.6:80 at behind-host as spiffe"},
		{"by its own hostname", "10.0.0.7:80", "10.0.9.1", "wp", "HBONE 10.0.0.7:15008 for 10.0.0.7:80 at behind-workload as spiffe"},
		{"by VIP", "10.0.0.10:80", "10.0.9.1", "wp", "HBONE 10.0.0.10:15008 for 10.0.0.10:80 at behind-vip as spiffe"},
		{"its identity, from elsewhere", "10.0.0.5:80", "10.0.9.2", "sandwich", "HBONE 10.0.9.1:15008 for 10.0.0.5:80 at wp as waypoint"},
		{"its address, another identity", "10.0.0.5:80", "10.0.9.1", "client", "HBONE 10.0.9.1:15008 for 10.0.0.5:80 at wp as waypoint"},
		{"a waypoint that is not there", "10.0.0.8:80", "10.0.9.1", "wp", "error: unknown waypoint: waypoint demo/nowhere not found"},
	} {
		got := routeText(s.Route(Request{Source: s.WorkloadByUID(c.source), Client: ip(c.client), Dst: ap(c.dst)}))
		if want := strings.Replace(c.want, "as spiffe", "as ", 1); got != want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, want)
		}
	}
}

// The source's own waypoint is not for what it sends.
func TestRouteSourceWaypoint(t *testing.T) {
	s := parse(t, cast)
	got := routeText(s.Route(Request{Source: s.WorkloadByUID("behind"), Client: ip("10.0.0.5"), Dst: ap("10.0.0.2:80")}))
	if want := "HBONE 10.0.0.2:15008 for 10.0.0.2:80 at hbone as hbone"; got != want {
		t.Errorf("%s; want %s", got, want)
	}
}

// What a destination is depends on the network: for whom it is on ours, and for
// where it leads on the source's.
func TestRouteNetworks(t *testing.T) {
	s := parse(t, `
workloads:
- {uid: client, name: client, namespace: demo, network: net, workloadIps: [10.0.0.1], services: {}}
- {uid: server, name: server, namespace: demo, network: net, workloadIps: [10.0.0.2], services: {demo/svc: {80: 8080}}}
services:
- {name: svc, namespace: demo, hostname: svc, vips: [net/10.1.0.1], ports: {80: 80}}
- {name: empty, namespace: demo, hostname: empty, vips: [net/10.1.0.2], ports: {80: 80}}
`)
	for _, c := range []struct{ network, dst, want string }{
		{"net", "10.1.0.1:80", "TCP 10.0.0.2:8080 at server of svc"},
		{"net", "10.1.0.2:80", "error: no healthy upstream: 10.1.0.2:80"},
		{"", "10.1.0.1:80", "TCP 10.0.0.2:8080 at server of svc"},
		{"", "10.1.0.2:80", "TCP 10.1.0.2:80"},
	} {
		got := routeText(s.Route(Request{Source: s.WorkloadByUID("client"), Dst: ap(c.dst), Network: c.network}))
		if got != c.want {
			t.Errorf("%s on %q: %s; want %s", c.dst, c.network, got, c.want)
		}
	}
}

func TestWeightedWaypoints(t *testing.T) {
	file := func(a, b int) string {
		return fmt.Sprintf(`
workloads:
- {uid: client, name: client, namespace: demo, workloadIps: [10.0.0.1], services: {}}
- {uid: one, name: one, namespace: demo, workloadIps: [10.0.9.1], services: {}}
- {uid: two, name: two, namespace: demo, workloadIps: [10.0.9.2], services: {}}
- {uid: only, name: only, namespace: demo, workloadIps: [10.0.9.3], services: {}}
services:
- {name: svc, namespace: demo, hostname: svc, vips: [/10.1.0.1], ports: {80: 80}, waypoint: {destination: /10.0.9.3, hboneMtlsPort: 15008},
   weightedWaypoints: [{weight: %d, destination: {destination: /10.0.9.1, hboneMtlsPort: 15008}}, {weight: %d, destination: {destination: /10.0.9.2, hboneMtlsPort: 15008}}]}
`, a, b)
	}
	for _, c := range []struct {
		a, b int
		want string // for every number that can be drawn
	}{
		{0, 0, "only"},
		{1, 0, "one"},
		{0, 1, "two"},
		{1, 2, "one two two"},
	} {
		s := parse(t, file(c.a, c.b))
		var got []string
		for i := range max(1, c.a+c.b) {
			r, err := s.Route(Request{Source: s.WorkloadByUID("client"), Dst: ap("10.1.0.1:80"), Random: func(n uint64) uint64 {
				if n != uint64(c.a+c.b) {
					t.Fatalf("drawn below %d", n)
				}
				return uint64(i)
			}})
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, r.Workload.Name)
		}
		if g := strings.Join(got, " "); g != c.want {
			t.Errorf("%d, %d: %s; want %s", c.a, c.b, g, c.want)
		}
	}
}

// Without a source of randomness there is a good one.
func TestRouteRandom(t *testing.T) {
	s := parse(t, balanced("", "", "a", "", "b", ""))
	var seen []string
	for len(seen) < 2 {
		r, err := s.Route(Request{Source: s.WorkloadByUID("client"), Dst: ap("10.1.0.1:80")})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(seen, r.Workload.UID) {
			seen = append(seen, r.Workload.UID)
		}
	}
}

func BenchmarkRoute(b *testing.B) {
	s := parse(b, cast)
	req := Request{Source: s.WorkloadByUID("client"), Client: ip("10.0.0.1"), Dst: ap("10.1.0.1:80")}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Route(req); err != nil {
			b.Fatal(err)
		}
	}
}
