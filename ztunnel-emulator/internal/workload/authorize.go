package workload

import (
	"net/netip"
	"slices"
	"strings"
)

// Peer is a connection to the local workload, as policies see it.
type Peer struct {
	Src      netip.AddrPort // the client
	Dst      netip.AddrPort // the application, not our port
	Identity string         // of the client's certificate; "" without one
}

// PolicyError says that a policy forbids a connection. Its text is ztunnel's.
type PolicyError struct {
	By *Policy // the policy that denies it, or nil: none allows it
}

func (e *PolicyError) Error() string {
	if e.By == nil {
		return rejected + "allow policies exist, but none allowed"
	}
	return rejected + "explicitly denied by: " + e.By.Key()
}

const rejected = "connection closed due to policy rejection: "

// DryRun is what a policy would have said that is only tried out.
type DryRun struct {
	Policy  *Policy
	Matched bool
}

// Authorize tells whether the policies of the local workload allow a connection:
// nil, or a *PolicyError. It also returns what those say that are only tried out.
func (s *State) Authorize(local *Workload, p Peer) ([]DryRun, error) {
	c := &subject{src: p.Src.Addr().Unmap(), dst: unmapped(p.Dst)}
	if c.id, c.known = parseIdentity(p.Identity); c.known {
		c.principal = strings.TrimPrefix(p.Identity, spiffe)
	}
	var tried []DryRun
	var denied *Policy
	var restricted, allowed bool
	s.eachPolicy(local, func(policy *Policy) {
		switch {
		case policy.DryRun:
			tried = append(tried, DryRun{policy, policy.matches(c)})
		case policy.Action == Deny:
			if denied == nil && policy.matches(c) {
				denied = policy
			}
		default:
			restricted = true
			allowed = allowed || policy.matches(c)
		}
	})
	switch {
	case denied != nil:
		return tried, &PolicyError{By: denied}
	case restricted && !allowed:
		return tried, &PolicyError{}
	}
	return tried, nil
}

// eachPolicy visits what governs a workload: the policies of its namespace, the
// global ones, and those that it names. Each once.
func (s *State) eachPolicy(local *Workload, visit func(*Policy)) {
	for _, p := range s.perNamespace[local.Namespace] {
		visit(p)
	}
	for _, p := range s.globals {
		visit(p)
	}
	for _, key := range local.AuthorizationPolicies {
		if p := s.policies[key]; p != nil && !p.governsAll(local.Namespace) {
			visit(p)
		}
	}
}

// governsAll tells whether a policy governs a namespace without being named.
func (p *Policy) governsAll(namespace string) bool {
	return p.Scope == ScopeGlobal || p.Scope == ScopeNamespace && p.Namespace == namespace
}

// matches: one rule must.
func (p *Policy) matches(c *subject) bool {
	return slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.matches(c) })
}

// matches: all clauses must. A rule without any matches everything.
func (r Rule) matches(c *subject) bool {
	return !slices.ContainsFunc(r, func(clause Clause) bool { return !clause.matches(c) })
}

// matches: one match must. A clause without any matches everything.
func (l Clause) matches(c *subject) bool {
	if len(l) == 0 {
		return true
	}
	for i := range l {
		if l[i].matches(c) {
			return true
		}
	}
	return false
}
