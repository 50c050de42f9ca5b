package workload

import (
	"slices"

	"go.yaml.in/yaml/v3"
)

func (d *decoder) policy(n *yaml.Node, at *path) *Policy {
	o := d.object(n, at, true, []string{"name", "namespace", "scope", "action", "dryRun", "rules"})
	o.need("scope", "; write Global, Namespace or WorkloadSelector")
	o.need("action", "; write Allow or Deny")
	return &Policy{
		Name:      o.needText("name"),
		Namespace: o.needText("namespace"),
		Scope:     word(o, "scope", ScopeGlobal, ScopeNamespace, ScopeWorkloadSelector),
		Action:    word(o, "action", Allow, Deny),
		DryRun:    o.needFlag("dryRun"),
		Rules:     list(d, o.need("rules", "; write [] for a policy that never matches"), o.path("rules"), d.rule),
	}
}

func (d *decoder) rule(n *yaml.Node, at *path) Rule     { return list(d, n, at, d.clause) }
func (d *decoder) clause(n *yaml.Node, at *path) Clause { return list(d, n, at, d.match) }

var matchKeys = []string{
	"namespaces", "notNamespaces", "serviceAccounts", "notServiceAccounts", "principals", "notPrincipals",
	"sourceIps", "notSourceIps", "destinationIps", "notDestinationIps", "destinationPorts", "notDestinationPorts",
}

// match tolerates unknown keys, as the real one does. They are a trap: what such
// a match does not ask for, it does not check.
func (d *decoder) match(n *yaml.Node, at *path) Match {
	o := d.object(n, at, false, matchKeys)
	return Match{
		Namespaces:          some(o, "namespaces", d.stringMatch),
		NotNamespaces:       some(o, "notNamespaces", d.stringMatch),
		ServiceAccounts:     some(o, "serviceAccounts", d.serviceAccount),
		NotServiceAccounts:  some(o, "notServiceAccounts", d.serviceAccount),
		Principals:          some(o, "principals", d.principal),
		NotPrincipals:       some(o, "notPrincipals", d.principal),
		SourceIPs:           some(o, "sourceIps", d.prefix),
		NotSourceIPs:        some(o, "notSourceIps", d.prefix),
		DestinationIPs:      some(o, "destinationIps", d.prefix),
		NotDestinationIPs:   some(o, "notDestinationIps", d.prefix),
		DestinationPorts:    some(o, "destinationPorts", d.port),
		NotDestinationPorts: some(o, "notDestinationPorts", d.port),
	}
}

func some[T any](o object, key string, item func(*yaml.Node, *path) T) []T {
	return list(o.d, o.get(key), o.path(key), item)
}

func (d *decoder) serviceAccount(n *yaml.Node, at *path) ServiceAccount {
	o := d.object(n, at, false, []string{"namespace", "serviceAccount"})
	return ServiceAccount{o.needText("namespace"), o.needText("serviceAccount")}
}

func (d *decoder) principal(n *yaml.Node, at *path) StringMatch {
	m := d.stringMatch(n, at)
	if m.Kind != Suffix && len(m.Value) >= len(spiffe) && m.Value[:len(spiffe)] == spiffe {
		d.warn(n, at, "%q never matches; principals are written without %s", m.Value, spiffe)
	}
	return m
}

var matchKinds = []MatchKind{Exact, Prefix, Suffix, Presence}

// stringMatch reads an enumeration with data, which in the real one's YAML is a
// tag and nothing else.
func (d *decoder) stringMatch(n *yaml.Node, at *path) StringMatch {
	n, ok := d.visit(n, at)
	if !ok {
		return StringMatch{}
	}
	tag := n.ShortTag()
	kind := MatchKind("")
	if len(tag) > 1 {
		kind = MatchKind(tag[1:])
	}
	switch {
	case !slices.Contains(matchKinds, kind):
		d.fail(n, at, `%s is no string matcher; write !Exact "x", !Prefix "x", !Suffix "x" or !Presence []`, describe(n))
	case kind != Presence && n.Kind == yaml.ScalarNode:
		return StringMatch{kind, n.Value}
	case kind == Presence && (n.Kind == yaml.SequenceNode && len(n.Content) == 0 || n.Kind == yaml.ScalarNode && n.Value == ""):
		return StringMatch{Kind: Presence}
	case kind == Presence:
		d.fail(n, at, "!Presence takes nothing; write !Presence []")
	default:
		d.fail(n, at, `!%s takes a string; write !%s "x"`, kind, kind)
	}
	return StringMatch{}
}
