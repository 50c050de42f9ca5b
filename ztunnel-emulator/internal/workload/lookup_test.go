package workload

import (
	"fmt"
	"strings"
	"testing"
)

func TestOverlappingAddresses(t *testing.T) {
	const (
		pod, other = "c//Pod/demo/a", "c/networking.istio.io/WorkloadEntry/demo/a"
	)
	entry := func(uid, extra string) string {
		return fmt.Sprintf("- {workloadIps: [10.0.0.1], namespace: demo, services: {}, uid: %s%s}\n", uid, extra)
	}
	for _, c := range []struct{ name, one, two, want string }{
		{"a pod wins", entry(pod, ""), entry(other, ""), pod},
		{"a pod wins against HBONE", entry(pod, ""), entry(other, ", protocol: HBONE"), pod},
		{"HBONE wins among pods", entry(pod, ", protocol: HBONE"), entry(pod+"2", ""), pod},
		{"HBONE wins among others", entry(other, ", protocol: HBONE"), entry(other+"2", ""), other},
		{"the host's address is nobody's", entry(pod, ", networkMode: HostNetwork"), entry(other, ""), other},
		{"another network is another address", entry(pod, ", network: net"), entry(other, ""), other},
	} {
		for _, order := range []string{c.one + c.two, c.two + c.one} {
			s := parse(t, "workloads:\n"+order)
			if w := s.WorkloadAt("", ip("::ffff:10.0.0.1")); w == nil || w.UID != c.want {
				t.Errorf("%s: %+v; want %s", c.name, w, c.want)
			}
		}
	}
	// Of equals the later one, as in the real one.
	for _, uids := range [][2]string{{other, other + "2"}, {other + "2", other}} {
		s := parse(t, "workloads:\n"+entry(uids[0], "")+entry(uids[1], ""))
		if w := s.WorkloadAt("", ip("10.0.0.1")); w.UID != uids[1] {
			t.Errorf("%s; want %s", w.UID, uids[1])
		}
	}
	s := parse(t, "workloads:\n"+entry(pod, ", networkMode: HostNetwork"))
	if w := s.WorkloadAt("", ip("10.0.0.1")); w != nil {
		t.Errorf("found by its node's address: %+v", w)
	}
	if s.WorkloadByUID(pod) == nil {
		t.Error("not found by uid")
	}
}

func TestLocalWorkload(t *testing.T) {
	s := parse(t, `
workloads:
- {workloadIps: [], namespace: demo, services: {}, uid: a1, name: a, serviceAccount: sa, node: n1}
- {workloadIps: [], namespace: demo, services: {}, uid: a2, name: a, serviceAccount: sa, node: n2}
`)
	for _, c := range []struct{ name, namespace, account, node, want string }{
		{"a", "demo", "sa", "", "a1"},
		{"a", "demo", "sa", "n2", "a2"},
		{"a", "demo", "sa", "n3", ""},
		{"b", "demo", "sa", "", ""},
		{"a", "prod", "sa", "", ""},
		{"a", "demo", "", "", ""},
	} {
		got := ""
		if w := s.LocalWorkload(c.name, c.namespace, c.account, c.node); w != nil {
			got = w.UID
		}
		if got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// services writes a file of services: each is its name, its namespace, and more keys.
func services(entries ...[3]string) string {
	var b strings.Builder
	b.WriteString("services:\n")
	for _, e := range entries {
		more := e[2]
		if !strings.Contains(more, "vips:") {
			more += ", vips: []"
		}
		fmt.Fprintf(&b, "- {name: %s, hostname: %s, namespace: %s, ports: {}%s}\n", e[0], e[0], e[1], more)
	}
	return b.String()
}

func TestServiceAt(t *testing.T) {
	const vip, canonical, private = ", vips: [/10.1.0.1]", ", canonical: true", ", visibility: Namespace"
	cidr := func(c string) string { return ", cidrVips: [{network: '', cidr: " + c + "}]" }
	for _, c := range []struct {
		name    string
		entries [][3]string
		want    string
	}{
		{"none", [][3]string{{"a", "x", ", vips: [/10.1.0.2]"}}, ""},
		{"another network", [][3]string{{"a", "x", ", vips: [net/10.1.0.1]"}}, ""},
		{"the first", [][3]string{{"a", "x", vip}, {"b", "x", vip}}, "a"},
		{"canonical", [][3]string{{"a", "x", vip}, {"b", "x", vip + canonical}, {"c", "x", vip + canonical}}, "b"},
		{"the client's namespace", [][3]string{{"a", "x", vip + canonical}, {"b", "client", vip}}, "b"},
		{"canonical in the client's namespace", [][3]string{{"b", "client", vip}, {"c", "client", vip + canonical}}, "c"},
		{"hidden", [][3]string{{"a", "x", vip + private}}, ""},
		{"hidden, and another", [][3]string{{"a", "x", vip + private + canonical}, {"b", "x", vip}}, "b"},
		{"visible at home", [][3]string{{"a", "client", vip + private}}, "a"},
		{"exact before CIDR", [][3]string{{"a", "client", cidr("10.1.0.1/32")}, {"b", "x", vip}}, "b"},
		{"hidden exact, then CIDR", [][3]string{{"a", "x", cidr("10.1.0.0/16")}, {"b", "x", vip + private}}, "a"},
		{"the longer prefix", [][3]string{{"a", "x", cidr("10.1.0.0/16")}, {"b", "x", cidr("10.1.0.0/24")}, {"c", "x", cidr("10.0.0.0/8")}}, "b"},
		{"namespace before prefix", [][3]string{{"a", "x", cidr("10.1.0.0/24")}, {"b", "client", cidr("10.0.0.0/8")}}, "b"},
		{"prefix before canonical", [][3]string{{"a", "x", cidr("10.1.0.0/24")}, {"b", "x", cidr("10.1.0.0/16") + canonical}}, "a"},
		{"canonical of equals", [][3]string{{"a", "x", cidr("10.1.0.0/24")}, {"b", "x", cidr("10.1.0.0/24") + canonical}}, "b"},
		{"the first of equals", [][3]string{{"a", "x", cidr("10.1.0.0/24")}, {"b", "x", cidr("10.1.0.0/24")}}, "a"},
		{"outside the CIDR", [][3]string{{"a", "x", cidr("10.2.0.0/16")}}, ""},
		{"hidden CIDR", [][3]string{{"a", "x", cidr("10.1.0.0/16") + private}}, ""},
		{"a CIDR of another network", [][3]string{{"a", "x", ", cidrVips: [{network: net, cidr: 10.0.0.0/8}]"}}, ""},
		{"the best of several CIDRs", [][3]string{
			{"a", "x", ", cidrVips: [{network: '', cidr: 10.0.0.0/8}, {network: '', cidr: 10.1.0.0/30}, {network: net, cidr: 10.1.0.1/32}]"},
			{"b", "x", cidr("10.1.0.0/24")},
		}, "a"},
	} {
		got := ""
		if svc := parse(t, services(c.entries...)).ServiceAt("", ip("10.1.0.1"), "client"); svc != nil {
			got = svc.Name
		}
		if got != c.want {
			t.Errorf("%s: %q; want %q", c.name, got, c.want)
		}
	}
}

func TestServiceFor(t *testing.T) {
	s := parse(t, services(
		[3]string{"a", "x", ""}, [3]string{"a", "y", ", canonical: true"}, [3]string{"a", "z", ", visibility: Namespace"},
		[3]string{"b", "z", ", visibility: Namespace"},
	))
	for _, c := range []struct{ host, namespace, want string }{
		{"a", "x", "x"},
		{"a", "y", "y"},
		{"a", "z", "z"},
		{"a", "q", "y"},
		{"b", "z", "z"},
		{"b", "x", ""},
		{"c", "x", ""},
	} {
		got := ""
		if svc := s.ServiceFor(c.host, c.namespace); svc != nil {
			got = svc.Namespace
		}
		if got != c.want {
			t.Errorf("%s for %s: %q; want %q", c.host, c.namespace, got, c.want)
		}
	}
	if n := len(s.ServicesFor("a")); n != 3 {
		t.Errorf("%d services for a", n)
	}
}

func TestHealthStaging(t *testing.T) {
	const workloads = `
workloads:
- {workloadIps: [10.0.0.1], namespace: demo, uid: well, services: {demo/a: {80: 1}, demo/later: {80: 1}}}
- {workloadIps: [10.0.0.2], namespace: demo, uid: sick, status: Unhealthy, services: {demo/a: {80: 1}, demo/later: {80: 1}}}
`
	policy := func(p string) string {
		return ", loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: " + p + "}"
	}
	own := ", endpoints: {sick: {workloadUid: sick, port: {80: 2}, status: Unhealthy}, well: {workloadUid: well, port: {80: 2}}}"
	for _, c := range []struct{ name, extra, want string }{
		{"no policy", "", "well:1"},
		{"OnlyHealthy", policy("OnlyHealthy"), "well:1"},
		{"AllowAll", policy("AllowAll"), "sick:1 well:1"},
		// The service's own stay whatever their health; the workloads' replace them.
		{"its own", own, "sick:2 well:1"},
		{"its own, and AllowAll", own + policy("AllowAll"), "sick:1 well:1"},
		{"its own of nobody", ", endpoints: {none: {workloadUid: none, port: {}}}", "well:1"},
	} {
		s := parse(t, services([3]string{"a", "demo", c.extra})+workloads)
		var got []string
		for _, e := range s.Services()[0].reachable {
			got = append(got, fmt.Sprintf("%s:%d", e.workload.UID, e.Ports[80]))
		}
		if g := strings.Join(got, " "); g != c.want {
			t.Errorf("%s: %s; want %s", c.name, g, c.want)
		}
		if staged := s.Staged()[NamespacedHostname{"demo", "later"}]; len(staged) != 2 || staged["sick"].Status != Unhealthy {
			t.Errorf("%s: staged: %v", c.name, staged)
		}
	}
}

func TestLaterEntriesCount(t *testing.T) {
	s := parse(t, `
workloads:
- {workloadIps: [10.0.0.1], namespace: demo, uid: a, name: old, services: {demo/svc: {80: 1}}}
- {workloadIps: [10.0.0.2], namespace: demo, uid: a, name: new, services: {}}
services:
- {name: old, namespace: demo, hostname: svc, vips: [/10.1.0.1], ports: {}}
- {name: new, namespace: demo, hostname: svc, vips: [/10.1.0.2], ports: {}}
policies:
- {name: p, namespace: demo, scope: Global, action: Deny, dryRun: false, rules: [[]]}
- {name: p, namespace: demo, scope: Global, action: Deny, dryRun: false, rules: []}
`)
	if w := s.Workloads(); len(w) != 1 || w[0].Name != "new" || s.WorkloadAt("", ip("10.0.0.1")) != nil {
		t.Errorf("workloads: %+v", w)
	}
	if v := s.Services(); len(v) != 1 || v[0].Name != "new" || len(v[0].Endpoints) != 0 || s.ServiceAt("", ip("10.1.0.1"), "") != nil {
		t.Errorf("services: %+v", v)
	}
	if _, err := s.Authorize(s.WorkloadByUID("a"), Peer{}); err != nil || len(s.Policies()) != 1 {
		t.Errorf("policies: %+v, %v", s.Policies(), err)
	}
	if len(s.Warnings()) != 3 {
		t.Errorf("warnings: %q", s.Warnings())
	}
}

// What is dumped has an order.
func TestSorted(t *testing.T) {
	s := parse(t, services([3]string{"b", "x", ""}, [3]string{"a", "y", ""}, [3]string{"a", "x", ""})+
		"policies:\n"+policyOf("q", "Global", "Deny", "[]")+policyOf("p", "Global", "Deny", "[]"))
	var got []string
	for _, svc := range s.Services() {
		got = append(got, svc.Key().String())
	}
	for _, p := range s.Policies() {
		got = append(got, p.Key())
	}
	if g, want := strings.Join(got, " "), "x/a y/a x/b demo/p demo/q"; g != want {
		t.Errorf("%s; want %s", g, want)
	}
}
