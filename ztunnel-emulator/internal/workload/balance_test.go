package workload

import (
	"fmt"
	"strings"
	"testing"
)

// balanced is a file with a client, and a service with its load balancer and
// endpoints: pairs of name and more keys.
func balanced(client, balancer string, endpoints ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "workloads:\n- {uid: client, namespace: demo, workloadIps: [10.0.0.1], services: {}%s}\n", client)
	for i := 0; i < len(endpoints); i += 2 {
		fmt.Fprintf(&b, "- {uid: %s, name: %s, namespace: demo, services: {demo/svc: {80: %d}}%s", endpoints[i], endpoints[i], 8000+i, endpoints[i+1])
		if !strings.Contains(endpoints[i+1], "workloadIps") {
			fmt.Fprintf(&b, ", workloadIps: [10.0.1.%d]", i+1)
		}
		b.WriteString("}\n")
	}
	fmt.Fprintf(&b, "services:\n- {name: svc, namespace: demo, hostname: svc, vips: [/10.1.0.1], ports: {80: 80}%s}\n", balancer)
	return b.String()
}

// chosen returns whom each number that can be drawn chooses.
func chosen(t *testing.T, s *State) string {
	t.Helper()
	var got []string
	for i, total := uint64(0), uint64(1); i < total; i++ {
		r, err := s.Route(Request{Source: s.WorkloadByUID("client"), Dst: ap("10.1.0.1:80"), Random: func(n uint64) uint64 { total = n; return i }})
		if err != nil {
			return err.Error()
		}
		got = append(got, r.Workload.UID)
	}
	return strings.Join(got, " ")
}

func TestLoadBalancing(t *testing.T) {
	const none = "no healthy upstream: 10.1.0.1:80"
	lb := func(mode, preferences string) string {
		return ", loadBalancer: {mode: " + mode + ", healthPolicy: OnlyHealthy, routingPreferences: [" + preferences + "]}"
	}
	at := func(region, zone, subzone string) string {
		return fmt.Sprintf(", locality: {region: %s, zone: %s, subzone: %s}", region, zone, subzone)
	}
	const gateway = ", network: far, networkGateway: {destination: far/10.9.9.9, hboneMtlsPort: 15008}"
	here := at("r", "z", "s")
	for _, c := range []struct {
		name, client, balancer string
		endpoints              []string
		want                   string
	}{
		{"all", "", "", []string{"a", "", "b", ""}, "a b"},
		{"by capacity", "", "", []string{"a", ", capacity: 2", "b", "", "c", ", capacity: 0"}, "a a b"},
		{"no capacity", "", "", []string{"a", ", capacity: 0"}, none},
		{"the healthy", "", "", []string{"a", ", status: Unhealthy", "b", ""}, "b"},
		{"nobody healthy", "", "", []string{"a", ", status: Unhealthy"}, none},
		{"the sick too", "", ", loadBalancer: {mode: Standard, healthPolicy: AllowAll, routingPreferences: []}", []string{"a", ", status: Unhealthy", "b", ""}, "a b"},
		{"no address", "", "", []string{"a", ", workloadIps: []", "b", ""}, "b"},
		{"no address, same network", "", "", []string{"a", ", workloadIps: [], networkGateway: {destination: /10.9.9.9, hboneMtlsPort: 1}", "b", ""}, "b"},

		{"Standard prefers nothing", here, lb("Standard", "Region"), []string{"a", here, "b", at("x", "z", "s")}, "a b"},

		{"Strict without preferences", here, lb("Strict", ""), []string{"a", "", "b", ""}, "a b"},
		{"Strict wants all", here, lb("Strict", "Region, Zone"), []string{"a", here, "b", at("r", "x", "s"), "c", at("x", "z", "s")}, "a"},
		{"Strict, nobody", here, lb("Strict", "Region"), []string{"b", at("x", "z", "s")}, none},
		{"Strict wants the network", "", lb("Strict", "Network, Node"), []string{"a", ", node: x", "b", ", node: ''"}, "b"},
		{"Strict, subzone", here, lb("Strict", "Subzone"), []string{"a", at("r", "z", "x"), "b", at("x", "x", "s")}, "b"},

		{"Failover, all equal", here, lb("Failover", "Region, Zone"), []string{"a", here, "b", here}, "a b"},
		{"Failover, the nearest", here, lb("Failover", "Region, Zone, Subzone"), []string{"a", at("r", "x", "x"), "b", at("r", "z", "x"), "c", at("x", "x", "x")}, "b"},
		{"Failover stops at a mismatch", here, lb("Failover", "Region, Zone"), []string{"a", at("x", "z", "s"), "b", at("x", "x", "s")}, "a b"},
		{"Failover takes whom there is", here, lb("Failover", "Region"), []string{"a", at("x", "z", "s")}, "a"},
		{"Failover, only the healthy", here, lb("Failover", "Region"), []string{"a", here + ", status: Unhealthy", "b", at("x", "z", "s")}, "b"},
		{"Failover, node", ", node: n", lb("Failover", "Node"), []string{"a", ", node: m", "b", ", node: n"}, "b"},
		{"Failover, cluster", ", clusterId: n", lb("Failover", "Cluster"), []string{"a", ", clusterId: m", "b", ", clusterId: n"}, "b"},
		{"Failover, network later", "", lb("Failover", "Region, Network"), []string{"a", gateway, "b", ""}, "b"},
		{"Failover, the network outweighs the rest", here, lb("Failover", "Network, Region, Zone, Subzone"), []string{"a", here + gateway, "b", ""}, "b"},
		{"Failover, same network, the nearest", here, lb("Failover", "Network, Region, Zone"), []string{"a", at("r", "x", "s"), "b", here}, "b"},
	} {
		if got := chosen(t, parse(t, balanced(c.client, c.balancer, c.endpoints...))); got != c.want {
			t.Errorf("%s: %s; want %s", c.name, got, c.want)
		}
	}
}

// Another network does not end the count: the nearest there is still preferred.
func TestNetworkMismatchGoesOn(t *testing.T) {
	lb := &LoadBalancer{Mode: BalanceFailover, Preferences: []Scope{ScopeNetwork, ScopeRegion, ScopeZone}}
	w := func(network, region, zone string) *Workload {
		return &Workload{Network: network, Locality: &Locality{Region: region, Zone: zone}}
	}
	source := w("n", "r", "z")
	for i, c := range []struct {
		w    *Workload
		want int
	}{
		{w("n", "r", "z"), 5},
		{w("n", "r", "x"), 4},
		{w("n", "x", "z"), 3},
		{w("m", "r", "z"), 2},
		{w("m", "r", "x"), 1},
		{w("m", "x", "z"), 0},
	} {
		if got, ok := lb.rank(source, c.w); got != c.want || !ok {
			t.Errorf("%d: %d, %t; want %d", i, got, ok, c.want)
		}
	}
}

func TestTargetPorts(t *testing.T) {
	tunnel := func(port string) string { return ", applicationTunnel: {protocol: NONE" + port + "}" }
	for _, c := range []struct {
		name, ports, endpoint, workload string
		as                              resolution
		want                            string
	}{
		{"the endpoint's own", "{80: 8080}", "{80: 1}", "", asDestination, "1"},
		{"the service's", "{80: 8080}", "{}", "", asDestination, "8080"},
		{"named, the endpoint's own", "{80: 0}", "{80: 1}", "", asDestination, "1"},
		{"named, and no endpoint's", "{80: 0}", "{}", "", asDestination, ""},
		{"named, with a tunnel", "{80: 0}", "{}", tunnel(", port: 9"), asDestination, ""},
		{"not the service's", "{}", "{80: 1}", "", asDestination, ""},
		{"not the service's, with a tunnel", "{}", "{80: 1}", tunnel(", port: 9"), asDestination, ""},
		{"waypoint, the endpoint's own", "{80: 8080}", "{80: 1}", "", asWaypoint, "1"},
		{"waypoint, the service's", "{80: 8080}", "{}", "", asWaypoint, "8080"},
		{"waypoint, neither", "{}", "{}", "", asWaypoint, ""},
		{"waypoint, with a tunnel", "{}", "{}", tunnel(", port: 9"), asWaypoint, "80"},
		{"waypoint, with a tunnel that has no port", "{}", "{}", tunnel(""), asWaypoint, ""},
	} {
		s := parse(t, fmt.Sprintf(`
workloads:
- {uid: client, namespace: demo, workloadIps: [10.0.0.1], services: {}}
- {uid: a, namespace: demo, workloadIps: [10.0.0.2], services: {}%s}
services:
- {name: svc, namespace: demo, hostname: svc, vips: [], ports: %s, endpoints: {a: {workloadUid: a, port: %s}}}
`, c.workload, c.ports, c.endpoint))
		r := &router{Request{Source: s.WorkloadByUID("client")}, s}
		got := ""
		if up, ok := r.pick(s.ServiceFor("svc", "demo"), 80, c.as); ok {
			got = fmt.Sprint(up.port)
		}
		if got != c.want {
			t.Errorf("%s: %q; want %q", c.name, got, c.want)
		}
	}
}
