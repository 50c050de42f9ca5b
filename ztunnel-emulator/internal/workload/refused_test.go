package workload

import (
	"errors"
	"strings"
	"testing"
)

func TestRefused(t *testing.T) {
	for _, c := range []struct{ file, want string }{
		{"", "line 1: the file is empty; write {} for a configuration with nothing in it"},
		{"# nothing\n", "line 1: the file is empty; write {} for a configuration with nothing in it"},
		{"---\n", "line 1: the file is empty; write {} for a configuration with nothing in it"},
		{"{}\n---\n{}\n", "line 2: there is a second document (after ---); write all into one"},
		{"a: b: c\n", "line 1: mapping values are not allowed in this context"},
		{"workloads: [\n", "line 2: did not find expected node content"},
		{"workloads: []\n- a\n", "line 2: did not find expected key"},
		{"workloads: []\nservices: [a,\npolicies: []\n", "line 2: did not find expected ',' or ']'"},
		{"workloads: []\nservices: @a\n", "line 2: found character that cannot start any token"},
		{"workloads:\n\tname: a\n", "line 2: found character that cannot start any token"},
		{"workloads: []\nservices: *x\n", "line 2: unknown anchor 'x' referenced"},
		{"workloads:\n- name: \xff\n", "line 2: there are bytes that are no UTF-8 text"},
		{"workloads: []\n\x00", "line 2: there are bytes that are no UTF-8 text"},
		{"[]", "line 1: a list where a map belongs, with some of the keys workloads, policies, services"},
		{"workload: []", `line 1: unknown key "workload"; did you mean workloads?`},
		{"<<: {}", `line 1: unknown key "<<"; there are workloads, policies, services`},
		{"workloads: []\nworkloads: []", "line 2: workloads is there twice"},
		{"workloads: null", `line 1: workloads: "null" where a list belongs`},
		{"workloads: {}", "line 1: workloads: a map where a list belongs"},
		{"workloads: [a]", `line 1: workloads[0]: "a" where a map belongs, with some of the keys ` + strings.Join(workloadKeys, ", ")},

		{"workloads:\n- namespace: a\n  services: {}\n", "line 2: workloads[0]: the key workloadIps is missing; write [] if it has none"},
		{"workloads:\n- workloadIps: []\n  services: {}\n", "line 2: workloads[0]: the key namespace is missing"},
		{"workloads:\n- workloadIps: []\n  namespace: a\n", "line 2: workloads[0]: the key services is missing; write {} if it serves none"},
		{workloadWith("workloadIP: [10.0.0.1]"), `line 5: workloads[0]: unknown key "workloadIP"; did you mean workloadIps?`},
		{workloadWith("protocol: hbone"), `line 5: workloads[0].protocol: "hbone" is none of TCP, HBONE`},
		{workloadWith("capacity: -1"), `line 5: workloads[0].capacity: "-1" is no number from 0 to 4294967295`},
		{workloadWith("capacity: 1.5"), `line 5: workloads[0].capacity: "1.5" is no number from 0 to 4294967295`},
		{workloadWith("nativeTunnel: yes"), `line 5: workloads[0].nativeTunnel: "yes" is neither true nor false`},
		{workloadWith("name: [a]"), "line 5: workloads[0].name: a list where a string belongs"},
		{workloadWith("name: !x a"), "line 5: workloads[0].name: the tag !x does not belong here; write only the string"},
		{workloadWith("waypoint: {destination: /10.0.0.1}"), "line 5: workloads[0].waypoint: the key hboneMtlsPort is missing; it is mostly 15008"},
		{workloadWith("waypoint: {destination: 10.0.0.1, hboneMtlsPort: 1}"), `line 5: workloads[0].waypoint.destination: "10.0.0.1" is no namespace/hostname, such as "demo/bob.demo.svc.cluster.local", and no network/ip`},
		{workloadWith("waypoint: {destination: /10.0.0.1, hboneMtlsPort: 1, port: 1}"), `line 5: workloads[0].waypoint: unknown key "port"; there are destination, hboneMtlsPort`},
		{workloadWith("locality: {region: a}"), "line 5: workloads[0].locality: the key zone is missing"},
		{workloadWith("applicationTunnel: {port: 1}"), "line 5: workloads[0].applicationTunnel: the key protocol is missing; write NONE or PROXY"},
		{"workloads: [{workloadIps: [10.0.0.256], namespace: a, services: {}}]", `line 1: workloads[0].workloadIps[0]: "10.0.0.256" is no IP address`},
		{"workloads: [{workloadIps: [fe80::1%lo], namespace: a, services: {}}]", `line 1: workloads[0].workloadIps[0]: "fe80::1%lo" is no IP address`},
		{"workloads: [{workloadIps: [], namespace: a, services: {b: {}}}]", `line 1: workloads[0].services: "b" is no namespace/hostname, such as "demo/bob.demo.svc.cluster.local"`},
		{"workloads: [{workloadIps: [], namespace: a, services: {a/b: {80: 65536}}}]", `line 1: workloads[0].services.a/b.80: "65536" is no number from 0 to 65535`},
		{"workloads: [{workloadIps: [], namespace: a, services: {a/b: {80: 1, 80: 2}}}]", `line 1: workloads[0].services.a/b: 80 is there twice`},

		{serviceWith("vip: []"), `line 7: services[0]: unknown key "vip"; did you mean vips?`},
		{serviceWith("visibility: Private"), `line 7: services[0].visibility: "Private" is none of Public, Namespace`},
		{serviceWith("ipFamilies: ipv4"), `line 7: services[0].ipFamilies: "ipv4" is none of Dual, IPv4, IPv6`},
		{serviceWith("cidrVips: [{network: a, cidr: 10.0.0.1}]"), `line 7: services[0].cidrVips[0].cidr: "10.0.0.1" has no prefix length; write "10.0.0.1/32" for the one address`},
		{serviceWith("cidrVips: [{network: a, cidr: a/b}]"), `line 7: services[0].cidrVips[0].cidr: "a/b" is no CIDR, such as "10.0.0.0/8"`},
		{serviceWith("endpoints: {a: {port: {}}}"), "line 7: services[0].endpoints.a: the key workloadUid is missing"},
		{serviceWith("endpoints: {a: {workloadUid: a, port: {}, health: Healthy}}"), `line 7: services[0].endpoints.a: unknown key "health"; there are workloadUid, port, status`},
		{serviceWith("loadBalancer: {mode: Strict}"), "line 7: services[0].loadBalancer: the key routingPreferences is missing; write [] for none"},
		{serviceWith("loadBalancer: {mode: Strict, routingPreferences: [], healthPolicy: AllowAll, x: y}"), `line 7: services[0].loadBalancer: unknown key "x"; there are routingPreferences, mode, healthPolicy`},
		{serviceWith("loadBalancer: {mode: Strict, routingPreferences: [Planet], healthPolicy: AllowAll}"), `line 7: services[0].loadBalancer.routingPreferences[0]: "Planet" is none of Region, Zone, Subzone, Node, Cluster, Network`},
		{serviceWith("weightedWaypoints: [{destination: {destination: /10.0.0.1, hboneMtlsPort: 1}}]"), "line 7: services[0].weightedWaypoints[0]: the key weight is missing"},
		{"services: [{name: a, namespace: b, hostname: c, vips: [10.0.0.1], ports: {}}]", `line 1: services[0].vips[0]: "10.0.0.1" names no network; write "/10.0.0.1" for the default one`},
		{"services: [{name: a, namespace: b, hostname: c, vips: []}]", "line 1: services[0]: the key ports is missing; write {} if it has none"},

		{"policies: [{}]", "line 1: policies[0]: the key scope is missing; write Global, Namespace or WorkloadSelector"},
		{matching("{principals: [{Exact: x}]}"), `line 3: policies[0].rules[0][0][0].principals[0]: a map is no string matcher; write !Exact "x", !Prefix "x", !Suffix "x" or !Presence []`},
		{matching("{principals: [x]}"), `line 3: policies[0].rules[0][0][0].principals[0]: "x" is no string matcher; write !Exact "x", !Prefix "x", !Suffix "x" or !Presence []`},
		{matching("{principals: [!Exact [x]]}"), `line 3: policies[0].rules[0][0][0].principals[0]: !Exact takes a string; write !Exact "x"`},
		{matching("{principals: [!Presence x]}"), `line 3: policies[0].rules[0][0][0].principals[0]: !Presence takes nothing; write !Presence []`},
		{matching("{sourceIps: [10.0.0.1]}"), `line 3: policies[0].rules[0][0][0].sourceIps[0]: "10.0.0.1" has no prefix length; write "10.0.0.1/32" for the one address`},
		{matching("{serviceAccounts: [{namespace: a}]}"), "line 3: policies[0].rules[0][0][0].serviceAccounts[0]: the key serviceAccount is missing"},
	} {
		s, err := Parse([]byte(c.file))
		var fe *FileError
		if s != nil || !errors.As(err, &fe) || err.Error() != c.want {
			t.Errorf("%q:\n got %v\nwant %s", c.file, err, c.want)
		}
	}
}

// An error is one line that a terminal can show, whatever stands in the file.
func TestErrorsAreLines(t *testing.T) {
	for _, file := range []string{
		serviceWith(`endpoints: {"\e[2J\n": x}`),
		serviceWith(`"\e[2J\n": x`),
		serviceWith("endpoints: {a: {workloadUid: a, port: " + strings.Repeat("x", 100_000) + "}}"),
		serviceWith("endpoints: {" + strings.Repeat("x", 1000) + ": {x: y}}"),
		serviceWith("? " + strings.Repeat("x", 1100) + "\n  : y"),
		"workloads: *" + strings.Repeat("x", 10_000),
	} {
		_, err := Parse([]byte(file))
		if err == nil || len(err.Error()) > 1300 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
			t.Errorf("%.100s: %q", file, err)
		}
	}
	s := parse(t, workloadWith(`authorizationPolicies: ["\e[2J", `+strings.Repeat("x", 1000)+`]`))
	for _, w := range s.Warnings() {
		if len(w) > 700 || strings.Contains(w, "\x1b") {
			t.Errorf("%q", w)
		}
	}
}
