package workload

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// Request is an outbound connection of a pod of ours.
type Request struct {
	Source  *Workload      // the pod; never nil
	Client  netip.Addr     // where the connection comes from
	Dst     netip.AddrPort // where it was going before it was redirected
	Network string         // the network that we are on (NETWORK)

	// Random returns a number below n, which is above 0. Nil is rand.Uint64N.
	Random func(n uint64) uint64
}

// Route is where an outbound connection goes.
type Route struct {
	Protocol   Protocol
	NextHop    netip.AddrPort // what to connect to
	Authority  string         // with HBONE, what to ask for there
	Identities []string       // with HBONE, of whom one must be at the other end; sorted
	Workload   *Workload      // at the next hop, or nil: nobody that we know
	Service    *Service       // that was asked for, or nil
}

// RouteError says why a connection is not made at all. Its text is ztunnel's.
type RouteError struct {
	Reason RouteReason
	Detail string
}

func (e *RouteError) Error() string { return string(e.Reason) + ": " + e.Detail }

// RouteReason is the kind of a RouteError.
type RouteReason string

// The reasons. The last two are the emulator's own: the real one can do that.
const (
	NoHealthyUpstream     RouteReason = "no healthy upstream"
	UnknownWaypoint       RouteReason = "unknown waypoint"
	UnknownNetworkGateway RouteReason = "unknown network gateway"
	NoDestination         RouteReason = "no valid routing destination for workload"
	DoubleHBONE           RouteReason = "double HBONE is not built yet"
	OnDemandDNS           RouteReason = "on-demand DNS is not built yet"
)

type router struct {
	Request
	state *State
}

func (r *router) random(n uint64) uint64 {
	if r.Random == nil {
		return rand.Uint64N(n)
	}
	return r.Random(n)
}

// Route decides about an outbound connection. What it does not know it passes on
// in the clear; what it knows and cannot reach as it should be reached is a
// *RouteError, and never a way around. Calls of a pod's own ports on loopback are
// the caller's to refuse.
func (s *State) Route(req Request) (Route, error) {
	req.Dst = unmapped(req.Dst)
	req.Client = req.Client.Unmap()
	r := &router{req, s}
	// Workloads first here, services first in find: the real one's order.
	var service *Service
	if s.WorkloadAt(r.Network, r.Dst.Addr()) == nil {
		service = s.ServiceAt(r.Network, r.Dst.Addr(), r.Source.Namespace)
	}
	if service != nil {
		if g := r.waypointOf(service); g != nil {
			return r.viaServiceWaypoint(g, service)
		}
	}
	up, ok := r.find(r.Source.Network, r.Dst, asDestination)
	if !ok {
		if service != nil && service.mode() != BalancePassthrough {
			return Route{}, &RouteError{NoHealthyUpstream, r.Dst.String()}
		}
		return Route{Protocol: TCP, NextHop: r.Dst, Service: service}, nil
	}
	if up.workload.Network != r.Source.Network {
		return r.viaNetworkGateway(up.workload, up.service)
	}
	// Traffic to a service has been through the service's waypoint, if it has one;
	// that of its endpoints is for traffic to them.
	if g := up.workload.Waypoint; g != nil && service == nil && !r.fromWaypoint(g) {
		return r.viaWaypoint(g, up.service)
	}
	return r.direct(up)
}

// waypointOf returns a service's waypoint: one of several at random, or the one,
// or nil.
func (r *router) waypointOf(svc *Service) *Gateway {
	var total uint64
	for _, w := range svc.WeightedWaypoint {
		total += uint64(w.Weight)
	}
	if total == 0 {
		return svc.Waypoint
	}
	n := r.random(total)
	for _, w := range svc.WeightedWaypoint {
		if n < uint64(w.Weight) {
			return w.Gateway
		}
		n -= uint64(w.Weight)
	}
	return svc.Waypoint
}

func (r *router) viaServiceWaypoint(g *Gateway, svc *Service) (Route, error) {
	up, asked, err := r.resolve(g, asWaypoint, UnknownWaypoint)
	if err != nil {
		return Route{}, err
	}
	if up.workload.Network != r.Source.Network {
		return r.viaNetworkGateway(up.workload, svc)
	}
	return r.tunnel(up, asked, svc)
}

func (r *router) viaWaypoint(g *Gateway, svc *Service) (Route, error) {
	up, asked, err := r.resolve(g, asWaypoint, UnknownWaypoint)
	if err != nil {
		return Route{}, err
	}
	return r.tunnel(up, asked, svc)
}

// tunnel goes to a waypoint, and asks it for what was asked of us.
func (r *router) tunnel(up upstream, asked netip.Addr, svc *Service) (Route, error) {
	ip, err := up.address(asked)
	if err != nil {
		return Route{}, err
	}
	return Route{
		Protocol:   HBONE,
		NextHop:    netip.AddrPortFrom(ip, up.port),
		Authority:  r.Dst.String(),
		Identities: up.identities(),
		Workload:   up.workload,
		Service:    svc,
	}, nil
}

// direct goes to the workload itself, in the way that it is reached.
func (r *router) direct(up upstream) (Route, error) {
	ip, err := up.address(r.Dst.Addr())
	if err != nil {
		return Route{}, err
	}
	target := netip.AddrPortFrom(ip, up.port)
	route := Route{Protocol: TCP, NextHop: target, Workload: up.workload, Service: up.service}
	if up.workload.Protocol == HBONE {
		route.Protocol = HBONE
		route.NextHop = netip.AddrPortFrom(ip, PortHBONE)
		route.Authority = target.String()
		route.Identities = up.identities()
	}
	return route, nil
}

// viaNetworkGateway would go to another network: a tunnel to its gateway, and in
// it one to the workload. It finds out what the real one does before it dials.
func (r *router) viaNetworkGateway(w *Workload, svc *Service) (Route, error) {
	if w.NetworkGateway == nil {
		return Route{}, &RouteError{NoDestination, w.Name}
	}
	up, asked, err := r.resolve(w.NetworkGateway, asDestination, UnknownNetworkGateway)
	if err != nil {
		return Route{}, err
	}
	ip, err := up.address(asked)
	if err != nil {
		return Route{}, err
	}
	authority := r.Dst.String()
	if svc != nil {
		authority = fmt.Sprintf("%s:%d", svc.Hostname, r.Dst.Port())
	}
	return Route{}, &RouteError{DoubleHBONE, fmt.Sprintf("%s on the network %q, through its gateway %s",
		authority, w.Network, netip.AddrPortFrom(ip, up.port))}
}

// resolve looks up a reference to a waypoint or gateway, and also returns which
// address to prefer: that of the reference, or else that of the connection.
func (r *router) resolve(g *Gateway, as resolution, unknown RouteReason) (upstream, netip.Addr, error) {
	up, asked, ok := upstream{}, r.Dst.Addr(), false
	if g.Addr.IP.IsValid() {
		asked = g.Addr.IP
		up, ok = r.find(g.Addr.Network, netip.AddrPortFrom(asked, g.Port), as)
	} else if svc := r.state.services[g.Host]; svc != nil {
		up, ok = r.pick(svc, g.Port, as)
	} else if w := r.state.byHostname[g.Host.Hostname]; w != nil {
		up, ok = upstream{workload: w, port: g.Port}, true
	}
	if !ok {
		what := map[RouteReason]string{UnknownWaypoint: "waypoint", UnknownNetworkGateway: "network gateway"}[unknown]
		return up, asked, &RouteError{unknown, what + " " + g.Destination() + " not found"}
	}
	return up, asked, nil
}

// fromWaypoint tells whether the source is the waypoint itself: it must not be
// sent to itself.
func (r *router) fromWaypoint(g *Gateway) bool {
	me := r.Source.Identity()
	isSource := func(w *Workload) bool { return w.Has(r.Client) && w.Identity() == me }
	w, svc := r.state.referred(g, r.Source.Namespace)
	return w != nil && isSource(w) ||
		svc != nil && slices.ContainsFunc(svc.reachable, func(e endpoint) bool { return isSource(e.workload) })
}

// referred returns the workload or the service that a reference leads to, if any.
func (s *State) referred(g *Gateway, namespace string) (w *Workload, svc *Service) {
	if g.Addr.IP.IsValid() {
		if w = s.WorkloadAt(g.Addr.Network, g.Addr.IP); w == nil {
			svc = s.ServiceAt(g.Addr.Network, g.Addr.IP, namespace)
		}
	} else if svc = s.services[g.Host]; svc == nil {
		w = s.byHostname[g.Host.Hostname]
	}
	return w, svc
}

// expected returns whom to expect at a workload that was reached through a
// service with such identities. It is sorted, so that equal sets are equal lists.
func expected(identities []string, w *Workload) []string {
	all := append(slices.Clone(identities), w.Identity())
	slices.Sort(all)
	return slices.Compact(all)
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
