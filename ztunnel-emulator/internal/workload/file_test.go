package workload

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestExample(t *testing.T) {
	s := example(t)
	if w := s.Warnings(); len(w) > 0 {
		t.Errorf("warnings: %q", w)
	}
	bob := s.WorkloadAt("", ip("10.0.3.10"))
	if bob == nil || bob.UID != "lab//v1/Pod/demo/bob" || bob.Identity() != "spiffe://cluster.local/ns/demo/sa/bob" {
		t.Fatalf("bob: %+v", bob)
	}
	alice := s.LocalWorkload("alice", "demo", "alice", "node-a")
	if alice == nil || s.LocalWorkload("alice", "demo", "alice", "node-b") != nil || s.LocalWorkload("alice", "demo", "alice", "") != alice {
		t.Fatalf("alice: %+v", alice)
	}
	svc := s.ServiceAt("", ip("10.96.0.10"), "demo")
	if svc == nil || svc.Endpoints[bob.UID].Ports[80] != 8080 {
		t.Fatalf("service: %+v", svc)
	}
	got, err := s.Route(Request{Source: alice, Client: ip("10.0.2.10"), Dst: ap("10.96.0.10:80")})
	want := Route{
		Protocol: HBONE, NextHop: ap("10.0.3.10:15008"), Authority: "10.0.3.10:8080",
		Identities: []string{"spiffe://cluster.local/ns/demo/sa/bob"}, Workload: bob, Service: svc,
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("route: %+v, %v; want %+v", got, err, want)
	}
	// Alice may talk to bob, and nobody may talk to her but herself.
	for _, c := range []struct {
		to   *Workload
		id   string
		want string
	}{
		{bob, alice.Identity(), ""},
		{bob, bob.Identity(), "connection closed due to policy rejection: allow policies exist, but none allowed"},
		{bob, "", "connection closed due to policy rejection: allow policies exist, but none allowed"},
		{alice, bob.Identity(), "connection closed due to policy rejection: allow policies exist, but none allowed"},
	} {
		_, err := s.Authorize(c.to, Peer{Src: ap("10.0.2.10:4000"), Dst: ap("10.0.3.10:8080"), Identity: c.id})
		if text(err) != c.want {
			t.Errorf("%s to %s: %v; want %q", c.id, c.to.Name, err, c.want)
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// workloadWith is a file with one workload that has one more key.
func workloadWith(extra string) string {
	return "workloads:\n- workloadIps: []\n  namespace: demo\n  services: {}\n  " + extra + "\n"
}

func serviceWith(extra string) string {
	return "services:\n- name: a\n  namespace: demo\n  hostname: a.demo\n  vips: []\n  ports: {}\n  " + extra + "\n"
}

// matching is a file with one policy that has one match.
func matching(match string) string {
	return "policies:\n- {name: a, namespace: demo, scope: Global, action: Deny, dryRun: false,\n   rules: [[[" + match + "]]]}\n"
}

func TestRequiredKeys(t *testing.T) {
	for list, entry := range map[string]map[string]string{
		"workloads": {"workloadIps": "[]", "namespace": "a", "services": "{}"},
		"services":  {"name": "a", "namespace": "a", "hostname": "a", "vips": "[]", "ports": "{}"},
		"policies":  {"name": "a", "namespace": "a", "scope": "Global", "action": "Deny", "dryRun": "true", "rules": "[]"},
	} {
		write := func(without string) string {
			var b strings.Builder
			for k, v := range entry {
				if k != without {
					fmt.Fprintf(&b, "%s: %s, ", k, v)
				}
			}
			return list + ": [{" + b.String() + "}]"
		}
		if _, err := Parse([]byte(write(""))); err != nil {
			t.Errorf("%s: %v", list, err)
		}
		for key := range entry {
			want := fmt.Sprintf("line 1: %s[0]: the key %s is missing", list, key)
			if _, err := Parse([]byte(write(key))); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%v; want %s", err, want)
			}
		}
	}
}

func TestDefaults(t *testing.T) {
	w := *parse(t, workloadWith("")).WorkloadByUID("")
	w.IPs, w.AuthorizationPolicies, w.services = nil, nil, nil
	if want := (Workload{Namespace: "demo", Protocol: TCP, NetworkMode: Standard, Status: Healthy, Capacity: 1}); !reflect.DeepEqual(w, want) {
		t.Errorf("workload: %+v; want %+v", w, want)
	}
	if id := w.Identity(); id != "spiffe:///ns/demo/sa/" {
		t.Errorf("identity: %s", id)
	}
	svc := parse(t, serviceWith("")).Services()[0]
	dump, err := json.Marshal(svc)
	want := `{"name":"a","namespace":"demo","hostname":"a.demo","vips":[],"ports":{},"endpoints":{},"subjectAltNames":[],"canonical":false,"visibility":"Public"}`
	if err != nil || string(dump) != want {
		t.Errorf("service: %s, %v; want %s", dump, err, want)
	}
}

// Every key, and how it comes out in the configuration dump.
func TestEveryKey(t *testing.T) {
	s := parse(t, `
workloads:
- {workloadIps: [10.0.0.1, "fd00::1"], namespace: demo, services: {demo/a.demo: {80: 8080}, demo/none: {}}, uid: u, name: n,
   serviceAccount: sa, trustDomain: td, protocol: HBONE, networkMode: HostNetwork, network: net, node: 7, clusterId: c,
   workloadName: wn, workloadType: deployment, canonicalName: cn, canonicalRevision: v1, hostname: h,
   waypoint: {destination: net/10.0.0.2, hboneMtlsPort: 15008}, networkGateway: {destination: demo/gw, hboneMtlsPort: 0x3aa0},
   nativeTunnel: true, applicationTunnel: {protocol: PROXY, port: 15088}, authorizationPolicies: [demo/p], status: Unhealthy,
   locality: {region: r, zone: z, subzone: s}, capacity: 3}
services:
- {name: a, namespace: demo, hostname: a.demo, vips: [/10.1.0.1, "net/fd01::1"], ports: {"80": 0}, cidrVips: [{network: net, cidr: 10.2.0.0/16}],
   endpoints: {x: {workloadUid: x, port: {80: 81}, status: Unhealthy}}, subjectAltNames: ["spiffe://td/ns/demo/sa/sa"],
   waypoint: {destination: /10.0.0.3, hboneMtlsPort: 1}, weightedWaypoints: [{destination: {destination: a/b, hboneMtlsPort: 2}, weight: 5}],
   loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, healthPolicy: AllowAll},
   ipFamilies: IPv6, canonical: true, visibility: Namespace}
policies:
- {name: p, namespace: demo, scope: WorkloadSelector, action: Allow, dryRun: true, rules: [[[
   {namespaces: [!Exact a], notNamespaces: [!Prefix b], serviceAccounts: [{namespace: a, serviceAccount: b}], notServiceAccounts: [{namespace: c, serviceAccount: d}],
    principals: [!Suffix c], notPrincipals: [!Presence []], sourceIps: [10.0.0.0/8], notSourceIps: [10.1.0.0/16],
    destinationIps: ["fd00::/8"], notDestinationIps: ["::/0"], destinationPorts: [1], notDestinationPorts: [2]}]]]}
`)
	if len(s.Warnings()) > 0 {
		t.Errorf("warnings: %q", s.Warnings())
	}
	for _, c := range []struct {
		got  any
		want string
	}{
		{s.Workloads(), `[{"uid":"u","name":"n","namespace":"demo","serviceAccount":"sa","trustDomain":"td","workloadIps":["10.0.0.1","fd00::1"],"protocol":"HBONE","networkMode":"HostNetwork","network":"net","node":"7","clusterId":"c","status":"Unhealthy","capacity":3,"workloadName":"wn","workloadType":"deployment","canonicalName":"cn","canonicalRevision":"v1","locality":{"region":"r","zone":"z","subzone":"s"},"hostname":"h","waypoint":{"destination":"net/10.0.0.2","hboneMtlsPort":15008},"networkGateway":{"destination":"demo/gw","hboneMtlsPort":15008},"nativeTunnel":true,"applicationTunnel":{"protocol":"PROXY","port":15088},"authorizationPolicies":["demo/p"]}]`},
		{s.Services(), `[{"name":"a","namespace":"demo","hostname":"a.demo","vips":["/10.1.0.1","net/fd01::1"],"cidrVips":[{"network":"net","cidr":"10.2.0.0/16"}],"ports":{"80":0},"endpoints":{"u":{"workloadUid":"u","port":{"80":8080},"status":"Unhealthy"},"x":{"workloadUid":"x","port":{"80":81},"status":"Unhealthy"}},"subjectAltNames":["spiffe://td/ns/demo/sa/sa"],"waypoint":{"destination":"/10.0.0.3","hboneMtlsPort":1},"weightedWaypoints":[{"destination":{"destination":"a/b","hboneMtlsPort":2},"weight":5}],"loadBalancer":{"routingPreferences":["Network","Region","Zone","Subzone","Node","Cluster"],"mode":"Failover","healthPolicy":"AllowAll"},"ipFamilies":"IPv6","canonical":true,"visibility":"Namespace"}]`},
		{s.Policies(), `[{"name":"p","namespace":"demo","scope":"WorkloadSelector","action":"Allow","dryRun":true,"rules":[[[{"namespaces":[{"Exact":"a"}],"notNamespaces":[{"Prefix":"b"}],"serviceAccounts":[{"namespace":"a","serviceAccount":"b"}],"notServiceAccounts":[{"namespace":"c","serviceAccount":"d"}],"principals":[{"Suffix":"c"}],"notPrincipals":[{"Presence":[]}],"sourceIps":["10.0.0.0/8"],"notSourceIps":["10.1.0.0/16"],"destinationIps":["fd00::/8"],"notDestinationIps":["::/0"],"destinationPorts":[1],"notDestinationPorts":[2]}]]]}]`},
		{s.Staged(), `{"demo/none":{"u":{"workloadUid":"u","port":{},"status":"Unhealthy"}}}`},
	} {
		if got, err := json.Marshal(c.got); err != nil || string(got) != c.want {
			t.Errorf("%v\n got %s\nwant %s", err, got, c.want)
		}
	}
}

func TestTolerated(t *testing.T) {
	for _, c := range []struct{ file, warning string }{
		{"workloads:\nservices:\npolicies:\n", ""},
		{"{}", ""},
		{`{"workloads": [{"workloadIps": ["10.0.0.1"], "namespace": "a", "services": {"a/b": {"80": 8080}}}], "services": [], "policies": []}`, ""},
		{workloadWith("name: 123"), ""},
		{workloadWith("waypoint: null"), ""},
		{workloadWith("waypoint:"), ""},
		{workloadWith("applicationTunnel: {protocol: NONE}"), ""},
		{workloadWith("applicationTunnel: {protocol: NONE, port: null}"), ""},
		{serviceWith("ipFamilies: ~"), ""},
		{matching("{principals: [!Presence ]}"), ""},
		{"workloads: [&w {workloadIps: [], namespace: a, services: {}, uid: &u x}, {workloadIps: [], namespace: *u, services: {}}]", ""},
		{matching("{principal: [!Exact x]}"), `line 3: policies[0].rules[0][0][0]: the unknown key "principal" is ignored; did you mean principals?`},
		{matching("{principals: [!Exact spiffe://a/ns/b/sa/c]}"), `line 3: policies[0].rules[0][0][0].principals[0]: "spiffe://a/ns/b/sa/c" never matches; principals are written without spiffe://`},
		{matching("{sourceIps: ['::ffff:10.0.0.0/104']}"), `line 3: policies[0].rules[0][0][0].sourceIps[0]: "::ffff:10.0.0.0/104" never matches; IPv4 addresses are written as such: "10.0.0.0/8"`},
		{matching("{sourceIps: ['::/0', '::ffff:0:0/95']}"), ""},
		{"workloads: [{workloadIps: ['::ffff:10.0.0.1'], namespace: a, services: {}}]", `line 1: workloads[0].workloadIps[0]: "::ffff:10.0.0.1" never matches; IPv4 addresses are written as such: "10.0.0.1"`},
		{"services: [{name: a, namespace: b, hostname: c, vips: [/::ffff:10.0.0.1], ports: {}}]", `line 1: services[0].vips[0]: "/::ffff:10.0.0.1" never matches; IPv4 addresses are written as such: "/10.0.0.1"`},
		{workloadWith("locality: {region: a, zone: b, subzone: c, rack: d}"), `line 5: workloads[0].locality: the unknown key "rack" is ignored; there are region, zone, subzone`},
		{workloadWith("authorizationPolicies: [demo/none]"), `workload "" names the policy "demo/none", which is not there`},
		{serviceWith("subjectAltNames: [bob]"), `line 7: services[0].subjectAltNames[0]: "bob" is ignored; an identity is spiffe://<trust domain>/ns/<namespace>/sa/<service account>`},
		{"workloads: [{workloadIps: [], namespace: a, services: {}}, {workloadIps: [], namespace: b, services: {}}]", `workload "" is there more than once; the last one counts`},
	} {
		s, err := Parse([]byte(c.file))
		if err != nil {
			t.Errorf("%q: %v", c.file, err)
			continue
		}
		if got := strings.Join(s.Warnings(), "\n"); got != c.warning {
			t.Errorf("%q warns of:\n got %s\nwant %s", c.file, got, c.warning)
		}
	}
}

// A few lines with aliases may stand for more than fits into memory.
func TestAliasBomb(t *testing.T) {
	var b strings.Builder
	fmt.Fprintf(&b, "workloads:\n- &w\n  namespace: a\n  services: {}\n  workloadIps: [%s10.0.0.1]\n", strings.Repeat("10.0.0.1, ", 20_000))
	b.WriteString(strings.Repeat("- *w\n", 20_000))
	started := time.Now()
	_, err := Parse([]byte(b.String()))
	if err == nil || !strings.Contains(err.Error(), "the aliases (*name) make the file too large; write less with them") {
		t.Errorf("%v after %v", err, time.Since(started))
	}
	for _, cycle := range []string{"workloads: &a [*a]", "policies: &a [{name: a, namespace: a, scope: Global, action: Deny, dryRun: true, rules: *a}]"} {
		if _, err := Parse([]byte(cycle)); err == nil {
			t.Errorf("accepted: %s", cycle)
		}
	}
}

func TestNumbers(t *testing.T) {
	for in, want := range map[string]uint32{"0": 0, "10": 10, "'10'": 10, "0x1F": 31, "0o17": 15, "0b101": 5, "4294967295": 1<<32 - 1} {
		if got := parse(t, workloadWith("capacity: "+in)).WorkloadByUID("").Capacity; got != want {
			t.Errorf("%s: %d; want %d", in, got, want)
		}
	}
	for _, bad := range []string{"", "''", "-0", "010", "0x", "0xg", "1_000", "1e3", "4294967296", "null", "[1]"} {
		if _, err := Parse([]byte(workloadWith("capacity: " + bad))); err == nil {
			t.Errorf("accepted: %s", bad)
		}
	}
}

func TestTooLong(t *testing.T) {
	_, err := Parse(make([]byte, MaxFile+1))
	if err == nil || err.Error() != "line 1: the file has 33554433 bytes; the most is 33554432" {
		t.Error(err)
	}
}

func TestWarningsEnd(t *testing.T) {
	s := parse(t, matching(strings.TrimSuffix(strings.Repeat("{a: b}, ", 1000), ", ")))
	if n := len(s.Warnings()); n != maxWarnings {
		t.Errorf("%d warnings; want %d", n, maxWarnings)
	}
}

func TestWarningsNames(t *testing.T) {
	for name, want := range map[string]string{
		"workloadIP": "did you mean workloadIps?", "Namespace": "did you mean namespace?", "serviceaccount": "did you mean serviceAccount?",
		"capcity": "did you mean capacity?", "x": "there are " + strings.Join(workloadKeys, ", "),
		strings.Repeat("n", 1000): "there are " + strings.Join(workloadKeys, ", "),
	} {
		if got := advice(name, workloadKeys); got != want {
			t.Errorf("%s: %s; want %s", name, got, want)
		}
	}
}

// Ten thousand pods in five hundred services.
func BenchmarkParse(b *testing.B) {
	var text strings.Builder
	text.WriteString("workloads:\n")
	for i := range 10_000 {
		fmt.Fprintf(&text, `- uid: lab//Pod/demo/pod-%d
  name: pod-%d
  namespace: demo
  serviceAccount: pod
  trustDomain: cluster.local
  workloadIps: ["10.1.%d.%d"]
  protocol: HBONE
  node: node-%d
  services:
    demo/svc-%d: {80: 8080}
`, i, i, i/250, i%250, i%100, i%500)
	}
	text.WriteString("services:\n")
	for i := range 500 {
		fmt.Fprintf(&text, "- {name: svc-%d, namespace: demo, hostname: svc-%d, vips: [/10.2.%d.%d], ports: {80: 8080}}\n", i, i, i/250, i%250)
	}
	data := []byte(text.String())
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(data); err != nil {
			b.Fatal(err)
		}
	}
}
