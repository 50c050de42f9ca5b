package workload

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

const (
	noneAllowed = "connection closed due to policy rejection: allow policies exist, but none allowed"
	deniedBy    = "connection closed due to policy rejection: explicitly denied by: "
)

// fromAlice is a connection with an identity, and plain one without.
var (
	fromAlice = Peer{Src: ap("10.0.2.10:40000"), Dst: ap("10.0.3.10:8080"), Identity: "spiffe://td/ns/demo/sa/alice"}
	plain     = Peer{Src: ap("[::ffff:10.0.2.10]:40000"), Dst: ap("[::ffff:10.0.3.10]:8080")}
)

// policyOf writes a policy; rules are in YAML.
func policyOf(name, scope, action, rules string) string {
	return fmt.Sprintf("- {name: %s, namespace: demo, scope: %s, action: %s, dryRun: false, rules: %s}\n", name, scope, action, rules)
}

func TestRules(t *testing.T) {
	const yes, no = "{destinationPorts: [8080]}", "{destinationPorts: [1]}"
	for _, c := range []struct {
		name, rules string
		want        bool
	}{
		{"no rules", "[]", false},
		{"a rule with no clauses", "[[]]", true},
		{"a clause with no matches", "[[[]]]", true},
		{"a match with nothing set", "[[[{}]]]", false},
		{"a match with empty lists", "[[[{principals: [], destinationPorts: []}]]]", false},
		{"a match with an unknown key", "[[[{ports: [8080]}]]]", false},
		{"a match", "[[[" + yes + "]]]", true},
		{"another match", "[[[" + no + "]]]", false},
		{"one of the matches", "[[[" + no + ", {}, " + yes + "]]]", true},
		{"all clauses", "[[[" + yes + "], [" + yes + "]]]", true},
		{"not all clauses", "[[[" + yes + "], [" + no + "]]]", false},
		{"an empty clause among others", "[[[" + yes + "], []]]", true},
		{"an empty clause, another fails", "[[[], [" + no + "]]]", false},
		{"one of the rules", "[[[" + no + "]], [[" + yes + "]]]", true},
		{"an empty rule among others", "[[[" + no + "]], []]", true},
	} {
		s := parse(t, "policies:\n"+policyOf("p", "Global", "Deny", c.rules))
		_, err := s.Authorize(&Workload{}, fromAlice)
		if (err != nil) != c.want {
			t.Errorf("%s: %s: %v; want %t", c.name, c.rules, err, c.want)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		match        string
		alice, plain bool
	}{
		{"principals: [!Exact td/ns/demo/sa/alice]", true, false},
		{"principals: [!Exact spiffe://td/ns/demo/sa/alice]", false, false},
		{"principals: [!Prefix spiffe]", false, false},
		{"principals: [!Prefix td/ns/demo]", true, false},
		{"principals: [!Suffix /alice]", true, false},
		{"principals: [!Presence []]", true, false},
		{"principals: [!Prefix '']", true, false},
		{"principals: [!Exact x, !Suffix /alice]", true, false},
		{"principals: [!Exact TD/ns/demo/sa/alice]", false, false},
		{"notPrincipals: [!Exact td/ns/demo/sa/alice]", false, true},
		{"notPrincipals: [!Exact td/ns/demo/sa/bob]", true, true},
		{"notPrincipals: [!Presence []]", false, true}, // STRICT
		{"notPrincipals: [!Exact x, !Presence []]", false, true},
		{"notPrincipals: [!Prefix '']", false, true},

		{"namespaces: [!Exact demo]", true, false},
		{"namespaces: [!Presence []]", true, false},
		{"namespaces: [!Exact '']", false, true},
		{"namespaces: [!Prefix '']", true, true},
		{"namespaces: [!Suffix mo]", true, false},
		{"notNamespaces: [!Exact demo]", false, true},
		{"notNamespaces: [!Exact prod]", true, true},
		{"notNamespaces: [!Presence []]", false, true},

		{"serviceAccounts: [{namespace: demo, serviceAccount: alice}]", true, false},
		{"serviceAccounts: [{namespace: prod, serviceAccount: alice}]", false, false},
		{"serviceAccounts: [{namespace: demo, serviceAccount: bob}]", false, false},
		{"serviceAccounts: [{namespace: '', serviceAccount: ''}]", false, false},
		{"notServiceAccounts: [{namespace: demo, serviceAccount: alice}]", false, true},
		{"notServiceAccounts: [{namespace: demo, serviceAccount: bob}]", true, true},
		{"notServiceAccounts: [{namespace: '', serviceAccount: ''}]", true, true},

		{"sourceIps: [10.0.2.10/32]", true, true},
		{"sourceIps: [10.0.2.99/24]", true, true},
		{"sourceIps: [10.0.3.0/24, 10.0.2.0/24]", true, true},
		{"sourceIps: [10.0.3.0/24]", false, false},
		{"sourceIps: ['::/0']", false, false},
		{"sourceIps: [0.0.0.0/0]", true, true},
		{"notSourceIps: [10.0.2.0/24]", false, false},
		{"notSourceIps: [10.0.3.0/24]", true, true},
		{"notSourceIps: [10.0.3.0/24, 10.0.2.0/24]", false, false},

		{"destinationIps: [10.0.3.0/24]", true, true},
		{"destinationIps: [10.0.2.0/24]", false, false},
		{"notDestinationIps: [10.0.3.0/24]", false, false},
		{"notDestinationIps: [10.0.2.0/24]", true, true},

		{"destinationPorts: [80, 8080]", true, true},
		{"destinationPorts: [15008]", false, false},
		{"notDestinationPorts: [8080]", false, false},
		{"notDestinationPorts: [15008]", true, true},

		{"principals: [!Presence []], destinationPorts: [8080]", true, false},
		{"principals: [!Presence []], destinationPorts: [80]", false, false},
		{"destinationPorts: [8080], notDestinationPorts: [8080]", false, false},
		{"notPrincipals: [!Presence []], notDestinationPorts: [9090]", false, true},
	} {
		s := parse(t, "policies:\n"+policyOf("p", "Global", "Deny", "[[[{"+c.match+"}]]]"))
		for peer, want := range map[Peer]bool{fromAlice: c.alice, plain: c.plain} {
			if _, err := s.Authorize(&Workload{}, peer); (err != nil) != want {
				t.Errorf("%s, %q: %v; want %t", c.match, peer.Identity, err, want)
			}
		}
	}
}

func TestIdentities(t *testing.T) {
	for _, c := range []struct {
		in string
		ok bool
	}{
		{"spiffe://td/ns/a/sa/b", true},
		{"spiffe:///ns//sa/", true},
		{"spiffe://td/ns/a/sa/b/c", false},
		{"spiffe://td/ns/a/sa", false},
		{"spiffe://td/NS/a/sa/b", false},
		{"spiffe://td/ns/a/user/b", false},
		{"SPIFFE://td/ns/a/sa/b", false},
		{"td/ns/a/sa/b", false},
		{"", false},
	} {
		id, ok := parseIdentity(c.in)
		if ok != c.ok || ok && id.String() != c.in {
			t.Errorf("%s: %s, %t", c.in, id, ok)
		}
	}
	// What is no identity is nobody's.
	s := parse(t, "policies:\n"+policyOf("p", "Global", "Allow", "[[[{principals: [!Prefix '']}]]]"))
	if _, err := s.Authorize(&Workload{}, Peer{Identity: "https://example.com"}); text(err) != noneAllowed {
		t.Error(err)
	}
}

func TestWhichPolicies(t *testing.T) {
	const all, nobody = "[[]]", "[]"
	for _, c := range []struct{ name, policies, want string }{
		{"none", "", ""},
		{"deny", policyOf("a", "Global", "Deny", all), deniedBy + "demo/a"},
		{"deny that does not match", policyOf("a", "Global", "Deny", nobody), ""},
		{"allow", policyOf("a", "Global", "Allow", all), ""},
		{"allow that does not match", policyOf("a", "Global", "Allow", nobody), noneAllowed},
		{"one allows", policyOf("a", "Global", "Allow", nobody) + policyOf("b", "Namespace", "Allow", all), ""},
		{"deny before allow", policyOf("a", "Global", "Allow", all) + policyOf("b", "Global", "Deny", all), deniedBy + "demo/b"},
		{"deny that does not match, and allow", policyOf("a", "Global", "Deny", nobody) + policyOf("b", "Global", "Allow", all), ""},
		{"the namespace's", policyOf("a", "Namespace", "Deny", all), deniedBy + "demo/a"},
		{"the namespace's before the global", policyOf("a", "Global", "Deny", all) + policyOf("b", "Namespace", "Deny", all), deniedBy + "demo/b"},
		{"another namespace's", strings.Replace(policyOf("a", "Namespace", "Deny", all), "namespace: demo", "namespace: prod", 1), ""},
		{"a global one of another namespace", strings.Replace(policyOf("a", "Global", "Deny", all), "namespace: demo", "namespace: prod", 1), deniedBy + "prod/a"},
		{"a selector that is not named", policyOf("a", "WorkloadSelector", "Deny", all), ""},
		{"a selector that is named", policyOf("named", "WorkloadSelector", "Deny", all), deniedBy + "demo/named"},
		{"a selector that is named allows", policyOf("named", "WorkloadSelector", "Allow", nobody), noneAllowed},
	} {
		s := parse(t, `
workloads:
- {uid: bob, namespace: demo, workloadIps: [], services: {}, authorizationPolicies: [demo/missing, demo/named]}
policies:
`+c.policies)
		dry, err := s.Authorize(s.WorkloadByUID("bob"), fromAlice)
		if text(err) != c.want || len(dry) > 0 {
			t.Errorf("%s: %v, %v; want %q", c.name, dry, err, c.want)
		}
		var pe *PolicyError
		if c.want != "" && !errors.As(err, &pe) {
			t.Errorf("%s: a %T", c.name, err)
		}
	}
}

// What is only tried out changes nothing, and is reported once.
func TestDryRun(t *testing.T) {
	dry := func(p string) string { return strings.Replace(p, "dryRun: false", "dryRun: true", 1) }
	s := parse(t, `
workloads:
- {uid: bob, namespace: demo, workloadIps: [], services: {}, authorizationPolicies: [demo/deny, demo/allow]}
policies:
`+dry(policyOf("deny", "Namespace", "Deny", "[[]]"))+dry(policyOf("allow", "WorkloadSelector", "Allow", "[]"))+policyOf("real", "Global", "Deny", "[[[{principals: [!Presence []]}]]]"))
	for _, c := range []struct {
		peer Peer
		want string
	}{{plain, ""}, {fromAlice, deniedBy + "demo/real"}} {
		tried, err := s.Authorize(s.WorkloadByUID("bob"), c.peer)
		if text(err) != c.want || len(tried) != 2 ||
			tried[0].Policy.Name != "deny" || !tried[0].Matched || tried[1].Policy.Name != "allow" || tried[1].Matched {
			t.Errorf("%v, %v; want %q", tried, err, c.want)
		}
	}
}

// PeerAuthentication STRICT, as the control plane writes it.
func TestStrict(t *testing.T) {
	s := parse(t, `
workloads:
- {uid: strict, namespace: demo, workloadIps: [], services: {}, authorizationPolicies: [istio-system/istio_converted_static_strict]}
- {uid: lax, namespace: demo, workloadIps: [], services: {}}
policies:
- {name: istio_converted_static_strict, namespace: istio-system, scope: WorkloadSelector, action: Deny, dryRun: false, rules: [[[{notPrincipals: [!Presence []]}]]]}
`)
	for _, c := range []struct {
		uid  string
		peer Peer
		want string
	}{
		{"strict", plain, deniedBy + "istio-system/istio_converted_static_strict"},
		{"strict", fromAlice, ""},
		{"lax", plain, ""},
	} {
		if _, err := s.Authorize(s.WorkloadByUID(c.uid), c.peer); text(err) != c.want {
			t.Errorf("%s, %q: %v; want %q", c.uid, c.peer.Identity, err, c.want)
		}
	}
}

// The peer's bench: many policies that do not match.
func BenchmarkAuthorize(b *testing.B) {
	var text strings.Builder
	text.WriteString("policies:\n")
	for i := range 10_000 {
		text.WriteString(policyOf(fmt.Sprint("p", i), "Global", "Deny", "["+strings.Repeat("[[{namespaces: [!Exact never]}]],", 10)+"]"))
	}
	s := parse(b, text.String())
	w := &Workload{Namespace: "demo"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Authorize(w, fromAlice); err != nil {
			b.Fatal(err)
		}
	}
}
