package workload

import "go.yaml.in/yaml/v3"

var serviceKeys = []string{
	"name", "namespace", "hostname", "vips", "ports", "cidrVips", "endpoints", "subjectAltNames",
	"waypoint", "weightedWaypoints", "loadBalancer", "ipFamilies", "canonical", "visibility",
}

func (d *decoder) service(n *yaml.Node, at *path) *Service {
	o := d.object(n, at, true, serviceKeys)
	s := &Service{
		Name:             o.needText("name"),
		Namespace:        o.needText("namespace"),
		Hostname:         o.needText("hostname"),
		VIPs:             list(d, o.need("vips", "; write [] if it is headless"), o.path("vips"), d.networkAddress),
		Ports:            d.ports(o.need("ports", "; write {} if it has none"), o.path("ports")),
		CIDRVIPs:         list(d, o.get("cidrVips"), o.path("cidrVips"), d.cidr),
		Endpoints:        dict(d, o.get("endpoints"), o.path("endpoints"), d.text, d.endpoint),
		SubjectAltNames:  list(d, o.get("subjectAltNames"), o.path("subjectAltNames"), d.subjectAltName),
		Waypoint:         o.gateway("waypoint"),
		WeightedWaypoint: list(d, o.get("weightedWaypoints"), o.path("weightedWaypoints"), d.weightedWaypoint),
		Canonical:        o.flag("canonical"),
		Visibility:       word(o, "visibility", Public, NamespacePrivate),
	}
	if n := o.optional("loadBalancer"); n != nil {
		s.LoadBalancer = d.loadBalancer(n, o.path("loadBalancer"))
	}
	if n := o.optional("ipFamilies"); n != nil {
		s.IPFamilies = oneOf(d, n, o.path("ipFamilies"), Dual, IPv4, IPv6)
	}
	return s
}

func (d *decoder) cidr(n *yaml.Node, at *path) CIDR {
	o := d.object(n, at, false, []string{"network", "cidr"})
	network, prefix := o.needText("network"), o.need("cidr", "")
	if d.err != nil {
		return CIDR{}
	}
	return CIDR{network, d.prefix(prefix, o.path("cidr"))}
}

func (d *decoder) endpoint(n *yaml.Node, at *path) *Endpoint {
	o := d.object(n, at, true, []string{"workloadUid", "port", "status"})
	return &Endpoint{
		WorkloadUID: o.needText("workloadUid"),
		Ports:       d.ports(o.need("port", "; write {} for the service's own target ports"), o.path("port")),
		Status:      word(o, "status", Healthy, Unhealthy),
	}
}

// subjectAltName keeps what is no identity, as the real one does, which ignores
// it as often as it is needed.
func (d *decoder) subjectAltName(n *yaml.Node, at *path) string {
	s := d.text(n, at)
	if _, ok := parseIdentity(s); !ok && d.err == nil {
		d.warn(n, at, "%q is ignored; an identity is spiffe://<trust domain>/ns/<namespace>/sa/<service account>", s)
	}
	return s
}

func (d *decoder) weightedWaypoint(n *yaml.Node, at *path) WeightedWaypoint {
	o := d.object(n, at, false, []string{"destination", "weight"})
	destination, weight := o.need("destination", ""), o.need("weight", "")
	if d.err != nil {
		return WeightedWaypoint{}
	}
	return WeightedWaypoint{
		Gateway: d.gateway(destination, o.path("destination")),
		Weight:  uint32(d.number(weight, o.path("weight"), 32)),
	}
}

func (d *decoder) loadBalancer(n *yaml.Node, at *path) *LoadBalancer {
	o := d.object(n, at, true, []string{"routingPreferences", "mode", "healthPolicy"})
	preferences := o.need("routingPreferences", "; write [] for none")
	o.need("mode", "; it is mostly Standard")
	o.need("healthPolicy", "; it is mostly OnlyHealthy")
	return &LoadBalancer{
		Preferences: list(d, preferences, o.path("routingPreferences"), func(n *yaml.Node, at *path) Scope {
			return oneOf(d, n, at, ScopeRegion, ScopeZone, ScopeSubzone, ScopeNode, ScopeCluster, ScopeNetwork)
		}),
		Mode:   word(o, "mode", BalanceStandard, BalanceStrict, BalanceFailover, BalancePassthrough),
		Health: word(o, "healthPolicy", OnlyHealthy, AllowAll),
	}
}
