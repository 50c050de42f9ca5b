package workload

import "strings"

// identity is the name of a service account: what ztunnel's certificates say.
type identity struct{ trustDomain, namespace, serviceAccount string }

const spiffe = "spiffe://"

func (id identity) String() string {
	return spiffe + id.trustDomain + "/ns/" + id.namespace + "/sa/" + id.serviceAccount
}

// parseIdentity takes apart spiffe://<trust domain>/ns/<namespace>/sa/<account>
// and nothing else. Each part may be empty.
func parseIdentity(s string) (identity, bool) {
	rest, ok := strings.CutPrefix(s, spiffe)
	if !ok {
		return identity{}, false
	}
	p := strings.Split(rest, "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "sa" {
		return identity{}, false
	}
	return identity{p[0], p[2], p[4]}, true
}
