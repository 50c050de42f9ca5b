package workload

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

const inboundCast = `
workloads:
- {uid: server, name: server, namespace: demo, workloadIps: [10.0.0.2, "fd00::2"], protocol: HBONE, services: {demo/svc: {80: 8080, 82: 8082}, demo/illegal: {80: 15008}}}
- {uid: wp, name: wp, namespace: infra, hostname: wp.host, workloadIps: [10.0.9.1], protocol: HBONE, services: {infra/waypoint: {15008: 15008}}}
- {uid: twin, name: twin, namespace: infra, workloadIps: [10.0.9.1], services: {}}
- {uid: proxy, name: proxy, namespace: demo, workloadIps: [10.0.9.2], protocol: HBONE, services: {}, applicationTunnel: {protocol: PROXY, port: 15088}}
- {uid: portless, name: portless, namespace: demo, workloadIps: [10.0.9.3], protocol: HBONE, services: {}, applicationTunnel: {protocol: PROXY}}
- {uid: none, name: none, namespace: demo, workloadIps: [10.0.9.4], protocol: HBONE, services: {}, applicationTunnel: {protocol: NONE, port: 15099}}
- {uid: by-ip, namespace: demo, workloadIps: [10.0.0.10], services: {}, waypoint: {destination: /10.0.9.1, hboneMtlsPort: 15008}}
- {uid: by-service, namespace: demo, workloadIps: [10.0.0.11], services: {}, waypoint: {destination: infra/waypoint, hboneMtlsPort: 15008}}
- {uid: by-vip, namespace: demo, workloadIps: [10.0.0.12], services: {}, waypoint: {destination: /10.1.0.9, hboneMtlsPort: 15008}}
- {uid: by-hostname, namespace: demo, workloadIps: [10.0.0.13], services: {}, waypoint: {destination: infra/wp.host, hboneMtlsPort: 15008}}
- {uid: by-other, namespace: demo, workloadIps: [10.0.0.14], services: {}, waypoint: {destination: /10.0.9.2, hboneMtlsPort: 15008}}
- {uid: by-nothing, namespace: demo, workloadIps: [10.0.0.15], services: {}, waypoint: {destination: infra/gone, hboneMtlsPort: 15008}}
- {uid: elsewhere, namespace: demo, network: far, workloadIps: [10.0.0.16], services: {}, waypoint: {destination: /10.0.9.1, hboneMtlsPort: 15008}}
services:
- {name: svc, namespace: demo, hostname: svc, vips: ["far/10.9.0.1", "/fd01::1", /10.1.0.1], ports: {80: 80, 81: 8081, 83: 0}}
- {name: svc, namespace: other, hostname: svc, vips: [], ports: {80: 7}}
- {name: illegal, namespace: demo, hostname: illegal, vips: [], ports: {80: 80, 81: 15001}}
- {name: headless, namespace: demo, hostname: headless, vips: [], ports: {80: 80}}
- {name: far, namespace: demo, hostname: far, vips: ["far/fd01::2", far/10.9.0.2], ports: {80: 80}}
- {name: hidden, namespace: other, hostname: hidden, vips: [], ports: {80: 80}, visibility: Namespace}
- {name: waypoint, namespace: infra, hostname: waypoint, vips: [/10.1.0.9], ports: {15008: 15008}}
- {name: waypointed, namespace: demo, hostname: waypointed, vips: [/10.1.0.2], ports: {}, waypoint: {destination: infra/waypoint, hboneMtlsPort: 15008}}
- {name: private, namespace: demo, hostname: private, vips: [/10.1.0.3], ports: {}, visibility: Namespace, waypoint: {destination: infra/waypoint, hboneMtlsPort: 15008}}
- {name: weighted, namespace: demo, hostname: weighted, vips: [/10.1.0.4], ports: {}, waypoint: {destination: /10.0.9.2, hboneMtlsPort: 15008},
   weightedWaypoints: [{weight: 1, destination: {destination: infra/waypoint, hboneMtlsPort: 15008}}]}
- {name: range, namespace: demo, hostname: range, vips: [], cidrVips: [{network: "", cidr: 10.2.0.0/16}], ports: {}, waypoint: {destination: infra/waypoint, hboneMtlsPort: 15008}}
`

func targetText(t Target, err error) string {
	var ie *InboundError
	if errors.As(err, &ie) {
		return fmt.Sprintf("%d %s", ie.Status, err)
	}
	if err != nil {
		return "no InboundError: " + err.Error()
	}
	s := t.Addr.String()
	if t.Service != nil {
		s += " of " + t.Service.Key().String()
	}
	if t.Proxy {
		s += " PROXY for " + t.Original.String()
	} else if t.Original.IsValid() {
		s += " with an Original that nobody wants"
	}
	return s
}

func TestInboundTarget(t *testing.T) {
	s := parse(t, inboundCast)
	for _, c := range []struct{ local, dst, authority, want string }{
		{"server", "10.0.0.2", "10.0.0.2:8080", "10.0.0.2:8080"},
		{"server", "10.0.0.2", "[::ffff:10.0.0.2]:8080", "10.0.0.2:8080"},
		{"server", "::ffff:10.0.0.2", "10.0.0.2:8080", "10.0.0.2:8080"},
		{"server", "fd00::2", "[fd00::2]:8080", "[fd00::2]:8080"},
		{"server", "10.0.0.2", "10.0.0.3:8080", "400 ip mismatch: 10.0.0.2 != 10.0.0.3"},
		{"server", "10.0.0.2", "[fd00::2]:8080", "400 ip mismatch: 10.0.0.2 != fd00::2"},
		{"server", "10.0.0.2", "10.1.0.1:80", "400 ip mismatch: 10.0.0.2 != 10.1.0.1"},
		{"server", "10.0.0.2", "127.0.0.1:80", "400 ip mismatch: 10.0.0.2 != 127.0.0.1"},

		{"server", "10.0.0.2", "10.0.0.2:15001", "503 attempted recursive call to ourselves"},
		{"server", "10.0.0.2", "10.0.0.2:15006", "503 attempted recursive call to ourselves"},
		{"server", "10.0.0.2", "10.0.0.2:15008", "503 attempted recursive call to ourselves"},
		{"server", "10.0.0.2", "10.0.0.2:15053", "10.0.0.2:15053"},
		{"server", "10.0.0.2", "illegal:80", "503 attempted recursive call to ourselves"},
		{"server", "10.0.0.2", "illegal:81", "503 attempted recursive call to ourselves"},

		{"server", "10.0.0.2", "svc:80", "10.0.0.2:8080 of demo/svc"},
		{"server", "fd00::2", "svc:81", "[fd00::2]:8081 of demo/svc"},
		{"server", "10.0.0.2", "svc:82", "10.0.0.2:8082 of demo/svc"}, // not among the service's ports
		{"server", "10.0.0.2", "svc:83", "503 no port 83 of service svc"},
		{"server", "10.0.0.2", "svc:84", "503 no port 84 of service svc"},
		{"server", "10.0.0.2", "none:80", "503 unknown service: none"},
		{"server", "10.0.0.2", "hidden:80", "503 unknown service: hidden"},

		{"wp", "10.0.9.1", "10.0.0.10:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.0.0.11:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.0.0.12:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.0.0.13:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.0.0.14:80", "400 ip mismatch: 10.0.9.1 != 10.0.0.14"},
		{"wp", "10.0.9.1", "10.0.0.15:80", "400 ip mismatch: 10.0.9.1 != 10.0.0.15"},
		{"wp", "10.0.9.1", "10.0.0.16:80", "400 ip mismatch: 10.0.9.1 != 10.0.0.16"},
		{"wp", "10.0.9.1", "10.0.0.2:80", "400 ip mismatch: 10.0.9.1 != 10.0.0.2"},
		{"wp", "10.0.9.1", "10.1.0.2:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.1.0.3:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.1.0.4:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.1.0.1:80", "400 ip mismatch: 10.0.9.1 != 10.1.0.1"},
		{"wp", "10.0.9.1", "10.2.3.4:80", "10.0.9.1:80"},
		{"wp", "10.0.9.1", "10.3.3.4:80", "400 ip mismatch: 10.0.9.1 != 10.3.3.4"},
		// A workload is the waypoint where it has the address; as an endpoint of the
		// waypoint's service it is one by its uid.
		{"wp", "10.0.9.9", "10.0.0.10:80", "400 ip mismatch: 10.0.9.9 != 10.0.0.10"},
		{"wp", "10.0.9.9", "10.0.0.13:80", "400 ip mismatch: 10.0.9.9 != 10.0.0.13"},
		{"wp", "10.0.9.9", "10.0.0.11:80", "10.0.9.9:80"},
		{"twin", "10.0.9.1", "10.0.0.10:80", "10.0.9.1:80"},
		{"twin", "10.0.9.1", "10.0.0.11:80", "400 ip mismatch: 10.0.9.1 != 10.0.0.11"},
		{"twin", "10.0.9.1", "10.0.0.14:80", "400 ip mismatch: 10.0.9.1 != 10.0.0.14"},
		{"server", "10.0.0.2", "10.0.0.10:80", "400 ip mismatch: 10.0.0.2 != 10.0.0.10"},

		{"proxy", "10.0.9.2", "192.0.2.1:80", "10.0.9.2:15088 PROXY for 192.0.2.1:80"},
		{"proxy", "10.0.9.2", "10.0.9.2:80", "10.0.9.2:15088 PROXY for 10.0.9.2:80"},
		{"proxy", "10.0.9.2", "[fd00::2]:80", "10.0.9.2:15088 PROXY for [fd00::2]:80"},
		{"proxy", "10.0.9.2", "192.0.2.1:15008", "503 attempted recursive call to ourselves"},
		{"proxy", "10.0.9.2", "svc:81", "10.0.9.2:15088 of demo/svc PROXY for 10.1.0.1:81"},
		{"proxy", "10.0.9.2", "far:80", "10.0.9.2:15088 of demo/far PROXY for 10.9.0.2:80"},
		{"proxy", "10.0.9.2", "headless:80", "503 the service headless has no VIP to name in a PROXY header"},
		{"portless", "10.0.9.3", "192.0.2.1:80", "10.0.9.3:80 PROXY for 192.0.2.1:80"},
		{"none", "10.0.9.4", "192.0.2.1:80", "10.0.9.4:15099"},
		{"none", "10.0.9.4", "headless:80", "10.0.9.4:15099 of demo/headless"},
	} {
		got := targetText(s.InboundTarget(s.WorkloadByUID(c.local), "", ip(c.dst), c.authority))
		if got != c.want {
			t.Errorf("%s at %s, asked for %s:\n got %s\nwant %s", c.local, c.dst, c.authority, got, c.want)
		}
	}
}

func TestVIPOfANetwork(t *testing.T) {
	s := parse(t, inboundCast)
	for network, want := range map[string]string{"": "10.1.0.1", "far": "10.9.0.1", "other": "10.9.0.1"} {
		if vip, ok := vipOf(s.ServiceFor("svc", "demo"), network); !ok || vip != ip(want) {
			t.Errorf("%q: %s, %t; want %s", network, vip, ok, want)
		}
	}
}

func TestAuthority(t *testing.T) {
	for _, c := range []struct {
		in   string
		want authority
	}{
		{"10.0.0.1:80", authority{addr: ap("10.0.0.1:80")}},
		{"[fd00::1]:80", authority{addr: ap("[fd00::1]:80")}},
		{"[::ffff:10.0.0.1]:65535", authority{addr: ap("10.0.0.1:65535")}},
		{"a.b-c.svc.cluster.local:0", authority{host: "a.b-c.svc.cluster.local"}},
		{"10.0.0.256:1", authority{host: "10.0.0.256", port: 1}},
	} {
		if got, err := parseAuthority(c.in); got != c.want || err != nil {
			t.Errorf("%s: %+v, %v; want %+v", c.in, got, err, c.want)
		}
	}
	s := parse(t, inboundCast)
	for _, bad := range []string{
		"", ":", ":80", "a", "10.0.0.1", "a:", "a:b", "a:-1", "a:65536", "a: 80", "fd00::1:80", "[fd00::1]", "[fd00::1:80", "[10.0.0.1]:80", "[]:80", "[a]:80",
		"[fe80::1%lo]:80", "user@a:80", "http://a:80", "a/b:80", "a b:80", "a\n:80", "ä:80", strings.Repeat("a", 254) + ":80",
	} {
		_, err := s.InboundTarget(s.WorkloadByUID("server"), "", ip("10.0.0.2"), bad)
		var ie *InboundError
		if !errors.As(err, &ie) || ie.Status != 400 || !strings.HasPrefix(ie.Text, "the authority ") || len(ie.Text) > 400 {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
