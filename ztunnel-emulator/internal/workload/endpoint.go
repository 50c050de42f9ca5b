package workload

import "net/netip"

// upstream is what a lookup has come to: a workload, and the port to reach it at.
type upstream struct {
	workload *Workload
	service  *Service // that led to it, or nil
	port     uint16
}

// identities are whom a certificate at the other end may name.
func (u upstream) identities() []string {
	if u.service == nil {
		return expected(nil, u.workload)
	}
	return expected(u.service.identities, u.workload)
}

// resolution is what an endpoint is wanted for. A waypoint takes traffic for
// other ports than its service's own.
type resolution int

const (
	asDestination resolution = iota
	asWaypoint
)

// find looks an address up: services first, then workloads.
func (r *router) find(network string, addr netip.AddrPort, as resolution) (upstream, bool) {
	if svc := r.state.ServiceAt(network, addr.Addr(), r.Source.Namespace); svc != nil {
		if svc.mode() == BalancePassthrough {
			return upstream{}, false
		}
		return r.pick(svc, addr.Port(), as)
	}
	if w := r.state.WorkloadAt(network, addr.Addr()); w != nil {
		return upstream{workload: w, port: addr.Port()}, true
	}
	return upstream{}, false
}

// pick chooses an endpoint of a service at random, weighted by capacity, of those
// that its load balancer likes best for this source.
func (r *router) pick(svc *Service, port uint16, as resolution) (upstream, bool) {
	best, total := -1, uint64(0)
	for _, e := range svc.reachable {
		rank, ok := r.usable(svc, e, port, as)
		switch {
		case !ok || rank < best:
			continue
		case rank > best:
			best, total = rank, 0
		}
		total += uint64(e.workload.Capacity)
	}
	if total == 0 {
		return upstream{}, false
	}
	n := r.random(total)
	for _, e := range svc.reachable {
		if rank, ok := r.usable(svc, e, port, as); !ok || rank != best {
			continue
		}
		if weight := uint64(e.workload.Capacity); n >= weight {
			n -= weight
			continue
		}
		target, _ := targetPort(svc, e, port, as)
		return upstream{e.workload, svc, target}, true
	}
	return upstream{}, false
}

// usable tells whether an endpoint can be chosen at all, and how much the load
// balancer likes it.
func (r *router) usable(svc *Service, e endpoint, port uint16, as resolution) (rank int, ok bool) {
	w := e.workload
	gateway := w.Network != r.Source.Network && w.NetworkGateway != nil
	if len(w.IPs) == 0 && w.Hostname == "" && !gateway {
		return 0, false
	}
	if _, ok := targetPort(svc, e, port, as); !ok {
		return 0, false
	}
	return svc.LoadBalancer.rank(r.Source, w)
}

// targetPort returns where an endpoint serves a port of its service. What the
// endpoint says itself goes first; a waypoint with an application tunnel takes
// any port.
func targetPort(svc *Service, e endpoint, port uint16, as resolution) (uint16, bool) {
	target, listed := svc.Ports[port]
	if !listed && as == asDestination {
		return 0, false
	}
	if own, ok := e.Ports[port]; ok {
		return own, true
	}
	if target > 0 {
		return target, true
	}
	tunnel := e.workload.ApplicationTunnel
	return port, as == asWaypoint && tunnel != nil && tunnel.Port != nil
}

// rank counts how many of the preferences, from the first on, a source and an
// endpoint have in common. If the first one is the network, another network does
// not end the count, but the same one outweighs all that follow.
func (lb *LoadBalancer) rank(source, w *Workload) (rank int, ok bool) {
	if lb == nil || lb.Mode == BalanceStandard || lb.Mode == BalancePassthrough {
		return 0, true
	}
	for i, scope := range lb.Preferences {
		network := i == 0 && scope == ScopeNetwork
		switch common := scope.common(source, w); {
		case common && network:
			rank += len(lb.Preferences)
		case common:
			rank++
		case lb.Mode == BalanceStrict:
			return 0, false
		case !network:
			return rank, true
		}
	}
	return rank, true
}

func (s Scope) common(a, b *Workload) bool {
	switch s {
	case ScopeRegion:
		return a.locality().Region == b.locality().Region
	case ScopeZone:
		return a.locality().Zone == b.locality().Zone
	case ScopeSubzone:
		return a.locality().Subzone == b.locality().Subzone
	case ScopeNode:
		return a.Node == b.Node
	case ScopeCluster:
		return a.Cluster == b.Cluster
	case ScopeNetwork:
		return a.Network == b.Network
	}
	return false
}

// address returns under which of its addresses a workload is reached: the one
// that was asked for, or else one that the service allows, of the same family if
// there is one.
func (u upstream) address(asked netip.Addr) (netip.Addr, error) {
	if u.workload.Has(asked) {
		return asked, nil
	}
	var found netip.Addr
	for _, ip := range u.workload.IPs {
		if u.service != nil && !u.service.IPFamilies.allow(ip) {
			continue
		}
		if ip.Is4() == asked.Is4() {
			return ip, nil
		}
		if !found.IsValid() {
			found = ip
		}
	}
	switch {
	case found.IsValid():
		return found, nil
	case u.workload.Hostname != "":
		return found, &RouteError{OnDemandDNS, u.workload.Name + " has no usable address, only the hostname " + u.workload.Hostname}
	}
	return found, &RouteError{NoDestination, u.workload.Name}
}

func (f IPFamilies) allow(ip netip.Addr) bool {
	switch f {
	case IPv4:
		return ip.Is4()
	case IPv6:
		return ip.Is6()
	}
	return true
}
